"""Data as other programs write it: what has an exact meaning is read, the rest is said, and --fix keeps objects."""

import copy
import io
import json
import os
import shutil
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, call_main, command, error_line, read_log
from PIL import Image, UnidentifiedImageError
from pycocotools.coco import COCO

from samdetr.datasets.annotations import Annotations
from samdetr.datasets.check.__main__ import main as check
from samdetr.datasets.coco import CocoDetection
from samdetr.datasets.ground_truth import GroundTruth
from samdetr.datasets.images import read_image


def path(data: Path, split: str) -> Path:
    return data / "annotations" / f"instances_{split}2017.json"


def edit(data: Path, change, *splits: str) -> None:
    for split in splits or ("train", "val"):
        content = json.loads(path(data, split).read_text())
        change(content)
        path(data, split).write_text(json.dumps(content))


def image(data: Path, number: int = 1, split: str = "train") -> Path:
    return data / f"{split}2017" / f"{number:012d}.jpg"


def findings(data: Path, *flags: str) -> tuple[int, dict[str, dict]]:
    report = data.parent / "report.json"
    status = check([str(data), "--json", str(report), *flags])
    return status, {f"{f['split']} {f['kind']}": f for f in json.loads(report.read_text())["findings"]}


def fix(data: Path, *flags: str) -> tuple[int, Path]:
    """The exit status, and the folder with the repaired files in place of the others."""
    status = check([str(data), "--fix", str(data.parent / "r.json"), *flags])
    other = data.parent / "repaired"
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(data, other, symlinks=True)
    shutil.move(data.parent / "r.json", path(other, "train"))
    shutil.move(data.parent / "r_val.json", path(other, "val"))
    return status, other


FORMS = {
    "text": str,
    "text of floats": lambda value: f"{value}.0" if type(value) is int else str(value),
    "floats": float,
    "spaces": lambda value: f" {value} ",
}
KEYS = [("images", "id width height"), ("categories", "id"), ("annotations", "id image_id category_id area iscrowd")]


@pytest.mark.parametrize("form", FORMS)
def test_numbers_in_another_form_are_the_same_numbers(form, own_shapes, capsys):
    """Everywhere at once: what training and evaluation read does not change, and --fix keeps every entry."""
    convert = FORMS[form]

    def change(content):
        for name, keys in KEYS:
            for entry in content[name]:
                truth = form == "text of floats"  # of iscrowd only "0" and "1" are exact
                entry |= {key: convert(entry[key]) for key in keys.split() if not (truth and key == "iscrowd")}
        for entry in content["annotations"]:
            entry["bbox"] = [convert(value) for value in entry["bbox"]]

    before = [Annotations.read(path(own_shapes, split)) for split in ("train", "val")]
    edit(own_shapes, change)
    for split, old in zip(("train", "val"), before):
        new = Annotations.read(path(own_shapes, split))
        new.require_valid()
        assert (new.row_of, new.names, new.frames.tolist()) == (old.row_of, old.names, old.frames.tolist())
        for name, values in vars(GroundTruth.from_annotations(old)).items():
            np.testing.assert_array_equal(getattr(GroundTruth.from_annotations(new), name), values)
    status, found = findings(own_shapes)
    assert status == 0
    assert found["train number_form"]["count"] == 16 + 4 + len(before[0].entries)
    status, repaired = fix(own_shapes)
    assert status == 0
    content = json.loads(path(repaired, "train").read_text())
    for name, keys in KEYS:
        for new, old in zip(content[name], before[0].content[name], strict=True):
            assert all(new[key] == old[key] and not isinstance(new[key], str) for key in keys.split())
    assert "train number_form" not in findings(repaired)[1]
    assert call_main(own_shapes, "--epochs", "1") == 0


