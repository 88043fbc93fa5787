"""tests/layouts/ holds one small data set by hand in every layout: images a, b, c train, d validates, e tests."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import REPOSITORY, TINY, call_program, read_json

from samdetr.datasets.build import build_dataset, read_split
from samdetr.datasets.check.__main__ import main as check
from samdetr.datasets.convert import main as convert
from samdetr.datasets.settings import Data
from samdetr.datasets.sources import find_split

LAYOUTS = REPOSITORY / "tests" / "layouts"
NAMES = ("coco", "roboflow", "datumaro", "label_studio", "yolo", "voc")
# Width and height; class and box (left, top, width, height) in pixels, as drawn by hand.
OBJECTS = {
    "a": ((40, 30), [("cat", (4, 6, 16, 12)), ("dog", (20, 3, 10, 15))]),
    "b": ((30, 40), [("dog", (3, 4, 12, 20))]),  # and a crowd or a difficult object, except in YOLO
    "c": ((32, 32), []),
    "d": ((40, 20), [("cat", (10, 5, 20, 10))]),
    "e": ((20, 20), []),
}
SMALL = ["--train_sizes", "32", "--eval_size", "32", "--no_crop", "--num_workers", "0", "--device", "cpu"]


def settings(path: Path, **given) -> Data:
    return Data(coco_path=str(path), train_sizes=(32,), eval_size=32, crop_augmentation=False, **given)


def objects(split: str, data: Data) -> dict:
    """Size, and classes with boxes in pixels, of each image, from the targets of training or evaluation."""
    dataset = build_dataset(split, data, annotations=read_split(split, data, unannotated=split == "test"))
    dataset.transforms = lambda image, target: (dataset_tensor(image), target)
    found = {}
    for index in range(len(dataset)):
        target = dataset[index][1]
        height, width = target["orig_size"].tolist()
        corners = target["boxes"].double() * target["boxes"].new_tensor([width, height] * 2)
        boxes = [(x - w / 2, y - h / 2, w, h) for x, y, w, h in corners.tolist()]
        names = [dataset.categories.names[label] for label in target["labels"].tolist()]
        rounded = [tuple(round(value, 3) for value in box) for box in boxes]
        found[Path(dataset.images[index].file_name).stem] = ((width, height), list(zip(names, rounded)))
    return found


def dataset_tensor(image):
    from torchvision.transforms.v2.functional import pil_to_tensor

    return pil_to_tensor(image)


@pytest.fixture
def copy(tmp_path):
    return lambda name: shutil.copytree(LAYOUTS / name, tmp_path / name)


@pytest.mark.parametrize("name", NAMES)
def test_targets_are_those_of_coco(name, tmp_path, capsys):
    data = settings(LAYOUTS / name)
    if name == "label_studio":
        assert objects("train", data) == {image: OBJECTS[image] for image in "abcd"}
    else:
        assert objects("train", data) == {image: OBJECTS[image] for image in "abc"}
        assert objects("val", data) == {"d": OBJECTS["d"]}
    if name not in ("label_studio", "datumaro"):
        assert objects("test", data) == {"e": OBJECTS["e"]}
    assert read_split("train", data).crowd.sum() == (name != "yolo")

    assert check([str(LAYOUTS / name)]) == 0
    assert convert([str(LAYOUTS / name), "--output", str(tmp_path / "out")]) == 0
    written = settings(tmp_path / "out", data_format="coco")
    for split in ("train", "val", "test"):
        assert (find_split(split, written) is None) == (find_split(split, data) is None)
        if find_split(split, data):
            assert objects(split, written) == objects(split, data)
    before = sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*"))
    assert convert([str(LAYOUTS / name), "--output", str(tmp_path / "out")]) == 2  # overwrites nothing
    assert sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*")) == before
    assert capsys.readouterr().err.count("\n") == 1


def test_named_files_and_a_held_out_part(copy, capsys):
    folder = copy("label_studio")
    held_out = settings(folder, val_fraction=0.3)
    val = objects("val", held_out)
    train = objects("train", held_out)
    assert {**train, **val} == {image: OBJECTS[image] for image in "abcd"}
    assert val
    assert train.keys().isdisjoint(val)
    shutil.copy(folder / "images/a.png", folder / "images/z.png")  # a new image moves no other one
    content = read_json(folder / "result.json")
    content["images"].append({"id": 9, "file_name": "images/z.png", "width": 40, "height": 30})
    (folder / "result.json").write_text(json.dumps(content))
    assert {*objects("train", held_out)} - {"z"} <= {*train}
    assert check([str(folder), "--fix", str(folder / "fixed.json"), "--val_fraction", "0.3", "--allow_loss"]) in (0, 1)
    images = str(folder / "images")
    named = {"train_images": images, "train_annotations": str(folder / "fixed.json")}
    named |= {"val_images": images, "val_annotations": str(folder / "fixed_val.json")}
    assert objects("val", settings(folder / "gone", **named)) == objects("val", held_out)
    del named["val_images"], named["val_annotations"]
    with pytest.raises(ValueError, match=r"no val split; .*`val_annotations`.*`val_fraction`"):
        objects("val", settings(folder / "gone", **named))
    with pytest.raises(ValueError, match="there is a validation split"):
        objects("val", settings(LAYOUTS / "yolo", val_fraction=0.1))


def test_images_without_annotations_give_detections(tmp_path, capsys):
    words = ["--coco_path", str(LAYOUTS / "coco"), *SMALL]
    run = ["--batch_size", "1", "--epochs", "1", "--output_dir", str(tmp_path / "run"), *TINY]
    assert call_program(*words, *run) == 0
    words += ["--eval", "--resume", str(tmp_path / "run/checkpoint.pth"), "--split", "test"]
    assert call_program(*words) == 2
    assert "has no annotations to compare with; keep the detections: --output_dir" in capsys.readouterr().err
    assert call_program(*words, "--output_dir", str(tmp_path / "test")) == 0
    detections = read_json(tmp_path / "test/detections.json")
    assert {each["image_id"] for each in detections} == {1}
    assert {*detections[0]} == {"image_id", "category_id", "bbox", "score"}
    assert "coco_eval_bbox" not in read_json(tmp_path / "test/eval.json")


def object_(box: str, name: str = "<name>cat</name>") -> str:
    return f"<annotation><object>{name}<bndbox>{box}</bndbox></object></annotation>"


BOX = "<xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax>"
ENTITY = '<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]>'
LABEL, DESCRIPTION, XML = "labels/train/a.txt", "data.yaml", "Annotations/a.xml"
# Layout, file, its new content (None: removed), and what the line says beside the file.
BROKEN = [
    ("yolo", LABEL, "2 .5 .5 .1 .1", "class 2 is not among the 2"),
    ("yolo", LABEL, "-1 .5 .5 .1 .1", "class -1"),
    ("yolo", LABEL, "0 .5 1.2 .1 .1", "1.2 is not between 0 and 1"),
    ("yolo", LABEL, "0 0,5 .5 .1 .1", "'0,5' is no number; write numbers with a point"),
    ("yolo", LABEL, "0 nan .5 .1 .1", "'nan' is no number"),
    ("yolo", LABEL, "cat .5 .5 .1 .1", "the class is 'cat'"),
    ("yolo", LABEL, "0 .5 .5 .1", "4 values"),
    ("yolo", LABEL, b"\xff\xfe0\0 \0", "no text in UTF-8"),
    ("yolo", "images/train/a.png", None, "has no image"),
    ("yolo", "val.txt", "images/val/d.png\nimages/val/gone.png\n", "gone.png does not exist"),
    ("yolo", DESCRIPTION, "", "is empty"),
    ("yolo", DESCRIPTION, "train: images/train\nval: images/val\n", "'names' is None"),
    ("yolo", DESCRIPTION, "names: [cat, no]\ntrain: images/train\n", "class 1 is False"),
    ("yolo", DESCRIPTION, "names: [cat]\nnc: 2\ntrain: images/train\n", "'nc' is 2"),
    ("yolo", DESCRIPTION, "names: [cat]\ntrain: images/tarin\n", "tarin, which does not exist"),
    ("yolo", DESCRIPTION, "names: !!python/object/apply:os.system ['touch ran']\ntrain: images/train\n", "plain YAML"),
    ("yolo", DESCRIPTION, "names: [cat\n", "plain YAML"),
    ("voc", XML, object_(BOX, ""), "object 1 has no <name>"),
    ("voc", XML, object_(BOX.replace(">9<", ">9,5<", 1)), "<xmax> '9,5'; write a number with a point"),
    ("voc", XML, object_(BOX.replace(">9<", ">0<", 1)), "xmin 1, xmax 0"),
    ("voc", XML, object_(BOX.replace(">9<", ">inf<", 1)), "<xmax> 'inf'"),
    ("voc", XML, object_(BOX[:14]), "has no <ymin>"),
    ("voc", XML, "", "is empty"),
    ("voc", XML, object_(BOX)[:60], "no well-formed XML"),
    ("voc", XML, ENTITY + object_(BOX, "<name>&e;</name>"), "document type"),
    ("voc", XML, object_(BOX, "<name>\xe9</name>").encode("latin-1"), "no well-formed XML"),
    ("voc", XML, None, "does not exist"),
    ("voc", "ImageSets/Main/train.txt", "", "lists no image"),
    ("voc", "labelmap.txt", "cat:1,2,3::\n", "class 'dog' is not in"),
    *(
        (layout, file, content, message)
        for layout, file in [
            ("coco", "annotations/instances_train2017.json"), ("roboflow", "train/_annotations.coco.json"),
            ("datumaro", "annotations/instances_Train.json"), ("label_studio", "result.json"),
        ]
        for content, message in [
            ("", "is not JSON"), ("[]", "no list 'images'"), ('{"images": [', "is not JSON"),
            (b"\xff\xfe\0\xd8", "is not JSON"), ({"bbox": "1,5"}, "bbox '1,5'"),
            ({"categories": []}, "'categories' is empty"), ({"category_id": 9}, "category id 9"),
            ({"image_id": 99}, "image id 99"), ({"bbox": [1, 2, float("nan"), 4]}, "bbox"),
            ({"iscrowd": 2}, "iscrowd 2"), ({"images": []}, "'images' is empty"),
        ]
    ),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "file", "content", "message"), BROKEN)
def test_broken_files(layout, file, content, message, copy, tmp_path, capsys, monkeypatch):
    folder = copy(layout)
    monkeypatch.chdir(folder)
    path = folder / file
    if isinstance(content, dict):
        whole = read_json(path)
        if content.keys() <= {"images", "categories"}:
            whole |= content
        else:
            whole["annotations"][0] |= content
        content = json.dumps(whole)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    output = tmp_path / "out"
    assert convert([str(folder), "--output", str(output)]) == 2
    lines = capsys.readouterr().err
    assert lines.count("\n") == 1
    assert message in lines
    assert Path(file).stem in lines
    assert not output.exists()
    assert not (folder / "ran").exists()  # what a tag in YAML would have run
    assert not list(tmp_path.glob(".*"))
