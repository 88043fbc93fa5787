"""What tells a user early that data or settings are wrong: `--overfit` and `check --draw`."""

import json
import re

import numpy as np
import pytest
from helpers import TINY, call_main, call_program
from PIL import Image

from samdetr.datasets.annotations import Annotations
from samdetr.datasets.check.__main__ import main as check
from samdetr.training import overfit


def test_overfit_says_that_a_run_can_learn_or_not(shapes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(overfit, "STEPS", 25)
    flags = ["--batch_size", "2", "--lr_backbone", "1e-3", "--output_dir", str(tmp_path / "kept"), "--verbose"]
    assert call_main(shapes, "--overfit", "1", "--lr", "1e-3", *flags) == 0
    shown = capsys.readouterr().out
    found = re.search(
        r"overfit: AP50 (\S+) on the 1 image\(s\) it was trained on, after (\d+) steps: .* can learn", shown
    )
    assert float(found[1]) >= 0.9
    assert int(found[2]) < 375  # it ends as soon as it has learned
    assert "1 images to train on, 1 images to evaluate on" in shown
    assert call_main(shapes, "--overfit", "1", "--lr", "0", *flags, "--epochs", "1") == 1
    assert re.search(r"overfit: AP50 0\.\d+ .* after 25 steps: less than 0.9", capsys.readouterr().out)
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--overfit", "17"], ["--overfit 17", "15"]),  # of 16 images one is empty
        (["--overfit", "2", "--resume", "x.pth"], ["--overfit", "--resume", "--pretrained"]),
        (["--overfit", "-1"], ["--overfit -1"]),
    ],
)
def test_overfit_refuses(shapes, capsys, flags, expected):
    assert call_program("--coco_path", str(shapes), *TINY, "--num_workers", "0", "--device", "cpu", *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(text in error for text in expected)


def test_few_images_keep_all_their_annotations(shapes):
    whole = Annotations.read(shapes / "annotations" / "instances_train2017.json")
    few = overfit.subset(whole, 3, without=[0])
    ids = [entry["id"] for entry in few.images]
    assert len(set(ids)) == 3
    assert whole.images[0]["id"] not in ids
    assert few.entries == [entry for entry in whole.entries if entry["image_id"] in ids]
    assert np.all(few.objects_per_image() > 0)


def test_drawn_boxes_lie_where_training_has_them(tmp_path, capsys):
    """A white square on black in the left half: its frame surrounds it as read and after each transform."""
    data = tmp_path / "data"
    for split in ("train", "val"):
        (data / f"{split}2017").mkdir(parents=True)
        (data / "annotations").mkdir(exist_ok=True)
        picture = np.zeros((400, 400, 3), np.uint8)
        picture[100:200, 40:140] = 255
        Image.fromarray(picture).save(data / f"{split}2017" / "a.png")
        content = {
            "images": [{"id": 7, "file_name": "a.png", "width": 400, "height": 400}],
            "categories": [{"id": 1, "name": "square"}],
            "annotations": [{"id": 1, "image_id": 7, "category_id": 1, "bbox": [40, 100, 100, 100], "area": 10000}],
        }
        (data / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    output = tmp_path / "drawn"
    words = [str(data), "--draw", str(output), "--train_sizes", "400", "--no_crop"]
    check(words)
    (file,) = output.iterdir()
    assert file.name == "train_7_a.png"
    sheet = np.asarray(Image.open(file)).astype(int)
    gap = (sheet.shape[1] - 3 * 400) // 4
    flipped = []
    for column in range(3):
        left = gap + column * (400 + gap)
        panel = sheet[-400 - gap : -gap, left : left + 400]
        white = (panel == 255).all(2) & (np.indices((400, 400))[0] >= 100)  # tags lie above the box
        rows, columns = np.flatnonzero(white.sum(1) > 50), np.flatnonzero(white.sum(0) > 50)
        coloured = panel.max(2) - panel.min(2) > 100
        frame = np.flatnonzero(coloured[150])  # across the middle of the box
        flipped.append(columns[0] > 200)
        expected = (260, 359) if flipped[-1] else (40, 139)
        assert (frame[0], frame[-1]) == pytest.approx(expected, abs=1)
        assert expected[0] <= columns[0] < columns[-1] <= expected[1]
        assert 100 <= rows[0] < rows[-1] < 200
    assert not flipped[0]
    before = file.read_bytes()
    capsys.readouterr()
    assert check(words) == 2
    assert "--draw" in capsys.readouterr().err
    assert file.read_bytes() == before
    check([str(data), "--draw", str(tmp_path / "val"), "--split", "val", "--eval_size", "100"])
    assert [path.name for path in (tmp_path / "val").iterdir()] == ["val_7_a.png"]


def test_nothing_is_drawn_of_data_that_training_refuses(own_shapes, tmp_path, capsys):
    file = own_shapes / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][0] = None
    file.write_text(json.dumps(content))
    assert check([str(own_shapes), "--draw", str(tmp_path / "drawn"), "--json", str(tmp_path / "report.json")]) == 2
    assert (tmp_path / "report.json").exists()
    assert not (tmp_path / "drawn").exists()
    assert capsys.readouterr().err.count("\n") == 1
    assert check([str(own_shapes), "--draw", str(tmp_path / "drawn"), "--draw_images", "0"]) == 2
