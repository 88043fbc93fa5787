"""Bad input ends a run with exit status 2 and one line that names what is wrong; nothing is written."""

import json
import os
import pickle
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from helpers import TINY, build_tiny, call_main, command, damage, error_line, run_main

from samdetr.training import run

TRAIN_IMAGE = "000000000001.jpg"  # image id 1
VAL_IMAGE = "000000000017.jpg"  # the first after 16 images to train on


@pytest.fixture
def refused(capsys, tmp_path):
    """A run that must be refused: its line on stderr. It leaves nothing but a list of bad images, if any."""

    def run(data: Path, *flags: str, network: list[str] = TINY) -> str:
        output = tmp_path / "output"
        before = sorted(data.parent.rglob("*"))
        assert call_main(data, *flags, "--output_dir", str(output), network=network) == 2
        if output.exists():
            assert os.listdir(output) == ["bad_images.txt"]
            shutil.rmtree(output)
        assert sorted(data.parent.rglob("*")) == before
        return error_line(capsys.readouterr().err)

    return run


def edit(data: Path, change, split: str = "train") -> Path:
    """Let `change` alter the content of an annotation file in place."""
    file = data / "annotations" / f"instances_{split}2017.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return file


def test_missing_data_folder(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    line = refused(tmp_path / "empty" / "coco")
    assert f"{tmp_path}/empty/coco does not exist" in line
    assert "--coco_path" in line
    assert "holds neither train2017/ nor val2017/" in refused(tmp_path / "empty")


@pytest.mark.parametrize("split", ["train", "val"])
def test_annotation_file(split, refused, own_shapes):
    file = edit(own_shapes, lambda content: content.pop("categories"), split)
    assert f"{file} has no list 'categories'" in refused(own_shapes)
    file = edit(own_shapes, lambda content: content.update(categories=[]), split)
    assert f"{file}: 'categories' is empty" in refused(own_shapes)
    file.write_text(file.read_text()[:-100])
    assert f"{file} is not JSON" in refused(own_shapes)


def annotation(**values):
    """A change of the seventh annotation."""
    return lambda content: content["annotations"][6].update(values)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (annotation(category_id=4), ["annotation id 7", "category id 4", "'categories' does not define"]),
        (annotation(bbox=[1, 2, float("nan"), 4]), ["annotation id 7", "[1, 2, nan, 4]", "finite"]),
        (annotation(bbox=[1, 2, 3, -4]), ["annotation id 7", "[1, 2, 3, -4]", "negative size"]),
        (annotation(image_id=99), ["annotation id 7", "image id 99"]),
    ],
)
def test_annotations(change, expected, refused, own_shapes):
    file = edit(own_shapes, change)
    line = refused(own_shapes)
    for part in [str(file), *expected]:
        assert part in line


@pytest.mark.parametrize(
    ("split", "name", "number"), [("train", TRAIN_IMAGE, 1), ("val", VAL_IMAGE, 17)], ids=["train", "val"]
)
def test_image_files(split, name, number, refused, own_shapes):
    image = own_shapes / f"{split}2017" / name
    content = image.read_bytes()
    for spoilt in (b"", content[:-100], content[:30], b"no image at all"):
        image.write_bytes(spoilt)
        line = refused(own_shapes)
        assert f"{image} (image id {number}) cannot be used" in line
    image.unlink()
    line = refused(own_shapes)
    if split == "val":
        assert f"'{name}' (image id {number})" in line
        assert "missing" in line
    else:  # could be replaced, if there were not too many
        assert f"{image} (image id {number}) cannot be used: there is no such file" in line
        assert "1 of 16 training images (6.25%)" in line
        assert "--max_bad_images 0.001" in line


def test_image_damaged_in_the_middle(own_shapes, forks, tmp_path):
    """The look at its ends finds nothing; it breaks where it is decoded, in a process of the DataLoader."""
    image = damage(own_shapes / "train2017" / TRAIN_IMAGE)
    _, *words = command(own_shapes, "--num_workers", "1", "--output_dir", str(tmp_path / "output"))
    assert forks.main(words, tmp_path / "printed") == [2]
    line = error_line(forks.err())
    assert f"{image} (image id 1) cannot be used" in line
    assert (
        f"1 of 16 training images (6.25%) cannot be used, more than --max_bad_images 0.001 allows; {tmp_path}" in line
    )
    assert os.listdir(tmp_path / "output") == ["bad_images.txt"]