def test_numbers_that_are_not_exact_are_refused(own_shapes, capsys):
    """A half, a float beyond 2**53, true, digits of other scripts, hexadecimal."""
    for value in (1.5, 2.0**60, True, "\u0661", "0x1", "1e0", "", [1], None):
        content = {"images": [{"id": 1, "file_name": "a"}], "categories": [{"id": 1, "name": "a"}]}
        content["annotations"] = [{"id": 1, "image_id": value, "category_id": 1, "bbox": [1, 2, 3, 4]}]
        assert Annotations(content).image.tolist() == [-1], value
    for box in (["1", "2", "3", "4 px"], ["nan", 1, 1, 1], "1,2,3,4", {"x": 1}, [True, 1, 1, 1]):
        content["annotations"] = [{"image_id": 1, "category_id": 1, "bbox": box}]
        assert not Annotations(content).usable().any(), box
    content["annotations"] = [{"image_id": 1, "category_id": 1, "bbox": "[1, 2.5, 3, 4]"}]
    assert Annotations(content).boxes.tolist() == [[1, 2.5, 3, 4]]


def test_crowds_by_value(own_shapes, capsys):
    """As pycocotools takes numbers; other values are findings, and converted if they have a sense."""
    content = json.loads(path(own_shapes, "val").read_text())
    content["annotations"] = [{**content["annotations"][0], "id": i} for i in range(1, 12)]
    values = [0, 1, True, False, None, "0", "1", 1.0, "no", "true", 7]
    for entry, value in zip(content["annotations"], values):
        entry["iscrowd"] = value
    found = Annotations(content)
    assert found.crowd.tolist() == [False, True, True, False, False, False, True, True, False, False, False]
    assert np.flatnonzero(found.bad_crowd).tolist() == [8, 9, 10]
    path(own_shapes, "val").write_text(json.dumps(content))
    assert call_main(own_shapes, "--epochs", "1") == 2
    assert "annotation id 9 (image id 17) has iscrowd 'no'; it must be 0 or 1" in error_line(capsys.readouterr().err)
    _, repaired = fix(own_shapes, "--allow_loss")
    crowds = {a["id"]: a["iscrowd"] for a in json.loads(path(repaired, "val").read_text())["annotations"]}
    assert (crowds[9], crowds[10], 11 in crowds) == (0, 1, False)


def everything(data: Path):
    """Faults of all kinds at once, more than one of some."""
    edit(data, lambda c: c["categories"].append({"id": 9, "name": "hexagon"}), "val")
    edit(data, lambda c: c["annotations"][0].update(category_id=9), "val")

    def change(c):
        a, i = c["annotations"], c["images"]
        for entry in a[:4]:
            entry.update({key: str(entry[key]) for key in ("image_id", "category_id", "id")})
        a[0]["bbox"], a[1]["iscrowd"], a[2]["area"] = [str(v) for v in a[0]["bbox"]], "0", "-1"
        a[3]["iscrowd"], a[4]["iscrowd"] = "false", "several"
        a[5]["bbox"], a[6]["bbox"], a[7]["bbox"] = [1, 2, float("nan"), 4], [50, 50, 40, 40], [0.1, 0.2, 0.3, 0.4]
        a[8].update(bbox=[30, 30, 60, 60], area=900)
        a[9]["image_id"], a[10]["category_id"] = 999, 777
        a += [copy.deepcopy(a[11]), {**a[12], "bbox": [1, 2, 3, 4]}, None, {**a[13], "bbox": [3, 3, 0, 4], "id": 1001}]
        i[0]["file_name"] = f"train2017\\{i[0]['file_name'].upper()}"
        i[1]["file_name"] = i[1]["file_name"].replace(".jpg", ".png")
        i[2].update(width=70)
        i += [{**i[3], "id": "b17"}, {**i[4], "id": 500}, {"id": 3.5, "file_name": "x"}, {**i[5], "id": 501}]
        i += [{"id": 502, "file_name": "../val2017/000000000017.jpg"}, {"id": 503, "file_name": "e.jpg"}]
        a += [{"id": 2000, "image_id": "b17", "category_id": 1, "bbox": [1, 2, 13, 14]}]
        c["categories"].append(dict(c["categories"][0]))

    edit(data, change, "train")
    image(data, 7).write_bytes(b"")
    shutil.copy(image(data, 17, "val"), image(data, 8))


