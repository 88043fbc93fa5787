import json
import math
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from samdetr.datasets.build import build_dataset, collate, read_split
from samdetr.datasets.categories import Categories
from samdetr.datasets.coco import CocoDetection
from samdetr.datasets.image_list import ImageList, ImageRecord
from samdetr.datasets.images import read_image, to_rgb
from samdetr.datasets.settings import Data
from samdetr.datasets.transforms import EvalTransforms, TrainTransforms

SHARED_DATA = Path(__file__).parents[1].parent / "shared" / "data"
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def content():
    """Two images: one with two objects, a crowd, a box that hangs over the edge and one outside; one without any."""

    def annotation(number, category, box, crowd=0):
        return {"id": number, "image_id": 7, "category_id": category, "bbox": box, "area": 1, "iscrowd": crowd}

    return {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 3, "file_name": "b.jpg", "width": 20, "height": 10},
        ],
        "annotations": [
            annotation(1, 2, [4, 6, 8, 12]),
            annotation(2, 5, [30, 20, 50, 50]),
            annotation(3, 2, [0, 0, 20, 20], crowd=1),
            annotation(4, 5, [41, 3, 5, 5]),
            annotation(5, 5, [10, 10, 0, 5]),
        ],
        "categories": [{"id": 2, "name": "cat"}, {"id": 5, "name": "dog"}],
    }


