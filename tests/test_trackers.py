"""`--track`: each step and epoch once, the same training, and no tracker that stops it."""

import csv
import json
import threading
import time

import pytest
import torch
from helpers import call_main, error_line, read_log, run_main

from samdetr.datasets.coco_eval import METRICS
from samdetr.training import trackers
from samdetr.training.trackers import Trackers, flat

FLAGS = ["--epochs", "2", "--batch_size", "4", "--accumulate", "2", "--lr", "1e-3", "--print_every", "2"]
STEPS = 4  # 16 images, 2 epochs


def rows(output, kind):
    with open(output / "track" / "csv" / f"{kind}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_csv_and_tensorboard_have_each_step_once_after_a_resumed_run(shapes, tmp_path):
    tracked, plain = tmp_path / "tracked", tmp_path / "plain"
    pytest.importorskip("tensorboard")
    run_main(shapes, *FLAGS, "--output_dir", str(plain))
    saving = ["--save_every_iterations", "1", "--keep", "9", "--track", "csv", "tensorboard"]
    run_main(shapes, *FLAGS, *saving, "--output_dir", str(tracked))
    again = str(tracked / "checkpoint0001_000001.pth")  # the last step and the last evaluation come once more
    run_main(shapes, *FLAGS, *saving, "--output_dir", str(tracked), "--resume", again)

    log = read_log(tracked)
    assert log == read_log(plain)
    steps, epochs = rows(tracked, "step"), rows(tracked, "epoch")
    assert [int(row["step"]) for row in steps] == [1, 2, 3, 4]
    assert [int(row["step"]) for row in epochs] == [2, 4]
    for line, epoch in zip(log, epochs, strict=True):
        of_epoch = steps[2 * line["epoch"] : 2 * line["epoch"] + 2]
        for name in ("loss", "loss_giou", "class_error", "lr"):
            mean = sum(float(row[name]) for row in of_epoch) / 2
            assert mean == pytest.approx(line[f"train_{name}"], rel=1e-6)
        expected = {n: v for n, v in zip(METRICS, line["test_coco_eval_bbox"]) if v >= 0}
        assert {n: float(epoch[f"test_{n}"]) for n in METRICS if epoch.get(f"test_{n}")} == expected

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked / "track" / "tensorboard"), purge_orphaned_data=True).Reload()
    assert [e.step for e in events.Scalars("step/loss")] == [1, 2, 3, 4]
    assert [e.value for e in events.Scalars("step/loss")] == [pytest.approx(float(row["loss"])) for row in steps]
    assert events.Scalars("epoch/train_loss")[-1].value == pytest.approx(log[-1]["train_loss"])
    assert len([tag for tag in events.Tags()["images"] if tag.startswith("detections/")]) == 4


class Fake:
    """Fails, hangs or works, in the call that a test names."""

    def __init__(self, *, folder, last, settings):
        self.calls, self.do = [], settings
        self._act("init")

    def _act(self, name, *arguments):
        self.do.setdefault("calls", []).append((name, *arguments))
        if self.do.get("fails") == name:
            raise OSError(28, "No space left on device")
        if self.do.get("hangs") == name:
            self.do["until"].wait(60)

    def write(self, *arguments):
        self._act("write", *arguments)

    def draw(self, *arguments):
        self._act("draw", *arguments)

    def flush(self):
        self._act("flush")

    def close(self):
        self._act("close")


def use(monkeypatch, tmp_path, **settings):
    monkeypatch.setitem(trackers.TRACKERS, "csv", (Fake, "csv"))
    return Trackers(tmp_path, ["csv", "csv"], last={"step": 0, "epoch": 0}, settings=settings, every=2)


def make_steps(found, number):
    for step in range(1, number + 1):
        good = torch.tensor(0.0 if step == 2 else 1.0)
        parts = [{"loss": torch.tensor(float(step))}, {"loss": torch.tensor(step + 1.0)}, {"lr": 0.5, "good": good}]
        found.step(step, parts)
    found.epoch(number, {"train_loss": 2.0, "epoch": 0})
    found.close()


