"""python -m datasets.check: each fault, planted alone, is found alone; what --fix writes is clean."""

import json
import math
import shutil
from pathlib import Path

import pytest
from PIL import Image

from samdetr.datasets import settings
from samdetr.datasets.build import build_dataset, read_split
from samdetr.datasets.check.__main__ import main as check
from samdetr.datasets.check.start import check_loaded, start_lines
from samdetr.datasets.shapes import write_dataset

SHARED_DATA = Path(__file__).parents[1].parent / "shared" / "data"
CLEAN = {"ids_with_gaps", "empty_image"}  # notes: category 4 is left out, image 13 is empty


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    """Twenty drawn images to train on and eight to validate on, 64 pixels wide and 48 high, as PNG."""
    folder = tmp_path_factory.mktemp("check") / "shapes"
    write_dataset(folder, num_train=20, num_val=8, size=64, seed=0)
    for split in ("train", "val"):
        file = folder / "annotations" / f"instances_{split}2017.json"
        content = json.loads(file.read_text())
        for entry in content["images"]:  # by a strip that may hold parts of objects: no fault of the boxes
            old = folder / f"{split}2017" / entry["file_name"]
            entry["file_name"] = f"{entry['id']}.png"
            with Image.open(old) as image:
                canvas = Image.new("RGB", (80, 64), (entry["id"], 0, 0))
                canvas.paste(image)
                canvas.save(old.with_name(entry["file_name"]))
            old.unlink()
            entry["width"] = 80
        file.write_text(json.dumps(content))
    return folder


@pytest.fixture
def data(clean, tmp_path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "shapes"))


