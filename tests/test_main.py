"""main.py from the command line to the files it writes: train, evaluate, resume, load what others saved."""

import contextlib
import copy
import fcntl
import io
import json
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from urllib.error import URLError

import pytest
import torch
import torchvision
from helpers import (
    OFFICIAL_MULTISCALE,
    OFFICIAL_TINY,
    TINY,
    build_tiny,
    call_main,
    command,
    environment,
    error_line,
    evaluate,
    read_json,
    read_log,
    run_main,
    save,
)
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from samdetr.datasets.check.__main__ import main as check_data
from samdetr.main import main
from samdetr.training import loop


@pytest.fixture
def no_download(monkeypatch, tmp_path):
    def fail(request, *args, **kwargs):
        raise AssertionError(f"{request.full_url} was to be fetched")

    monkeypatch.setattr(torch.hub, "urlopen", fail)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))


def test_more_objects_than_queries_in_the_folders_of_sap_detr(own_shapes, tmp_path, capsys):
    """Trains and evaluates, as officially, with a line that names the largest image; images below images/."""
    for split, name in (("train", "13"), ("val", "17")):
        file = own_shapes / "annotations" / f"instances_{split}2017.json"
        content = read_json(file)
        other = next(image["id"] for image in content["images"] if str(image["id"]) != name)
        for image, number in ((other, 12), (int(name), 15)):
            content["annotations"] += [
                {"id": 1000 * image + i, "image_id": image, "category_id": 1, "bbox": [i, i, 9, 9], "area": 81}
                for i in range(number)
            ]
        file.write_text(json.dumps(content))
        (own_shapes / "images").mkdir(exist_ok=True)
        (own_shapes / f"{split}2017").rename(own_shapes / "images" / f"{split}2017")

    assert call_main(own_shapes, "--epochs", "1", "--output_dir", str(tmp_path)) == 0
    shown = capsys.readouterr().out
    for split, name in (("train", "13"), ("val", "17")):
        line = next(line for line in shown.splitlines() if line.startswith(f"data, {split}: warning: images with more"))
        assert re.search(rf": 2, such as image id {name} .*: \d+ objects, 10 queries$", line)
        assert "--" not in line  # no flag that a checkpoint would refuse
    assert f"python -m datasets.check {own_shapes} " in shown
    flags = ["--eval", "--resume", str(tmp_path / "checkpoint.pth")]
    assert call_main(own_shapes, *flags, network=[]) == 0
    assert "data, val: warning: images with more objects than queries" in capsys.readouterr().out
    assert check_data([str(own_shapes), "--short", "--num_queries", "26"]) == 0  # finds the images, too


@pytest.fixture
def start_of_training(monkeypatch):
    """What the first epoch of the next run starts from."""
    start = {}

    def watched(**arguments):
        if not start:
            start["epoch"] = arguments["epoch"]
            parts = {"model": arguments["model"], "optimizer": arguments["update"].optimizer}
            start.update({name: copy.deepcopy(part.state_dict()) for name, part in parts.items()})
        return train_one_epoch(**arguments)

    train_one_epoch = loop.train_one_epoch
    monkeypatch.setattr(loop, "train_one_epoch", watched)
    return start


def plain(value) -> bool:
    if isinstance(value, dict):
        return all(plain(key) and plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(plain, value))
    return value is None or isinstance(value, (torch.Tensor, int, float, str))