def write(folder, data, images=("a.png", "b.jpg")):
    (folder / "images").mkdir(exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    for name in images:
        Image.fromarray(noise[:10, :20] if name == "b.jpg" else noise).save(folder / "images" / name)
    (folder / "ann.json").write_text(data if isinstance(data, str) else json.dumps(data))


def load(folder, *, transforms=None, **kwargs):
    return CocoDetection(
        image_folder=folder / "images",
        annotation_file=folder / "ann.json",
        transforms=transforms or EvalTransforms(short_side=60, max_size=None),
        **{"train": False, **kwargs},
    )


def test_targets_by_hand(tmp_path, capsys):
    write(tmp_path, content())
    dataset = load(tmp_path)
    assert len(dataset) == 2
    image, target = dataset[0]
    assert (image.dtype, image.shape, type(image)) == (torch.float32, (3, 60, 80), torch.Tensor)
    assert set(target) == {"labels", "boxes", "image_id", "orig_size", "size"}
    assert {k: str(v.dtype) for k, v in target.items()} == {
        **dict.fromkeys(["labels", "image_id", "orig_size", "size"], "torch.int64"),
        "boxes": "torch.float32",
    }
    assert type(target["boxes"]) is torch.Tensor
    # x 4..12 of 40, y 6..18 of 30; then 30..80 and 20..70, clipped to 30..40 and 20..30
    np.testing.assert_allclose(target["boxes"], [[0.2, 0.4, 0.2, 0.4], [0.875, 5 / 6, 0.25, 1 / 3]], rtol=1e-6)
    assert target["labels"].tolist() == [2, 5]
    assert target["image_id"].item() == 7
    assert target["image_id"].shape == ()
    assert target["orig_size"].tolist() == [30, 40]
    assert target["size"].tolist() == [60, 80]

    _, empty = dataset[1]
    assert empty["boxes"].shape == (0, 4)
    assert empty["labels"].shape == (0,)
    assert dataset.ground_truth.crowd.tolist() == [False, False, True, False, False], "the evaluator sees the crowd"
    assert load(tmp_path, train=True).ground_truth is None
    assert len(pickle.loads(pickle.dumps(dataset))[0]) == 2  # what workers started by spawn do
    assert capsys.readouterr().out == ""


def test_files_that_leave_out_what_boxes_do_not_need(tmp_path):
    data = content()
    for annotation in data["annotations"]:
        del annotation["id"], annotation["area"], annotation["iscrowd"]
    for image in data["images"]:
        del image["width"], image["height"]
    write(tmp_path, data)
    dataset = load(tmp_path)
    assert dataset[0][1]["labels"].tolist() == [2, 5, 2]
    assert dataset.ground_truth.areas.tolist() == [96, 2500, 400, 25, 0]
    assert not dataset.ground_truth.crowd.any()


def test_a_list_of_images_gives_back_what_it_got():
    records = [
        ImageRecord(7, "a.png", (40, 30)),
        ImageRecord(-(2**62), "", None),
        ImageRecord(3, "sub/é日\ud800.jpg", (20.5, 2**24 + 1)),  # JSON can hold half of a character
    ]
    images = ImageList(records)
    assert list(images) == list(pickle.loads(pickle.dumps(images))) == records
    assert images[-1] == records[-1]
    assert len(images) == 3
    with pytest.raises(IndexError):
        images[3]
    assert list(ImageList([ImageRecord(1, "", None)])) == [(1, "", None)]


def test_annotations_in_any_order(tmp_path):
    data = content()
    for annotation, image_id in zip(data["annotations"], (3, 7, 3, 7, 3)):
        annotation.update(image_id=image_id, category_id=2 if image_id == 3 else 5, bbox=[annotation["id"], 0, 2, 2])
    write(tmp_path, data)
    dataset = load(tmp_path)
    for index, labels, lefts in [(0, [5, 5], [2, 4]), (1, [2, 2], [1, 5])]:  # 3 is a crowd
        _, target = dataset[index]
        assert target["labels"].tolist() == labels
        left = (target["boxes"][:, 0] - target["boxes"][:, 2] / 2) * target["orig_size"][1]
        np.testing.assert_allclose(left, lefts, rtol=1e-5)


def change(path, value):
    """A fault: set or, for None, delete the entry at `path`."""

    def apply(data):
        entry = data
        for key in path[:-1]:
            entry = entry[key]
        if value is None:
            del entry[path[-1]]
        else:
            entry[path[-1]] = value

    return apply


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (change(["images"], None), ["no list 'images'"]),
        (change(["annotations"], None), ["no list 'annotations'"]),
        (change(["categories"], None), ["no list 'categories'"]),
        (change(["categories"], []), ["'categories' is empty"]),
        (change(["images"], []), ["'images' is empty"]),
        (change(["images", 1, "id"], None), ["b.jpg", "integer 'id'"]),
        (change(["images", 1, "id"], 2**63), ["b.jpg", "integer 'id' of 64 bits"]),
        (change(["categories", 1, "id"], 2**63), ["dog", "integer 'id' of 64 bits"]),
        (change(["images", 0, "file_name"], None), ["'id': 7", "'file_name'"]),
        (change(["images", 1, "id"], 7), ["image id 7", "twice", "'a.png'", "'b.jpg'"]),
        (change(["annotations", 1, "category_id"], 4), ["annotation id 2", "image id 7", "category id 4", "define"]),
        (change(["annotations", 1, "image_id"], 9), ["annotation id 2", "image id 9"]),
        (change(["annotations", 0, "image_id"], [7]), ["annotation id 1", "image id [7]"]),
        (change(["annotations", 0, "bbox"], [1, 2, math.nan, 4]), ["annotation id 1", "[1, 2, nan, 4]"]),
        (change(["annotations", 0, "bbox", 0], math.inf), ["annotation id 1", "inf"]),
        (change(["annotations", 0, "bbox", 2], -0.5), ["annotation id 1", "-0.5", "negative"]),
        (change(["annotations", 0, "bbox", 3], -1), ["annotation id 1", "-1", "negative"]),
        (change(["annotations", 0, "bbox"], [1, 2, 3]), ["annotation id 1", "[1, 2, 3]", "four"]),
        (change(["annotations", 0, "bbox", 1], "2 px"), ["annotation id 1", "'2 px'"]),
        (change(["annotations", 0, "iscrowd"], "no"), ["annotation id 1", "iscrowd 'no'", "0 or 1"]),
        (change(["annotations", 0, "iscrowd"], 2), ["annotation id 1", "iscrowd 2"]),
        (change(["annotations", 0, "bbox"], None), ["annotation id 1", "bbox None"]),
        (change(["annotations", 0], 5), ["annotation number 0", "is 5"]),
    ],
)
def test_faulty_annotations_are_named_in_one_line(tmp_path, fault, words):
    data = content()
    fault(data)
    write(tmp_path, data)
    with pytest.raises(ValueError, match=r"ann\.json") as caught:
        load(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\x00\x01", '{"images": 3}'])
def test_what_is_no_annotation_file(tmp_path, text):
    write(tmp_path, text)
    with pytest.raises(ValueError, match=r"ann\.json (is not JSON|has no list).*pass a COCO instances file"):
        load(tmp_path)


def test_missing_folder_and_files(tmp_path):
    write(tmp_path, content())
    with pytest.raises(ValueError, match=r"annotation file .*none\.json does not exist"):
        CocoDetection(
            image_folder=tmp_path / "images", annotation_file=tmp_path / "none.json", transforms=None, train=True
        )
    with pytest.raises(ValueError, match=r"image folder .*nowhere does not exist"):
        CocoDetection(
            image_folder=tmp_path / "nowhere", annotation_file=tmp_path / "ann.json", transforms=None, train=True
        )
    (tmp_path / "images" / "b.jpg").unlink()
    with pytest.raises(ValueError, match=r"images: 1 of the 2 images in .*ann.json.*'b.jpg' \(image id 3\).*remove"):
        load(tmp_path)
    data = content()
    data["images"] = [{"id": i, "file_name": f"sub/{i}.png"} for i in range(7, 27)]
    write(tmp_path, data)
    with pytest.raises(
        ValueError, match=r"20 of the 20 .*'sub/7.png' \(image id 7\).*'sub/9.png' \(image id 9\), \.\.\."
    ):
        load(tmp_path)


def test_categories_of_a_network_are_kept_or_refused(tmp_path):
    write(tmp_path, content())
    wider = Categories.from_annotations([{"id": i, "name": n} for i, n in [(1, "cow"), (2, "cat"), (5, "dog")]])
    assert load(tmp_path, categories=wider).categories is wider
    narrower = Categories.from_annotations([{"id": 2, "name": "cat"}, {"id": 5, "name": "fox"}])
    with pytest.raises(ValueError, match=r"ann\.json.*id 5 is 'dog' in the file and 'fox' in the model"):
        load(tmp_path, categories=narrower)


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


@pytest.mark.parametrize("name", ["a.png", "b.jpg"])
@pytest.mark.parametrize("keep", [0, 5, -40])
def test_cut_files_are_found_before_and_while_reading(tmp_path, name, keep):
    write(tmp_path, content())
    dataset = load(tmp_path)
    dataset.check_files()
    cut(tmp_path / "images" / name, keep)
    identity = {"a.png": 7, "b.jpg": 3}[name]
    message = rf"{name} \(image id {identity}\) cannot be used: .+; replace the file"
    with pytest.raises(ValueError, match=message):
        dataset.check_files()
    with pytest.raises(ValueError, match=message):
        dataset[[7, 3].index(identity)]
    dataset[[3, 7].index(identity)]


def test_what_is_cut_beyond_the_end_is_complete(tmp_path):
    """Some cameras write zeros after the image: an unusual end is reason to decode, not to refuse."""
    write(tmp_path, content())
    file = tmp_path / "images" / "b.jpg"
    file.write_bytes(file.read_bytes() + bytes(100))
    load(tmp_path).check_files()


def test_an_image_of_another_size_than_its_annotations(tmp_path):
    data = content()
    data["images"][0]["width"] = 80
    write(tmp_path, data)
    dataset = load(tmp_path)
    message = r"a\.png \(image id 7\).* 40 x 30 pixels.* 80 x 30"
    with pytest.raises(ValueError, match=message):
        dataset.check_files()
    with pytest.raises(ValueError, match=message):
        dataset[0]


def red_box(pixels):
    """Fractions xyxy of the red part of RGB pixels (H, W, 3) in 0..1."""
    red = pixels[..., 0] - pixels[..., 1] > 0.47
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    height, width = red.shape
    return np.array([columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height])


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize(
    ("orientation", "stored"),  # how a camera of that orientation stores upright pixels
    [
        (1, lambda upright: upright),
        (2, lambda upright: upright[:, ::-1]),
        (3, lambda upright: upright[::-1, ::-1]),
        (4, lambda upright: upright[::-1]),
        (5, lambda upright: upright.transpose(1, 0, 2)),
        (6, lambda upright: np.rot90(upright)),
        (7, lambda upright: upright[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda upright: np.rot90(upright, -1)),
    ],
)
def test_exif_orientation_agrees_with_the_boxes(tmp_path, suffix, orientation, stored):
    upright = np.full((64, 96, 3), 90, dtype=np.uint8)
    upright[8:24, 16:72] = (250, 10, 10)
    pixels = np.ascontiguousarray(stored(upright))
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "images" / f"a.{suffix}", exif=exif, quality=95, subsampling=0)

    def check(size, frame):
        """The annotations give `size` and their box in the pixels of `frame`."""
        left, top, right, bottom = red_box(frame / 255.0) * np.array([frame.shape[1], frame.shape[0]] * 2)
        data = content()
        data["images"] = [{"id": 7, "file_name": f"a.{suffix}", **size}]
        data["annotations"] = [
            {"id": 1, "image_id": 7, "category_id": 2, "bbox": [left, top, right - left, bottom - top]}
        ]
        (tmp_path / "ann.json").write_text(json.dumps(data))
        dataset = load(tmp_path, transforms=EvalTransforms(short_side=64))
        dataset.check_files()
        image, target = dataset[0]
        assert target["orig_size"].tolist() == list(frame.shape[:2])
        x, y, w, h = target["boxes"][0].tolist()
        found = red_box(image.numpy().transpose(1, 2, 0) * STD + MEAN)
        np.testing.assert_allclose([x - w / 2, y - h / 2, x + w / 2, y + h / 2], found, atol=0.02)

    check({"width": 96, "height": 64}, upright)
    check({}, upright)
    if orientation >= 5:  # stored sideways, and the annotations were made on that
        check({"width": 64, "height": 96}, pixels)


def test_every_mode_becomes_rgb(tmp_path):
    """Pixel values worked out by hand."""
    rgb = Image.new("RGB", (4, 2), (200, 100, 50))

    def pixel(image):
        image = to_rgb(image)
        assert (image.mode, image.size) == ("RGB", (4, 2))
        return image.getpixel((1, 1))

    assert pixel(rgb) == (200, 100, 50)
    assert pixel(Image.new("L", (4, 2), 77)) == (77, 77, 77)
    assert pixel(Image.new("1", (4, 2), 1)) == (255, 255, 255)
    assert pixel(Image.new("RGBA", (4, 2), (200, 100, 50, 0))) == (255, 255, 255)
    assert pixel(Image.new("RGBA", (4, 2), (200, 100, 50, 255))) == (200, 100, 50)
    assert pixel(Image.new("LA", (4, 2), (55, 51))) == (215, 215, 215)  # 255 - (255 - 55) / 5
    assert pixel(Image.new("CMYK", (4, 2), (55, 155, 205, 0))) == (200, 100, 50)
    assert pixel(Image.fromarray(np.full((2, 4), 0x8040, dtype=np.uint16))) == (128, 128, 128)
    ramp = np.array([[-1000, 0, 0, 0], [0, 0, 0, 1000]])
    assert pixel(Image.fromarray(ramp.astype(np.int32))) == (128, 128, 128)
    assert pixel(Image.fromarray(ramp.astype(np.float32))) == (128, 128, 128)
    assert pixel(Image.fromarray(np.zeros((2, 4), dtype=np.float32))) == (0, 0, 0)

    palette = Image.new("P", (4, 2), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    assert pixel(palette) == (200, 100, 50)
    for transparent, expected in [(0, (200, 100, 50)), (1, (255, 255, 255)), (b"\xff\x33", (244, 224, 214))]:
        palette.save(tmp_path / "p.png", transparency=transparent)  # 244 = 255 - (255 - 200) / 5
        with Image.open(tmp_path / "p.png") as image:
            assert pixel(image) == expected
    Image.fromarray(np.full((2, 4), 0x8040, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png").getpixel((0, 0)) == (128, 128, 128)


def test_build_dataset_and_collate(tmp_path):
    for split in ("train", "val"):
        write(tmp_path, content())
        (tmp_path / "images").rename(tmp_path / f"{split}2017")
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "ann.json").rename(tmp_path / "annotations" / f"instances_{split}2017.json")

    data = Data(coco_path=str(tmp_path), train_sizes=(24, 48), eval_size=60, max_size=100, crop_augmentation=False)
    train, val = build_dataset("train", data), build_dataset("val", data)
    assert isinstance(train.transforms, TrainTransforms)
    assert min(train[0][0].shape[1:]) in (24, 48)
    images, packed = collate([val[0], val[1]])
    assert all(value.dtype == val[0][1][name].dtype for name, value in packed.fields.items())
    targets = packed.unpack()
    for i, target in enumerate(targets):
        torch.testing.assert_close(target, val[i][1], rtol=0, atol=0)
    assert images.images.shape == (2, 3, 60, 100)  # 60 x 80, and 60 x 120 limited to 50 x 100
    assert images.images.dtype == torch.uint8
    assert images.padding[0, :, 80:].all()
    assert images.padding[1, 50:].all()
    assert images.padding.sum() == 60 * 20 + 10 * 100
    assert [t["image_id"].item() for t in targets] == [7, 3]

    (tmp_path / "val2017" / "b.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"b\.jpg \(image id 3\)"):
        build_dataset("val", data)
    with pytest.raises(ValueError, match="`dataset_file` 'voc' is unknown"):
        build_dataset("val", replace(data, dataset_file="voc"))
    with pytest.raises(ValueError, match=r"data folder .*gone does not exist; set `coco_path`"):
        read_split("val", replace(data, coco_path=str(tmp_path / "gone")))


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="../shared/data with real images is not here")
@pytest.mark.parametrize(("name", "num_classes", "objects"), [("coco_tiny", 91, 804), ("bccd", 4, 945)])
def test_real_images(name, num_classes, objects):
    data = Data(coco_path=str(SHARED_DATA / name), train_sizes=(480,), eval_size=200)
    val = build_dataset("val", data)
    assert val.categories.num_classes == num_classes
    assert sum(len(val[i][1]["labels"]) for i in range(len(val))) == objects  # as its README counts, without crowds
    image, target = build_dataset("train", data, categories=val.categories, seed=0)[0]
    assert image.isfinite().all()
    assert (target["boxes"][:, 2:] > 0).all()