class Code:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def refused_checkpoint(refused, shapes, tmp_path):
    """The line about a checkpoint that is the given bytes, or what torch.save makes of the given object."""

    def run(content, *, legacy: bool = False) -> str:
        file = tmp_path / "checkpoint.pth"
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            torch.save(content, file, _use_new_zipfile_serialization=not legacy)
        line = refused(shapes, "--eval", "--resume", str(file))
        assert str(file) in line
        return line

    return run


def test_file_that_is_no_checkpoint(refused, refused_checkpoint, shapes):
    assert "--resume nowhere.pth: no such file" in refused(shapes, "--resume", "nowhere.pth")
    assert "is cut, damaged or no file of plain weights" in refused_checkpoint(b"some text")
    assert "holds a list, not a dict" in refused_checkpoint([torch.zeros(1)])
    assert "no weights under 'model' (it has ['epoch', 'model'])" in refused_checkpoint({"model": 1, "epoch": 2})


def test_checkpoint_of_another_model(refused_checkpoint):
    resnet = torchvision.models.resnet18(weights=None).state_dict()
    assert "no weights under 'model' (it has ['bn1.bias', " in refused_checkpoint(resnet)
    line = refused_checkpoint({"model": resnet})
    assert f"missing {len(build_tiny()[0].state_dict())} (backbone.body.bn1.bias, " in line
    assert "unexpected 122 (bn1.bias, bn1.num_batches_tracked, " in line  # 62 parameters, 60 buffers


@pytest.mark.parametrize("legacy", [False, True])
def test_cut_checkpoint(legacy, refused_checkpoint, tmp_path):
    detector, settings = build_tiny()
    file = tmp_path / "whole.pth"
    torch.save({"model": detector.state_dict(), "settings": settings}, file, _use_new_zipfile_serialization=not legacy)
    whole = file.read_bytes()
    # torch raises something else for nearly every one of these, depending on what is cut in the middle.
    for length in (0, 1, 30, 5000, len(whole) // 2, len(whole) - 1):
        assert "is cut, damaged or no file of plain weights" in refused_checkpoint(whole[:length])


@pytest.mark.parametrize("legacy", [False, True])
def test_checkpoint_that_holds_code(legacy, refused_checkpoint, tmp_path):
    trap = tmp_path / "trap"
    content = {"model": build_tiny()[0].state_dict(), "epoch": Code(trap)}
    line = refused_checkpoint(content, legacy=legacy)
    assert f"holds {os.mkdir.__module__}.mkdir, which may run code when it is read, and is refused" in line
    for protocol in (2, 4):
        refused_checkpoint(pickle.dumps(content["epoch"], protocol))
    assert not trap.exists()
    pickle.loads(pickle.dumps(content["epoch"]))
    assert trap.exists()  # it would have worked


def test_checkpoint_of_other_classes(refused, trained, own_shapes):
    def rename(content):
        content["categories"][0]["name"] = "cat"

    edit(own_shapes, rename, "val")
    line = refused(own_shapes, "--eval", "--resume", str(trained / "checkpoint.pth"), network=[])
    assert "id 1 is 'cat' in the file and 'ellipse' in the model" in line


def test_resume_with_other_groups_of_parameters(refused, shapes, trained):
    line = refused(shapes, "--resume", str(trained / "checkpoint.pth"), "--lr_backbone", "0", network=[])
    assert "--lr_backbone" in line
    assert "checkpoint.pth" in line


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--backbone resnet20", ["'resnet20'", "resnet18, resnet34, resnet50"]),
        ("--backbone_weights nowhere.pth", ["--backbone_weights nowhere.pth", "no such file"]),
        ("--hidden_dim 36 --nheads 8", ["--hidden_dim 36", "--nheads 8"]),
        ("--hidden_dim 42 --nheads 3", ["--hidden_dim 42", "multiple of 4"]),
        ("--hidden_dim 36 --epochs 12", ["not 36", "--input_proj_norm none"]),
        ("--dilation", ["--dilation", "resnet18"]),
        ("--multiscale", ["--multiscale", "--backbone_level 4", "pass --backbone_level 5"]),  # of the tiny network
        ("--multiscale --backbone_level 5 --enc_layers 0", ["--enc_layers 0", "--dec_layers 2", "unused"]),
        ("--sam_resample off", ["--smca", "--sam_resample off"]),
        ("--sam_points 3", ["--sam_points 3", "--nheads"]),
        ("--eval", ["--eval", "--resume"]),
        ("--device nonsense", ["--device nonsense", "cuda"]),
        ("--device cuda:99", ["--device cuda:99", "GPUs"]),
        ("--batch_size 17", ["--batch_size 17", "16 training images"]),
        ("--lr -1", ["--lr -1"]),
        ("--lr nan", ["--lr nan"]),
        ("--lr_backbone=-1e-5", ["--lr_backbone -1e-05"]),
        ("--epochs 0", ["--epochs 0"]),
        ("--ema 1", ["--ema 1.0", "less than 1"]),
        ("--ema -0.1", ["--ema -0.1"]),
        ("--max_bad_steps 0", ["--max_bad_steps 0"]),
        ("--patience -1", ["--patience -1"]),
        ("--timeout inf", ["--timeout inf", "at most 1e+09"]),
        ("--max_hours nan", ["--max_hours nan"]),
        ("--replay nowhere.pth", ["--replay nowhere.pth: no such file"]),
        ("--num_queries 0", ["--num_queries 0"]),
        ("--dropout 1.5", ["--dropout 1.5"]),
        ("--train_sizes 64 0", ["--train_sizes 0"]),
        ("--lr_linear_proj_names nothing", ["--lr_linear_proj_names nothing"]),
        ("--hidden_dim 80000 --dim_feedforward 80000", ["--hidden_dim 80000", "GB, this machine has"]),
        ("--dataset_file voc", ["--dataset_file 'voc'", "coco"]),
        ("--world_size 2", ["--world_size 2", "torchrun"]),
    ],
)
def test_flags(flags, expected, refused, shapes):
    line = refused(shapes, *shlex.split(flags))
    for part in expected:
        assert part in line