def test_fix_is_idempotent_over_all_kinds_at_once(own_shapes, capsys):
    everything(own_shapes)
    _, found = findings(own_shapes)
    assert len(found) > 20
    status, once = fix(own_shapes)
    assert status == 3
    said = capsys.readouterr().out
    assert said.index("WARNING: ") < said.index("r.json: train repaired")
    assert "of train (" in said
    first = [json.loads(path(once, split).read_text()) for split in ("train", "val")]
    names = [entry["file_name"] for entry in first[0]["images"]]
    assert {"000000000001.jpg", "000000000002.jpg"} <= set(names)
    assert [c["name"] for c in first[0]["categories"]][-1] == "hexagon"
    assert len(first[0]["annotations"]) >= 29 - 6  # of the original objects only the hopeless went

    kept = own_shapes.rename(own_shapes.with_name("kept"))
    once.rename(own_shapes)
    status, twice = fix(own_shapes)
    assert [json.loads(path(twice, split).read_text()) for split in ("train", "val")] == first
    assert "train unchanged" in capsys.readouterr().out
    left = {kind for kind, f in findings(own_shapes)[1].items() if f["severity"] == "error"}
    assert not left
    assert kept.is_dir()
    assert call_main(own_shapes, "--epochs", "1") == 0


def test_loss_is_said_before_and_by_the_status(own_shapes, capsys):
    """Boxes of 3 of 29 annotations are 10 %; of 1 they are 3 %. Nothing of this is lost by conversion."""
    number = len(json.loads(path(own_shapes, "train").read_text())["annotations"])
    assert number == 29
    edit(own_shapes, lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "train")
    assert fix(own_shapes)[0] == 0
    for row in (1, 2):
        edit(own_shapes, lambda c, row=row: c["annotations"][row].update(bbox=[1, 2, 3]), "train")
    capsys.readouterr()
    assert fix(own_shapes)[0] == 3
    said = capsys.readouterr().out
    assert (
        "WARNING: 3 of the 29 annotations of train (10%) are left out:\n              3  box_entry: boxes that" in said
    )
    assert "pass --allow_loss" in said
    assert fix(own_shapes, "--allow_loss")[0] == 0


@pytest.mark.parametrize("change", ["crowds", "none", "outside"])
def test_a_split_without_objects(change, own_shapes, trained, tmp_path, capsys):
    """Training refuses it; validation has no AP then, hence no best checkpoint, no patience, no point of a curve."""

    def spoil(content):
        for entry in content["annotations"]:
            entry.update({"iscrowd": 1} if change == "crowds" else {"bbox": [99, 0, 9, 9]})
        if change == "none":
            content["annotations"] = []

    edit(own_shapes, spoil, "val")
    output = tmp_path / "output"
    status, found = findings(own_shapes)
    assert (status, found["val no_val_objects"]["severity"]) == (1, "warning")
    if change != "outside":  # pycocotools counts objects outside of the image
        assert call_main(own_shapes, "--epochs", "3", "--patience", "1", "--output_dir", str(output)) == 0
        said = capsys.readouterr().out
        assert "warning: validation split without a single usable object" in said
        assert "epoch 2: " in said
        assert "AP undefined" in said
        assert "best" not in said
        assert len(read_log(output)) == 3
        assert not (output / "checkpoint_best.pth").exists()
        flags = ["--eval", "--resume", str(trained / "checkpoint.pth")]
        assert call_main(own_shapes, *flags, network=[]) == 0
        assert "warning: AP is undefined (-1): " in capsys.readouterr().out
    edit(own_shapes, spoil, "train")
    assert findings(own_shapes)[1]["train no_objects"]["severity"] == "error"
    capsys.readouterr()
    assert call_main(own_shapes, "--epochs", "1") == 2
    assert "annotations is a usable object" in error_line(capsys.readouterr().err)