def test_training_writes_what_the_official_code_writes(trained):
    assert sorted(os.listdir(trained)) == [
        "checkpoint.pth", "checkpoint0000.pth", "checkpoint0001.pth", "checkpoint_best.pth", "curves.png", "log.txt",
        "settings.json", "times.txt",
    ]  # fmt: skip
    terms = {f"{name}{layer}" for name in ("loss_ce", "loss_bbox", "loss_giou") for layer in ("", "_0")}
    extra = {"cardinality_error", "cardinality_error_0", "class_error"}
    shared = {"loss", "class_error", *terms} | {f"{name}_unscaled" for name in terms | extra}
    expected = {f"train_{name}" for name in shared | {"lr", "bad_steps"}} | {
        f"test_{name}" for name in shared | {"coco_eval_bbox"}
    }
    checkpoint = torch.load(trained / "checkpoint.pth", weights_only=True)
    learned = {k: v for k, v in checkpoint["model"].items() if "running_" not in k and "num_batches" not in k}
    for epoch, line in enumerate(read_log(trained)):
        assert line.keys() == expected | {"epoch", "n_parameters"}
        assert line["epoch"] == epoch
        assert line["n_parameters"] == sum(weight.numel() for weight in learned.values())
        assert line["train_lr"] == pytest.approx((1e-3, 1e-4)[epoch], rel=1e-6)
        assert len(line["test_coco_eval_bbox"]) == 12
        for split in ("train", "test"):
            assert line[f"{split}_loss"] == pytest.approx(sum(line[f"{split}_{name}"] for name in terms), rel=1e-5)
            for name in terms:
                weight = 5 if "bbox" in name else 2
                assert line[f"{split}_{name}"] == pytest.approx(weight * line[f"{split}_{name}_unscaled"], rel=1e-5)
    assert line["test_loss"] < read_log(trained)[0]["train_loss"]

    assert checkpoint.keys() == {
        "schema_version", "checksum", "versions", "settings", "categories", "model", "ema", "optimizer", "lr_scheduler",
        "scaler", "epoch", "iteration", "samples_seen", "sampler", "random_states", "averages", "extras",
    }  # fmt: skip
    assert plain(checkpoint)
    assert (checkpoint["iteration"], checkpoint["samples_seen"]) == (4, 32)
    assert checkpoint["epoch"] == 1
    about = read_json(trained / "settings.json")["about"]
    assert checkpoint["settings"] | {"about": about} == read_json(trained / "settings.json")
    assert [row["name"] for row in checkpoint["categories"]] == ["ellipse", "triangle", "rectangle", "star"]
    resolved = {"hidden_dim": 32, "num_classes": 6, "input_proj_norm": "group", "world_size": 1}
    assert {name: checkpoint["settings"][name] for name in resolved} == resolved
    assert torch.load(trained / "checkpoint0000.pth", weights_only=True)["epoch"] == 0