@pytest.mark.parametrize("below", ["", "further/down"])
def test_output_folder_is_a_file(below, shapes, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("kept")
    assert call_main(shapes, "--output_dir", str(file / below)) == 2
    assert f"--output_dir {file / below}" in error_line(capsys.readouterr().err)
    assert file.read_text() == "kept"


@pytest.mark.parametrize("flags", ["--no_such_flag", "--lr fast", "--position_embedding learned", "--epoch 3"])
def test_what_argparse_refuses(flags, shapes, capsys):
    with pytest.raises(SystemExit) as ended:
        run_main(shapes, *shlex.split(flags))
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("main.py: error: ")
    assert shlex.split(flags)[0] in last


def test_loss_that_is_not_finite(shapes, monkeypatch, tmp_path, capsys):
    seen = []

    def spoil(outputs, targets, num_boxes):
        seen.append([int(t["image_id"]) for t in targets])
        terms = forward(outputs, targets, num_boxes)
        return terms | {"loss_bbox_0": terms["loss_bbox_0"] / 0} if len(seen) == 3 else terms

    def build_model(*settings):
        detector, criterion, postprocess = built(*settings)
        nonlocal forward
        forward, criterion.forward = criterion.forward, spoil
        return detector, criterion, postprocess

    built, forward = run.build_model, None
    monkeypatch.setattr(run, "build_model", build_model)
    assert call_main(shapes, "--epochs", "1", "--max_bad_steps", "1", "--output_dir", str(tmp_path / "output")) == 2
    line = error_line(capsys.readouterr().err)
    for part in ("epoch 0, iteration 2", "loss_bbox_0 = inf;", f"image ids {seen[2]}", "alone is finite", "--replay"):
        assert part in line
    assert seen[4:] == [seen[2]]  # one step later it is known, and the step repeated
    assert os.listdir(tmp_path / "output") == ["replay.pth"]