def test_categories_that_only_validation_has(own_shapes, trained, capsys):
    edit(own_shapes, lambda c: c["categories"].append({"id": 6, "name": "hexagon"}), "val")
    status, found = findings(own_shapes)
    assert (status, found["val unknown_val_category"]["severity"]) == (0, "note")
    evaluation = ["--eval", "--resume", str(trained / "checkpoint.pth")]
    assert call_main(own_shapes, "--epochs", "1") == 0
    assert call_main(own_shapes, *evaluation, network=[]) == 0

    # With an object; and a category of train that has another id in val.
    def change(content):
        content["annotations"][0]["category_id"] = 6
        for entry in (*content["categories"], *content["annotations"]):
            key = "category_id" if "bbox" in entry else "id"
            entry[key] = {1: 2, 2: 1}.get(entry[key], entry[key])

    before = json.loads(path(own_shapes, "val").read_text())
    edit(own_shapes, change, "val")
    assert findings(own_shapes)[1]["val categories_differ"]["count"] == 3
    for flags, network in (["--epochs", "1"], TINY), (evaluation, []):
        capsys.readouterr()
        assert call_main(own_shapes, *flags, network=network) == 2
        assert "id 6 is 'hexagon' in the file and 'absent' in the model" in error_line(capsys.readouterr().err)
    status, repaired = fix(own_shapes)
    assert status == 1  # the category is never seen in training
    after = json.loads(path(repaired, "val").read_text())
    expected = [6, *(a["category_id"] for a in before["annotations"][1:])]
    assert [a["category_id"] for a in after["annotations"]] == expected
    assert {c["id"]: c["name"] for c in after["categories"]}[1] == "ellipse"
    assert call_main(repaired, "--epochs", "1") == 0


def test_names_that_are_nearly_those_of_the_files(own_shapes, capsys):
    """Unicode form, case, prefix, backslash, ending: each is proposed, and repaired because it is unambiguous."""
    names = {1: "caf\u00e9.jpg", 2: "B.jpg", 3: "c.jpg", 4: "sub/d.jpg", 5: "e.jpg", 6: "f.jpg"}
    listed = {1: "cafe\u0301.jpg", 2: "b.JPG", 3: "train2017/c.jpg", 4: "sub\\d.jpg", 5: "e.jpeg", 6: "/home/me/f.jpg"}
    (own_shapes / "train2017" / "sub").mkdir()
    for number, name in names.items():
        image(own_shapes, number).rename(own_shapes / "train2017" / name)

    def rename(content):
        for number, name in listed.items():
            content["images"][number - 1]["file_name"] = name

    edit(own_shapes, rename, "train")
    for flags in ((), ("--short",)):
        status, found = findings(own_shapes, *flags)
        assert {k: f["count"] for k, f in found.items() if f["severity"] != "note"} == {"train image_name": 6}
        items = "\n".join(found["train image_name"]["items"])
        assert r"'cafe\u0301.jpg' (image id 1): there is no such file, but the folder holds 'café.jpg'" in items
        assert r"'sub\\d.jpg' (image id 4): there is no such file, but the folder holds 'sub/d.jpg'" in items
    capsys.readouterr()
    assert call_main(own_shapes, "--epochs", "1") == 2
    line = error_line(capsys.readouterr().err)
    assert "1 file names leave the image folder" in line
    assert "'/home/me/f.jpg' (image id 6), but the folder holds 'f.jpg'" in line
    status, repaired = fix(own_shapes)
    assert status == 0
    content = json.loads(path(repaired, "train").read_text())
    assert [content["images"][number - 1]["file_name"] for number in names] == list(names.values())
    assert len(content["annotations"]) == 29

    # What two files may be is neither, and in validation the reader says what is there.
    for name in ("X.jpg", "x.JPG"):
        shutil.copy(image(own_shapes, 17, "val"), own_shapes / "val2017" / name)
    edit(own_shapes, lambda c: c["images"][0].update(file_name="x.jpg"), "val")
    assert "val missing_image" in findings(own_shapes)[1]
    edit(own_shapes, lambda c: [c["images"][n - 1].update(file_name=name) for n, name in names.items()], "train")
    capsys.readouterr()
    assert call_main(own_shapes, "--epochs", "1") == 2
    assert "'x.jpg' (image id 17), but the folder holds 'X.jpg' and 'x.JPG'" in error_line(capsys.readouterr().err)