class Data:
    """A data set to spoil, with the content of both annotation files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.train, self.val = (json.loads(self.file(split).read_text()) for split in ("train", "val"))
        self.images, self.annotations = self.train["images"], self.train["annotations"]
        self.object = next(a for a in self.annotations if not a["iscrowd"])
        self.objects = [a for a in self.annotations if not a["iscrowd"]]

    def file(self, split: str) -> Path:
        return self.root / "annotations" / f"instances_{split}2017.json"

    def path(self, number: int = 0, split: str = "train") -> Path:
        return self.root / f"{split}2017" / getattr(self, split)["images"][number]["file_name"]

    def write(self) -> None:
        for split in ("train", "val"):
            self.file(split).write_text(json.dumps(getattr(self, split)))


def run(root: Path, *flags: str, short: bool = False) -> tuple[int, dict[str, dict]]:
    """Exit status, and what is found beyond the notes of the clean data: by kind, warnings and errors by name alone."""
    report = root.parent / "report.json"
    status = check([str(root), "--json", str(report), *flags, *(["--short"] if short else [])])
    findings = json.loads(report.read_text())["findings"]
    found = {finding["kind"]: finding for finding in findings if finding["kind"] not in CLEAN}
    assert status == int(any(finding["severity"] != "note" for finding in findings))
    return status, found


def test_clean_data(data, capsys):
    assert run(data) == (0, {})
    assert run(data, short=True) == (0, {})
    assert "kinds of errors: 0, warnings: 0, notes: 3" in capsys.readouterr().out


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="../shared/data with real images is not here")
@pytest.mark.parametrize("name", ["coco_tiny", "bccd"])
def test_real_data_is_clean(name, tmp_path):
    report = tmp_path / "report.json"
    assert check([str(SHARED_DATA / name), "--short", "--json", str(report)]) == 0
    content = json.loads(report.read_text())
    assert content["counts"] == {"error": 0, "warning": 0, "note": 2}
    assert {finding["kind"] for finding in content["findings"]} == {"ids_with_gaps"}


def spoil_file(change):
    def apply(data: Data):
        data.path().write_bytes(change(data.path().read_bytes()))

    return apply


def set_box(*box, **other):
    return lambda data: data.object.update(bbox=list(box), **other)


def new_annotation(data: Data, **values):
    number = max(a["id"] for a in data.annotations) + 1
    data.annotations.append({**data.object, "id": number, **values})


def save(path: Path, *, exif: int | None = None, size=(80, 64)):
    tags = Image.Exif()
    if exif:
        tags[0x0112] = exif
    with Image.open(path) as image:
        image.resize(size).save(path, exif=tags)


def copy_to_val(data: Data):
    """The same pixels in another format."""
    with Image.open(data.path()) as image:
        image.save(data.path(split="val"), compress_level=1)
    data.path(split="val").write_bytes(data.path(split="val").read_bytes() + b"unlike")


def all_boxes(convert):
    def apply(data: Data):
        for annotation in data.annotations:
            annotation["bbox"] = convert(*annotation["bbox"])

    return apply


def crowd_only(data: Data):
    for annotation in data.annotations:
        if annotation["image_id"] == data.object["image_id"]:
            annotation["iscrowd"] = 1


def one_category(data: Data):
    for content in (data.train, data.val):
        content["categories"] = content["categories"][:1]
        for annotation in content["annotations"]:
            annotation["category_id"] = 1


def only_in_val(data: Data):
    data.annotations[:] = [a for a in data.annotations if a["category_id"] != 5]
    kept = {a["image_id"] for a in data.annotations}
    data.images[:] = [image for image in data.images if image["id"] in kept]
    for path in (data.root / "train2017").iterdir():
        if int(path.stem) not in kept:
            path.unlink()


def damage_png(content: bytes) -> bytes:
    place = content.index(b"IDAT") + 4
    return content[:place] + bytes(200) + content[place + 200 :]


def shift_ids(data: Data):
    for annotation in data.annotations:
        annotation["id"] -= 1


# Fault, what is found, how often, a part of the first example, and how much fewer images and annotations --fix leaves
# (None: the annotation file cannot repair it, or it needs no repair). The first image has one annotation.
FAULTS = {
    "missing": (lambda d: d.path().unlink(), "missing_image", 1, "'1.png' (image id 1)", (1, 1)),
    "zero bytes": (spoil_file(lambda content: b""), "zero_byte_image", 1, "'1.png' (image id 1)", (1, 1)),
    "truncated": (spoil_file(lambda content: content[: len(content) // 2]), "truncated_image", 1, "'1.png'", (1, 1)),
    "barely begun": (spoil_file(lambda content: content[:5]), "truncated_image", 1, "'1.png'", (1, 1)),
    "no image": (spoil_file(lambda content: b"no image"), "unreadable_image", 1, "no image that PIL knows", (1, 1)),
    "damaged": (spoil_file(damage_png), "unreadable_image", 1, "'1.png' (image id 1): ", (1, 1)),
    "unlisted": (lambda d: shutil.copy(d.path(), d.root / "train2017" / "other.JPG"), "unlisted_image", 1, "", None),
    "size": (lambda d: d.images[0].update(width=70), "image_size", 1, "70 x 64 in the annotation file", (0, 0)),
    "size swapped": (lambda d: d.images[0].update(width=64, height=80), "image_size", 1, "64 x 80", (0, 0)),
    "file shrunk": (lambda d: save(d.path(), size=(10, 8)), "image_size", 1, "10 x 8 in the image file", (1, 1)),
    "EXIF, stored size": (lambda d: save(d.path(), exif=6), "exif_size", 1, "'1.png'", None),
    "EXIF, other size": (
        lambda d: (save(d.path(), exif=8), d.images[0].update(width=50)), "image_size", 1, "64 x 80 in the", (0, 0)
    ),
    "EXIF, upright size": (
        lambda d: (save(d.path(), exif=6), d.images[0].update(width=64, height=80)), "exif_turned", 1, "'1.png'", None
    ),
    "image in train and val": (copy_to_val, "shared_image", 1, "train '1.png', val '21.png'", (1, 1)),
    "same pixels twice": (lambda d: shutil.copy(d.path(0), d.path(1)), "repeated_image", 1, "'1.png', '2.png'", None),
    "image id twice": (lambda d: d.images.append({**d.images[0]}), "duplicate_image_id", 1, "image id 1: ", (1, 0)),
    "file name twice": (
        lambda d: (d.images.append({**d.images[0], "id": 99}), new_annotation(d, image_id=99)),
        "duplicate_file_name", 1, "'1.png': image ids 1, 99", (1, 1),
    ),
    "annotation id twice": (
        lambda d: new_annotation(d, id=d.annotations[3]["id"]), "duplicate_annotation_id", 1, "annotation id 4", (0, 0)
    ),
    "annotation twice": (
        lambda d: d.annotations.append(d.annotations[3]), "duplicate_annotation_id", 1, "annotation id 4", (0, 1)
    ),
    "category twice": (
        lambda d: d.train["categories"].append(d.train["categories"][0]), "duplicate_category_id", 1, "id 1", (0, 0)
    ),
    "category without name": (lambda d: d.train["categories"].append({"id": 4}), "category_entry", 1, "4", (0, 0)),
    "image without id": (lambda d: d.images.append({"id": 1}), "image_entry", 1, "{'id': 1}", (1, 0)),
    "name of no file": (
        lambda d: (d.path().unlink(), d.images[0].update(file_name="a\0b")), "unreadable_image", 1, "null", (1, 1)
    ),
    "no annotation": (lambda d: d.annotations.append(None), "annotation_entry", 1, "None", (0, 1)),
    "unknown image": (lambda d: new_annotation(d, image_id=777), "unknown_image", 1, "(image id 777)", (0, 1)),
    "unknown category": (lambda d: new_annotation(d, category_id=4), "unknown_category", 1, "category id 4", (0, 1)),
    "too many objects": (
        lambda d: [new_annotation(d) for _ in range(300)], "too_many_objects", 1, "image id 1 ", None
    ),
    "ids from 0": (shift_ids, "ids_from_zero", 1, "annotation ids start at 0", None),
    "no annotation ids": (lambda d: [a.pop("id") for a in d.annotations], "no_annotation_id", None, "None", None),
    "box of three": (set_box(1, 2, 3), "box_entry", 1, "[1, 2, 3]", (0, 1)),
    "box of text": (set_box(1, 2, 3, "4 px"), "box_entry", 1, "'4 px'", (0, 1)),
    "no box": (lambda d: d.object.pop("bbox"), "box_entry", 1, "None", (0, 1)),
    "NaN": (set_box(1, math.nan, 3, 4), "box_not_finite", 1, "nan", (0, 1)),
    "infinity": (set_box(1, 2, math.inf, 4), "box_not_finite", 1, "inf", (0, 1)),
    "beyond all numbers": (set_box(1, 2, 10**400, 4), "box_not_finite", 1, "1000", (0, 1)),
    "negative": (set_box(30, 30, -3, 4), "box_negative_size", 1, "-3", (0, 1)),
    "zero": (set_box(30, 30, 3, 0), "box_zero_size", 1, "0]", (0, 1)),
    "outside": (set_box(80, 5, 3, 4), "box_outside", 1, "in 80 x 64 pixels", (0, 1)),
    "outside at the left": (set_box(-5, 5, 4, 4), "box_outside", 1, "", (0, 1)),
    "partly outside": (set_box(60, 10, 25, 20), "box_partly_outside", 1, "[60, 10, 25, 20]", (0, 0)),
    "above": (set_box(60, -3, 15, 20), "box_partly_outside", 1, "", (0, 0)),
    "all as corners": (all_boxes(lambda x, y, w, h: [x, y, x + w, y + h]), "box_xyxy", None, "", (0, 0)),
    "one as corners": (set_box(50, 40, 76, 60, area=26 * 20), "box_xyxy", 1, "", (0, 0)),
    "one as corners, with a polygon": (
        set_box(50, 40, 76, 60, area=200, segmentation=[[50, 40, 76, 60, 51, 59]]), "box_xyxy", 1, "", (0, 0)
    ),
    "all as fractions": (
        all_boxes(lambda x, y, w, h: [x / 80, y / 64, w / 80, h / 64]), "box_normalised", None, "", (0, 0)
    ),
    "one in fractions": (set_box(0.25, 0.5, 0.125, 0.25), "box_normalised", 1, "", (0, 0)),
    "area 0": (lambda d: d.object.update(area=0), "area", 1, "area 0", (0, 0)),
    "area NaN": (lambda d: d.object.update(area=math.nan), "area", 1, "area nan", (0, 0)),
    "area of text": (lambda d: d.object.update(area="20 px"), "area", 1, "area '20 px'", (0, 0)),
    "area too large": (lambda d: d.object.update(area=4000), "area", 1, "area 4000", (0, 0)),
    "area too small": (lambda d: d.object.update(area=1), "area", 1, "area 1", (0, 0)),
    "crowds alone": (crowd_only, "crowd_only_image", 1, "image id 1 ", None),
    "single class": (one_category, "single_class", 1, "'ellipse'", None),
    "unused category": (
        lambda d: [c["categories"].append({"id": 6, "name": "cat"}) for c in (d.train, d.val)], "unused_category", 1,
        "6: 'cat'", None,
    ),
    "category only in val": (only_in_val, "category_only_in_val", 1, "5: 'star'", None),
    "no sizes": (lambda d: [(i.pop("width"), i.pop("height")) for i in d.images], "no_image_size", 20, "1.png", None),
}  # fmt: skip
NEEDS_DECODING = {"damaged", "EXIF, stored size", "image in train and val", "same pixels twice", "EXIF, upright size"}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found_alone(name, data):
    plant, kind, count, example, cost = FAULTS[name]
    spoilt = Data(data)
    images, annotations = len(spoilt.images), len(spoilt.annotations)
    plant(spoilt)
    images, annotations = max(images, len(spoilt.images)), max(annotations, len(spoilt.annotations))
    spoilt.write()
    status, found = run(data)
    assert set(found) == {kind}
    assert found[kind]["count"] == (len(spoilt.annotations) if count is None else count)
    assert example in found[kind]["items"][0]
    assert (found[kind]["repair"] is None) == (cost is None)
    if name not in NEEDS_DECODING:
        assert {k: v["count"] for k, v in run(data, short=True)[1].items()} == {k: v["count"] for k, v in found.items()}
    if cost is None:
        return

    out = data.parent / "fixed.json"
    before = spoilt.file("train").read_bytes()
    assert check([str(data), "--fix", str(out)]) == 0
    assert spoilt.file("train").read_bytes() == before
    fixed = json.loads(out.read_text())
    assert (images - len(fixed["images"]), annotations - len(fixed["annotations"])) == cost
    out.rename(spoilt.file("train"))
    out.with_name("fixed_val.json").rename(spoilt.file("val"))
    status, found = run(data)
    assert status == 0
    assert set(found) <= {"removed_image", "exif_turned"}


def fixed(data: Data, tmp_path: Path, *flags: str) -> dict:
    data.write()
    out = tmp_path / "fixed.json"
    assert check([str(data.root), "--split", "train", "--fix", str(out), *flags]) == 0
    return json.loads(out.read_text())


@pytest.mark.parametrize(
    "convert",
    [
        lambda x, y, w, h: [x, y, x + w, y + h],
        lambda x, y, w, h: [x / 80, y / 64, w / 80, h / 64],
        lambda x, y, w, h: [x / 80, y / 64, (x + w) / 80, (y + h) / 64],
        lambda x, y, w, h: [(x + w / 2) / 80, (y + h / 2) / 64, w / 80, h / 64],
    ],
    ids=["corners", "fractions", "corners in fractions", "centres in fractions"],
)
def test_boxes_in_another_form_become_what_they_were(convert, data, tmp_path):
    spoilt = Data(data)
    before = json.loads(json.dumps(spoilt.annotations))
    all_boxes(convert)(spoilt)
    after = fixed(spoilt, tmp_path)["annotations"]
    for old, new in zip(before, after, strict=True):
        assert new["bbox"] == pytest.approx(old["bbox"], abs=1e-9)
        assert new["area"] == old["area"]


def test_corners_in_the_images_of_one_source(data, tmp_path):
    """In two of twenty images, where a box tells by its area; the other box of the second is small and inside."""
    spoilt = Data(data)
    spoilt.annotations.extend(
        {**spoilt.object, "id": 100 + i, "image_id": 13, "bbox": box, "area": area}
        for i, (box, area) in enumerate([([50, 40, 26, 20], 300), ([5, 6, 10, 12], 90)])
    )
    wanted = json.loads(json.dumps(spoilt.annotations))
    for annotation in spoilt.annotations:
        if annotation["image_id"] in (13, 19):  # image 19 has [39, 17, 22, 29] alone
            x, y, w, h = annotation["bbox"]
            annotation["bbox"] = [x, y, x + w, y + h]
    spoilt.write()
    assert {kind: found["count"] for kind, found in run(data)[1].items()} == {"box_xyxy": 3}
    assert fixed(spoilt, tmp_path)["annotations"] == wanted


def test_what_fix_makes_of_single_boxes_and_images(data, tmp_path):
    spoilt = Data(data)
    first, second, third = spoilt.objects[:3]
    first.update(bbox=[70, -2, 20, 12], area=240)
    second.update(area=-1)
    spoilt.images[1]["width"] = 75  # of the image of the second and the third
    spoilt.images.append({**spoilt.images[0], "id": 99})
    new_annotation(spoilt, image_id=99, bbox=[1, 2, 3, 4], area=12)
    spoilt.path(4).write_bytes(b"")
    content = fixed(spoilt, tmp_path, "--allow_loss")
    by_id = {annotation["id"]: annotation for annotation in content["annotations"]}
    assert by_id[first["id"]] == {**first, "bbox": [70, 0, 10, 10], "area": 100}
    assert by_id[second["id"]]["area"] == second["bbox"][2] * second["bbox"][3]
    assert by_id[third["id"]] == third
    assert by_id[36] == {**spoilt.annotations[-1], "image_id": 1}
    assert content["images"][1] == {**spoilt.images[1], "width": 80}
    assert content["removed_images"] == [{"file_name": "5.png", "reason": "zero_byte_image"}]
    assert {**content["info"]} == spoilt.train["info"]


def test_boxes_that_look_odd_but_are_right(data):
    """Objects that fill their images, thin masks, boxes that end a rounding error outside."""
    spoilt = Data(data)
    for annotation in spoilt.annotations:
        annotation.update(bbox=[2, 1, 78.9, 63.9], area=4900)
    spoilt.annotations[0].update(area=80, segmentation=[[2, 1, 80, 63, 80, 65]])
    spoilt.annotations[1].update(bbox=[0, 0, 1, 1], area=1)
    spoilt.write()
    assert run(data) == (0, {})


def test_the_check_at_the_start_reads_nothing_again(data):
    """It needs neither annotation files nor images: both are gone by then. Notes are left out."""
    spoilt = Data(data)
    spoilt.object.update(area=0)
    spoilt.write()
    spoilt.path(2).write_bytes(b"")
    loaded = []
    for split in ("train", "val"):
        annotations = read_split(split, settings.Data(coco_path=str(data)))
        loaded.append(
            (annotations, build_dataset(split, settings.Data(coco_path=str(data)), annotations=annotations), split)
        )
    shutil.rmtree(data)
    checked = [check_loaded(read, dataset, split=split, num_queries=1) for read, dataset, split in loaded]
    crowded = [sum(annotations.objects_per_image() > 1) for annotations, _, _ in loaded]
    lines = start_lines(checked, data)
    assert lines[0] == (
        "data, train: error: image files without any content: 1, such as '3.png' (image id 3): the file is empty"
    )
    for (annotations, _, split), number, line in zip(loaded, crowded, lines[1:4:2]):
        assert f"data, {split}: warning: images with more objects than queries" in line
        most = annotations.objects_per_image()  # the largest is named
        name = f"image id {annotations.images[most.argmax()]['id']} "
        assert f": {number}, such as {name}" in line
        assert f"{most.max()} objects, 1 queries" in line
    assert (
        "data, train: warning: areas that are not positive or do not fit the box: 1, such as annotation id" in lines[2]
    )
    assert lines[4].startswith(f"python -m datasets.check {data} ")
    assert len(lines) == 5
    assert start_lines([], data) == []


def test_faults_of_both_splits_and_what_cannot_be_repaired(data, capsys):
    spoilt = Data(data)
    spoilt.objects[0]["bbox"] = [1, 2, 0, 3]
    spoilt.val["annotations"][0]["bbox"] = None
    spoilt.write()
    shutil.copy(spoilt.path(), data / "train2017" / "new.png")
    out = data.parent / "out.json"
    assert check([str(data), "--fix", str(out), "--allow_loss"]) == 1
    assert "left after repairs" in capsys.readouterr().out
    assert len(json.loads(out.read_text())["annotations"]) == len(spoilt.annotations) - 1
    fixed_val = json.loads(out.with_name("out_val.json").read_text())
    assert len(fixed_val["annotations"]) == len(spoilt.val["annotations"]) - 1
    (data / "train2017" / "new.png").unlink()
    assert check([str(data), "--fix", str(out), "--allow_loss"]) == 0
    assert check([str(data), "--split", "val", "--fix", str(out), "--allow_loss"]) == 0
    assert json.loads(out.read_text()) == fixed_val


def test_what_cannot_be_checked(data, tmp_path, capsys):
    def refused(*flags: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert check(list(flags)) == 2
        assert sorted(tmp_path.rglob("*")) == before
        captured = capsys.readouterr()
        assert captured.err.startswith("python -m datasets.check: error: ")
        assert captured.err.count("\n") == 1
        return captured.err

    train = data / "annotations" / "instances_train2017.json"
    assert f"{tmp_path}/none does not exist" in refused(str(tmp_path / "none"))
    assert "neither train2017/ nor val2017/" in refused(str(data / "annotations"))
    assert f"--fix {train} is the annotation file of train itself" in refused(str(data), "--fix", str(train))
    assert "--fix nowhere/out.json cannot be written" in refused(str(data), "--fix", "nowhere/out.json")
    assert "--json . cannot be written" in refused(str(data), "--json", ".")
    content = train.read_text()
    train.write_text(content[:-5])
    assert f"{train} is not JSON" in refused(str(data))
    train.unlink()
    assert f"{train} does not exist" in refused(str(data))
    train.write_text(content)
    for image in (data / "train2017").iterdir():
        image.write_bytes(b"")
    assert "no image of train would be left" in refused(str(data), "--fix", str(tmp_path / "out.json"))
    shutil.rmtree(data / "train2017")
    assert f"image folder {data}/train2017 does not exist" in refused(str(data))
    train.unlink()
    assert check([str(data)]) == 0
    assert "no_split" in capsys.readouterr().out