@pytest.mark.usefixtures("no_download")
def test_evaluation_rebuilds_the_network(trained_any, shapes, tmp_path):
    figures, detections = evaluate(shapes, trained_any / "checkpoint.pth", tmp_path / "eval")
    assert figures == read_log(trained_any)[-1]["test_coco_eval_bbox"]
    assert figures[1] > 0  # else the equalities say nothing
    written = ["confusion_matrix.csv", "confusion_matrix.png", "eval.json", "per_class.csv", "precision_recall.png"]
    assert sorted(os.listdir(tmp_path / "eval")) == sorted(["detections.json", *written])
    # The written detections alone give the same, without a network.
    truth = ["--annotations", str(shapes / "annotations" / "instances_val2017.json")]
    again = ["--output_dir", str(tmp_path / "again")]
    assert main(["--eval", "--detections", str(tmp_path / "eval" / "detections.json"), *truth, *again]) == 0
    assert sorted(os.listdir(tmp_path / "again")) == written
    whole, other = read_json(tmp_path / "eval" / "eval.json"), read_json(tmp_path / "again" / "eval.json")
    assert other.keys() - whole.keys() == {"detections", "annotations"}
    assert {**whole, **other} == {**other, **whole}
    assert whole["AP50"] == figures[1]
    assert [row["name"] for row in whole["classes"]] == ["ellipse", "triangle", "rectangle", "star"]
    assert (tmp_path / "again" / "per_class.csv").read_bytes() == (tmp_path / "eval" / "per_class.csv").read_bytes()

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(shapes / "annotations" / "instances_val2017.json"))
        results = truth.loadRes(str(tmp_path / "eval" / "detections.json"))
        evaluation = COCOeval(truth, results, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert figures == pytest.approx(evaluation.stats.tolist(), abs=1e-12)
    assert {d["image_id"] for d in detections} == set(truth.getImgIds())
    assert {d["category_id"] for d in detections} <= {1, 2, 3, 5}  # the head has outputs for 0 and 4, too
    assert len(detections) <= 7 * 10 * 4


@pytest.mark.usefixtures("no_download")
def test_resumed_training_goes_on(trained, shapes, tmp_path, start_of_training):
    first, output = trained / "checkpoint0000.pth", tmp_path / "output"
    schedule = ["--epochs", "2", "--lr_drop", "1", "--lr", "2e-3"]  # the first epoch had half that
    network = ["--backbone_weights", "imagenet"]  # not a word about the others
    run_main(shapes, "--resume", str(first), *schedule, "--output_dir", str(output), network=network)

    saved = torch.load(first)
    assert start_of_training["epoch"] == 1
    torch.testing.assert_close(start_of_training["model"], saved["model"], rtol=0, atol=0)
    optimizer = start_of_training["optimizer"]
    torch.testing.assert_close(optimizer["state"], saved["optimizer"]["state"], rtol=0, atol=0)
    # after the drop: a tenth of 2e-3, and of --lr_backbone, 1e-5
    rates = {group["name"]: group["lr"] for group in optimizer["param_groups"]}
    assert rates == pytest.approx({"main": 2e-4, "backbone": 1e-6})

    (line,) = read_log(output)
    assert line["epoch"] == 1
    assert line["train_lr"] == pytest.approx(2e-4)
    final = torch.load(output / "checkpoint.pth")
    assert final["epoch"] == 1
    steps = {int(state["step"]) for state in final["optimizer"]["state"].values()}
    assert steps == {8}  # 2 epochs of 16 images in batches of 4


def test_resumed_run_equals_the_uninterrupted_one(trained_any, shapes, tmp_path):
    """Bit by bit, dropout and augmentation included: every epoch draws its own random numbers."""
    flags = ["--epochs", "2", "--lr_drop", "1", "--lr", "1e-3", "--output_dir", str(tmp_path)]
    run_main(shapes, "--resume", str(trained_any / "checkpoint0000.pth"), *flags, network=[])
    resumed, straight = (torch.load(folder / "checkpoint.pth") for folder in (tmp_path, trained_any))
    torch.testing.assert_close(resumed["model"], straight["model"], rtol=0, atol=0)
    torch.testing.assert_close(resumed["optimizer"]["state"], straight["optimizer"]["state"], rtol=0, atol=0)
    assert read_log(tmp_path)[0] == read_log(trained_any)[1]


@pytest.mark.parametrize("network", [OFFICIAL_TINY, OFFICIAL_MULTISCALE], ids=["one scale", "three scales"])
@pytest.mark.parametrize(
    ("official", "epoch", "lr"),
    [(False, 0, 1e-4), (True, 1, 1e-5)],  # an official file tells its epoch, the first, after which the rate falls
)
def test_training_goes_on_from_weights_alone(official, epoch, lr, network, shapes, tmp_path, start_of_training):
    detector, settings = build_tiny(network=network)
    save(detector, settings, tmp_path / "weights.pth", official=official)
    run_main(shapes, "--resume", str(tmp_path / "weights.pth"), "--epochs", "2", "--lr_drop", "1", network=[])
    assert start_of_training["epoch"] == epoch
    assert start_of_training["optimizer"]["state"] == {}
    assert start_of_training["optimizer"]["param_groups"][0]["lr"] == pytest.approx(lr)
    torch.testing.assert_close(start_of_training["model"], detector.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("saved_with", "flags", "expected"),
    [
        (
            "--smca",
            "--num_queries 12",
            "missing 0; unexpected 0; of another shape 1 (decoder.reference_boxes (10, 4) in the file, (12, 4) here)",
        ),
        # both layers' heads have twice as many outputs: x, y and two scales for each of 4 points
        (
            "",
            "--smca",
            "missing 0; unexpected 0; of another shape 4 (decoder.layers.0.aligner.point_head.layers.3.bias (8,) in "
            "the file, (16,) here, decoder.layers.0.aligner.point_head.layers.3.weight (8, 64) in the file, (16, 64) ",
        ),
        # 30 weights with biases: self-attention 6, cross-attention 8, aligner 7, norms 3, feed-forward 2, heads 4
        ("--smca", "--dec_layers 3", "missing 60 (decoder.box_heads.2.layers.0.bias, "),
        ("--smca", "--enc_layers 0", "missing 0; unexpected 12 (encoder.layers.0.feed_forward.linear1.bias, "),
    ],
)
def test_flags_that_contradict_the_checkpoint(saved_with, flags, expected, shapes, tmp_path, capsys):
    network = [flag for flag in TINY if flag != "--smca"] + shlex.split(saved_with)
    detector, settings = build_tiny(network=network)
    save(detector, settings, tmp_path / "weights.pth")
    output = tmp_path / "output"
    fixed = ["--eval", "--resume", str(tmp_path / "weights.pth"), "--output_dir", str(output)]
    assert call_main(shapes, *fixed, *shlex.split(flags), network=[]) == 2
    assert f"weights.pth does not fit the network: {expected}" in error_line(capsys.readouterr().err)
    assert not output.exists()


@pytest.mark.parametrize(
    ("network", "norm", "legacy", "flags"),
    [
        (OFFICIAL_TINY, "group", False, ["--epochs", "50", "--input_proj_norm", "none"]),
        (OFFICIAL_TINY, "none", True, ["--epochs", "12", "--input_proj_norm", "group"]),
        (OFFICIAL_MULTISCALE, "group", False, []),
    ],
    ids=["group", "none", "three scales"],
)
def test_official_file_gives_the_figures_of_ours(network, norm, legacy, flags, shapes, tmp_path):
    detector, settings = build_tiny("--input_proj_norm", norm, network=network)
    save(detector, settings, tmp_path / "ours.pth")
    save(detector, settings, tmp_path / "official.pth", official=True, legacy=legacy)
    figures, detections = evaluate(shapes, tmp_path / "ours.pth", tmp_path / "ours", *flags)
    assert evaluate(shapes, tmp_path / "official.pth", tmp_path / "official", *flags) == (figures, detections)
    assert figures[8] > 0  # AR100
    resolved = read_json(tmp_path / "official" / "eval.json")["settings"]
    assert (resolved["input_proj_norm"], resolved["num_queries"], resolved["num_classes"]) == (norm, 100, 6)


def test_checkpoint_behind_a_url(server, shapes, tmp_path, capsys):
    detector, settings = build_tiny(network=OFFICIAL_TINY)
    save(detector, settings, tmp_path / "r18.pth", official=True)
    url = f"http://127.0.0.1:{server.server_port}/r18.pth"
    from_file = evaluate(shapes, tmp_path / "r18.pth", tmp_path / "file")
    for attempt in ("first", "second"):
        assert evaluate(shapes, url, tmp_path / attempt) == from_file
    assert server.requests == 1  # fetched once, kept for the second time

    capsys.readouterr()
    missing = url.replace("r18", "r19")
    flags = ["--eval", "--resume", missing, "--output_dir", str(tmp_path / "none")]
    assert call_main(shapes, *flags, network=[]) == 2
    assert re.search(f"--resume {missing} cannot be fetched: .*404", error_line(capsys.readouterr().err))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("flags", "norm"),
    [
        (["--epochs", "12"], True),
        (["--epochs", "24"], True),
        (["--epochs", "25"], False),
        (["--epochs", "50"], False),
        (["--epochs", "12", "--input_proj_norm", "none"], False),
        (["--epochs", "50", "--input_proj_norm", "group"], True),
    ],
)
def test_norm_of_the_input_projection_follows_the_schedule(flags, norm):
    assert ("projection.levels.0.1.weight" in build_tiny(*flags)[0].state_dict()) is norm