def test_only_regular_files_inside_the_folder_are_opened(own_shapes, capsys):
    links = {2: "/dev/zero", 3: "nowhere.jpg", 4: str(own_shapes)}
    for number in (1, 2, 3, 4):
        image(own_shapes, number).unlink()
    os.mkfifo(image(own_shapes, 1))
    for number, target in links.items():
        image(own_shapes, number).symlink_to(target)
    edit(own_shapes, lambda c: c["images"][4].update(file_name="../train2017/000000000005.jpg"), "train")
    for flags in ((), ("--short",)):
        begin = time.monotonic()
        _, found = findings(own_shapes, *flags)
        assert time.monotonic() - begin < 3
        assert found["train special_file"]["count"] == 3
        kinds = " ".join(found["train special_file"]["items"])
        assert all(f"it is a {kind}, not a regular file" in kinds for kind in ("named pipe", "device", "folder"))
        assert "it is a link to 'nowhere.jpg', which does not exist" in found["train missing_image"]["items"][0]
        assert found["train image_name"]["count"] == 1
    assert "train image_name" not in findings(own_shapes, "--allow_outside")[1]
    run = ["--epochs", "1", "--max_bad_images", "0.5"]
    capsys.readouterr()
    assert call_main(own_shapes, *run) == 2
    assert "--allow_outside" in error_line(capsys.readouterr().err)
    for flags in ([], ["--cache_mode"]):
        assert call_main(own_shapes, *run, "--allow_outside", *flags) == 0
    file = path(own_shapes, "train")
    for make, said in ((os.mkfifo, "it is a named pipe"), (os.mkdir, "it is a folder")):
        file.rename(file.with_suffix(".kept"))
        make(file)
        capsys.readouterr()
        assert call_main(own_shapes) == 2
        assert said in error_line(capsys.readouterr().err)
        file.rename(file.with_suffix(f".{make.__name__}"))
        file.with_suffix(".kept").rename(file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"images": [' + "[" * 700 + "]" * 700 + '], "annotations": [], "categories": []}', "needs an integer 'id'"),
        ('{"images": ' + "9" * 5000 + "}", "is not JSON"),
        ('{"images": [{"id": 1' + "0" * 400 + ', "file_name": "a"}], "annotations": [], "categories": []}', "64 bits"),
    ],
)
def test_json_of_attackers(text, said, own_shapes, capsys):
    path(own_shapes, "train").write_text(text.replace('"categories": []', '"categories": [{"id": 1, "name": "a"}]'))
    assert call_main(own_shapes) == 2
    assert said in error_line(capsys.readouterr().err)


def test_lone_surrogates_are_shown_escaped(own_shapes, forks, tmp_path):
    def change(content):
        content["categories"][0]["name"] = "a\ud800"
        content["images"][1]["file_name"] = "b\udfff.jpg"

    edit(own_shapes, lambda c: c["categories"][0].update(name="a\ud800"), "val")
    edit(own_shapes, change, "train")
    _, found = findings(own_shapes)
    assert r"'b\udfff.jpg' (image id 2): " in found["train unreadable_image"]["items"][0]
    _, *words = command(own_shapes, "--epochs", "1", "--max_bad_images", "0.5")
    assert forks.main(words, tmp_path / "printed") == [0]  # into a file, which encodes
    assert r"a\ud800" in forks.out()


def exif_block(orientation: int, order: str = "<", broken: bytes = b"") -> bytes:
    """An Exif block with one readable tag, and what follows it."""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8)
    tag = struct.pack(f"{order}HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"Exif\0\0" + head + struct.pack(f"{order}H", 1 + bool(broken)) + tag + broken


def test_exif_that_pillow_cannot_read_costs_no_image():
    """The tag that turns is read where it can be; otherwise the image is as stored."""
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:2, :4] = 255  # top left
    rational = struct.pack("<HHII", 0x011A, 5, 1, 90) + bytes(4)  # a resolution whose value lies beyond the block
    for block, place in [
        (exif_block(1), (1, 1)),
        (exif_block(6), (3, 1)),  # a quarter clockwise: 4 wide, 8 high, white at the top right
        (exif_block(6, ">"), (3, 1)),
        (exif_block(6, "<", rational), (3, 1)),
        (exif_block(9), (1, 1)),
        (b"Exif\0\0II*\0\xff\xff\xff\xff", (1, 1)),
        (b"Exif\0\0no TIFF", (1, 1)),
        (b"Exif\0\0", (1, 1)),
    ]:
        for form in ("JPEG", "PNG", "WEBP"):
            stream = io.BytesIO()
            quality = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}}.get(form, {})
            Image.fromarray(pixels).save(stream, form, exif=block, **quality)
            found = read_image(io.BytesIO(stream.getvalue()))
            assert found.size == ((4, 8) if place == (3, 1) else (8, 4)), (block, form)
            assert min(found.getpixel(place)) > 200
            assert max(found.getpixel((0, found.height - 1))) < 60