def test_parts_are_averaged_and_bad_steps_left_out(monkeypatch, tmp_path):
    calls: list = []
    make_steps(use(monkeypatch, tmp_path, calls=calls), 3)
    written = [call for call in calls if call[0] == "write"]
    assert written == [
        ("write", "step", 1, {"loss": 1.5, "lr": 0.5}),
        ("write", "step", 3, {"loss": 3.5, "lr": 0.5}),
        ("write", "epoch", 3, {"train_loss": 2.0, "epoch": 0}),
    ]
    assert calls[-1] == ("close",)


def test_numbers_and_tensors_are_not_mixed(monkeypatch, tmp_path):
    """On a GPU the learning rate is a number and the losses are tensors there, which no stack takes together."""
    stacked: list = []
    monkeypatch.setattr(trackers.torch, "stack", lambda values: stacked.append(len(values)) or torch.tensor([1.0] * 9))
    make_steps(use(monkeypatch, tmp_path), 2)
    assert stacked == [6]  # of each step two losses and whether it was good


@pytest.mark.parametrize("call", ["init", "write", "flush", "close"])
@pytest.mark.parametrize("fault", ["fails", "hangs"])
def test_a_lost_tracker_is_told_once(fault, call, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(trackers, "SECONDS", 0.2)
    until, start = threading.Event(), time.monotonic()
    found = use(monkeypatch, tmp_path, **{fault: call, "until": until})
    make_steps(found, 9)
    assert time.monotonic() - start < 10
    until.set()
    (line,) = capsys.readouterr().out.splitlines()
    why = "OSError: [Errno 28] No space left on device" if fault == "fails" else "it has not ended within 0 seconds"
    assert line.endswith(f"csv is off from here on ({why}); the run goes on")
    assert not found.on


def test_a_slow_tracker_does_not_fill_the_memory(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(trackers, "WAITING", 20)
    until = threading.Event()
    found = use(monkeypatch, tmp_path, hangs="init", until=until)
    make_steps(found, 99)
    until.set()
    assert capsys.readouterr().out.count("20 calls wait for it") == 1


def test_numbers_of_a_line():
    line = {"train_loss": 1.0, "test_coco_eval_bbox": [0.5, None, -1.0, *[0.25] * 9], "epoch": 3, "x": float("nan")}
    assert flat(line) == {
        "train_loss": 1.0, "test_AP": 0.5, **{f"test_{name}": 0.25 for name in METRICS[3:]}, "epoch": 3
    }  # fmt: skip


def test_a_table_gets_columns_and_loses_half_a_line(tmp_path):
    table = trackers.Csv(tmp_path, last={"step": 0, "epoch": 0}, settings={})
    table.write("step", 1, {"a": 1.0})
    table.write("step", 2, {"a": 2.0, "b": 3.0})
    table.close()
    with open(tmp_path / "step.csv", "a") as file:
        file.write("3")
    table = trackers.Csv(tmp_path, last={"step": 2, "epoch": 0}, settings={})
    table.write("step", 3, {"b": 4.0})
    table.close()
    assert (tmp_path / "step.csv").read_text().splitlines() == ["step,a,b", "1,1.0,", "2,2.0,3.0", "3,,4.0"]


def test_bad_flags(shapes, tmp_path, monkeypatch, capsys):
    assert call_main(shapes, "--track", "csv") == 2
    assert "--track writes into the output folder: pass --output_dir" in error_line(capsys.readouterr().err)
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    assert call_main(shapes, "--track", "wandb", "--output_dir", str(tmp_path / "o")) == 2
    assert "pip install wandb" in error_line(capsys.readouterr().err)
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_wandb_offline_goes_on_with_its_run(shapes, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for epochs in ("1", "2"):
        run_main(shapes, "--epochs", epochs, "--output_dir", str(tmp_path), "--track", "wandb", "--resume", "auto")
        known = json.loads((tmp_path / "track" / "wandb" / "run.json").read_text())
        assert known["step"] == known["epoch"] == int(epochs) * 4
    runs = [path.name for path in (tmp_path / "track" / "wandb" / "wandb").glob("offline-run-*")]
    assert len(runs) == 2
    assert all(name.endswith(known["id"]) for name in runs)