def test_backbone_starts_from_a_file(shapes, tmp_path):
    torch.manual_seed(1)
    resnet = torchvision.models.resnet18(weights=None)
    for name, buffer in resnet.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5) if "var" in name else buffer.normal_(std=0.1)
    torch.save(resnet.state_dict(), tmp_path / "resnet18.pth")
    flags = ["--backbone_norm", "frozen", "--backbone_weights", str(tmp_path / "resnet18.pth")]
    run_main(shapes, *flags, "--epochs", "1", "--output_dir", str(tmp_path / "output"))

    state = torch.load(tmp_path / "output" / "checkpoint.pth")["model"]
    body = {name.removeprefix("backbone.body."): weight for name, weight in state.items() if "backbone" in name}
    assert "layer3.1.conv2.weight" in body
    for name, weight in body.items():
        # Stem, first stage and all norms stay; elsewhere 4 steps of AdamW at 1e-5 move a weight by about 4e-5 at most.
        still = name.startswith(("conv1", "layer1")) or "bn" in name or "downsample.1" in name
        torch.testing.assert_close(weight, resnet.state_dict()[name], rtol=0, atol=0 if still else 1e-4)
    assert not torch.equal(body["layer3.1.conv2.weight"], resnet.layer3[1].conv2.weight)


def test_imagenet_weights_without_network(shapes, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "urlopen", fail)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    network = [flag for flag in TINY if flag not in ("--backbone_weights", "none")]
    assert call_main(shapes, "--output_dir", str(tmp_path / "output"), network=network) == 2
    line = error_line(capsys.readouterr().err)
    for part in ("no route to host", "https://download.pytorch.org/models/resnet18-", "--backbone_weights FILE"):
        assert part in line
    assert not (tmp_path / "output").exists()


def test_lines_where_output_is_no_terminal(shapes, capfd):
    run_main(shapes, "--epochs", "1", "--print_every", "3")
    output, errors = capfd.readouterr()
    assert errors == ""
    assert not re.search(r"[^\x20-\x7e\n]", output)
    steps = re.findall(r"^(\w+.*): (\d+/\d+), elapsed .*ETA .*?(?:, loss ([\d.]+), lr 0.0001)?$", output, re.MULTILINE)
    assert [step[:2] for step in steps] == [("epoch 0", "3/4"), ("epoch 0", "4/4"), ("evaluation", "2/2")]
    assert all(step[2] for step in steps[:2])


def test_bar_on_a_terminal(shapes):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # rows, columns; tqdm adapts to them
    process = subprocess.Popen(
        [sys.executable, *command(shapes, "--epochs", "1")],
        env=environment(TERM="xterm"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    output = b""
    with contextlib.suppress(OSError):  # how Linux reports that the other side is closed
        while chunk := os.read(ours, 4096):
            output += chunk
    os.close(ours)
    assert process.wait(timeout=60) == 0
    (bar,) = re.findall(r"\repoch 0: 100%\|[^\r\n]*", output.decode())[-1:]
    assert re.search(r"\| 4/4 \[\d\d:\d\d<00:00, .*, loss \d+\.\d+, lr 0\.0001\]", bar)
    assert "\revaluation: 100%" in output.decode()
    assert "epoch 0: 4/4, elapsed" not in output.decode()