def test_a_jpeg_that_pillow_does_not_recognise_for_its_exif(monkeypatch):
    """Rare, so planted: of 1500 blocks with random faults 6 are such. The image comes without its tag."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 4), "white").save(stream, "JPEG", exif=exif_block(6))
    pillows = Image.open

    def choking(file, **how):
        if b"Exif" in file.read():
            raise UnidentifiedImageError
        file.seek(0)
        return pillows(file, **how)

    monkeypatch.setattr(Image, "open", choking)
    found = read_image(io.BytesIO(stream.getvalue()))
    assert (found.size, found.getpixel((1, 1))) == ((8, 4), (255, 255, 255))


def test_grey_of_12_and_16_bits(own_shapes):
    """The upper 8 bits, in every format; a finding if less than a sixteenth of the range is used."""
    values = np.array([[0, 255, 256], [4095, 32768, 65535]], np.uint16)
    expected = [[0, 0, 1], [15, 128, 255]]
    streams = {form: io.BytesIO() for form in ("PNG", "TIFF")}
    for form, stream in streams.items():
        Image.fromarray(values).save(stream, form)
    files = {form: stream.getvalue() for form, stream in streams.items()}
    files["PGM"] = b"P5 3 2 65535\n" + values.astype(">u2").tobytes()
    for form, content in files.items():
        assert np.asarray(read_image(io.BytesIO(content)))[..., 0].tolist() == expected, form
    # A TIFF of 4 x 1 pixels that declares 12 bits: 0, 16, 2048, 4095, of which the upper 8 are 0, 1, 128, 255.
    data = bytes.fromhex("000010800fff")
    tags = {256: 4, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: len(data)}
    entries = b"".join(
        struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags.items()
    )
    tiff = b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)
    assert np.asarray(read_image(io.BytesIO(tiff)))[0, :, 0].tolist() == [0, 1, 128, 255]

    def change(content):
        for number in (0, 1):
            content["images"][number]["file_name"] = f"{number}.png"

    for number, largest in enumerate((4095, 4096)):
        image(own_shapes, number + 1).unlink()
        grey = np.linspace(0, largest, 64 * 64).astype(np.uint16).reshape(64, 64)
        Image.fromarray(grey).save(own_shapes / "train2017" / f"{number}.png")
    edit(own_shapes, change, "train")
    items = findings(own_shapes)[1]["train narrow_range"]["items"]
    assert items == ["'0.png' (image id 1)"]


def test_images_of_too_many_pixels_and_of_formats_that_are_not_listed(own_shapes, monkeypatch):
    monkeypatch.setattr("samdetr.datasets.images.MAX_PIXELS", 64 * 64 - 1)
    _, found = findings(own_shapes)
    assert found["val huge_image"]["count"] == 7
    assert "it has 64 x 64 pixels, more than 4,095 in all" in found["val huge_image"]["items"][0]
    monkeypatch.undo()
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\nshowpage\n"
    image(own_shapes, 1).write_bytes(postscript)  # Pillow would start another program
    assert "no image that PIL knows" in findings(own_shapes)[1]["train unreadable_image"]["items"][0]


def test_what_pycocotools_reads_of_numbers_as_floats(own_shapes):
    """Its lookups take 1.0 for 1, so we must."""
    edit(own_shapes, lambda c: [a.update(image_id=float(a["image_id"])) for a in c["annotations"]], "val")
    theirs = COCO(str(path(own_shapes, "val")))
    dataset = CocoDetection(
        image_folder=own_shapes / "val2017", annotation_file=path(own_shapes, "val"), train=False,
        transforms=lambda picture, target: (torch.zeros(3, 64, 64), target),
    )  # fmt: skip
    for index, record in enumerate(dataset.images):
        theirs_here = [a for a in theirs.imgToAnns[record.id] if not a["iscrowd"]]
        assert len(dataset[index][1]["labels"]) == len(theirs_here)
