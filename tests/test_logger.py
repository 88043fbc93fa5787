"""Averages, progress on a terminal and in a file, JSON that is whole and valid."""

import io
import json
import math
import sys

import pytest
import torch

from samdetr.util import logger
from samdetr.util.files import append_json_line, whole_file, write_json
from samdetr.util.logger import MetricAverager, MovingMean, log, progress


def test_averages_count_each_metric_by_its_own_steps():
    averager = MetricAverager()
    averager.update({"loss": torch.tensor(1.0, requires_grad=True), "boxes": 4})
    averager.update({"loss": torch.tensor(2.0)})
    averager.update({"loss": torch.tensor(6.0)})
    assert averager.averages() == {"loss": 3.0, "boxes": 4.0}
    assert MetricAverager().averages() == {}


def test_many_small_values_do_not_drown_in_the_sum():
    averager = MetricAverager()
    averager.update({"loss": torch.tensor(2.0**24)})
    for _ in range(4):
        averager.update({"loss": torch.tensor(1.0)})  # 2^24 + 1 is no float32
    assert averager.averages()["loss"] == (2**24 + 4) / 5


def test_nothing_is_read_from_the_device_before_it_is_needed(capsys):
    unreadable = torch.empty((), device="meta")  # reading its value raises
    averager = MetricAverager()
    averager.update({"loss": unreadable})
    averager.update({"loss": unreadable})
    with pytest.raises((RuntimeError, NotImplementedError)):
        averager.averages()

    steps = progress(range(4), description="x", every=2)
    for step in steps:
        steps.set(loss=unreadable if step % 2 == 0 else torch.tensor(0.25))
    assert capsys.readouterr().out.count("loss 0.25") == 2


def test_moving_mean_by_hand():
    """Weights 1, 1/2, 1/4 from the last value back; non-finite values are left out."""
    mean = MovingMean(decay=0.5)
    assert mean.update(torch.tensor(math.nan)).isnan()
    assert mean.update(torch.tensor(4.0)).item() == 4
    assert mean.update(torch.tensor(1.0)).item() == pytest.approx((1 + 4 / 2) / (1 + 1 / 2))
    assert mean.update(torch.tensor(math.inf)).item() == pytest.approx((1 / 2 + 4 / 4) / (1 / 2 + 1 / 4))
    assert mean.update(torch.tensor(2.0, dtype=torch.float64)).item() == pytest.approx(
        (2 + 1 / 4 + 4 / 8) / (1 + 1 / 4 + 1 / 8)
    )


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until the test moves it."""
    now = [100.0]
    monkeypatch.setattr(logger.time, "monotonic", lambda: now[0])
    return now


def test_progress_in_a_file_is_plain_lines(capsys, clock):
    steps = progress(iter(range(7)), description="epoch 3", total=7, every=3)
    seen = []
    for step in steps:
        clock[0] += 1000
        steps.set(loss=torch.tensor(12.34567), lr=1e-5, memory="812 MB")
        seen.append(step)
    assert seen == list(range(7))
    captured = capsys.readouterr()
    values = "loss 12.35, lr 1e-05, memory 812 MB"
    assert captured.out.splitlines() == [
        f"epoch 3: 3/7, elapsed 0:50:00, ETA 1:06:40, {values}",
        f"epoch 3: 6/7, elapsed 1:40:00, ETA 0:16:40, {values}",
        f"epoch 3: 7/7, elapsed 1:56:40, ETA 0:00:00, {values}",
    ]
    assert not [c for c in captured.out + captured.err if ord(c) < 32 and c != "\n"]


def test_progress_of_unknown_and_of_no_length(capsys, clock):
    for items in (iter("ab"), []):
        list(progress(items, description="x", every=2))
    assert capsys.readouterr().out.splitlines() == [
        "x: 2, elapsed 0:00:00",
        "x: 2, elapsed 0:00:00",
        "x: 0/0, elapsed 0:00:00",
    ]


def test_progress_on_a_terminal_is_a_bar(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    steps = progress(range(5), description="epoch 3", every=2)
    for step in steps:
        steps.set(loss=float(step))
        log("a line between")
    shown = sys.stderr.getvalue()
    assert "epoch 3: 100%" in shown
    assert "5/5" in shown
    assert shown.rstrip().endswith("loss 4]")
    assert capsys.readouterr().out == "a line between\n" * 5

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(logger, "is_main", lambda: False)
    assert list(progress(range(5), description="epoch 3")) == list(range(5))
    assert sys.stderr.getvalue() == ""


def test_json_lines_survive_nan_and_a_torn_line(tmp_path):
    path = tmp_path / "log.txt"
    append_json_line(path, {"epoch": 0, "loss": math.nan, "ap": [0.5, math.inf, {"x": -math.inf}]})
    with open(path, "a") as file:
        file.write('{"epoch": 1, "lo')  # killed while writing
    append_json_line(path, {"epoch": 2, "loss": 1.5})
    lines = path.read_text().split("\n")
    assert json.loads(lines[0]) == {"epoch": 0, "loss": None, "ap": [0.5, None, {"x": None}]}
    assert json.loads(lines[2]) == {"epoch": 2, "loss": 1.5}
    assert lines[3:] == [""]


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "settings.json"
    write_json(path, {"lr": 1e-4, "bad": math.nan})
    assert json.loads(path.read_text()) == {"lr": 1e-4, "bad": None}
    with pytest.raises(TypeError):
        write_json(path, {"lr": object()})

    def fail_half_way() -> None:
        with whole_file(path) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail_half_way()
    assert json.loads(path.read_text()) == {"lr": 1e-4, "bad": None}
    assert list(tmp_path.iterdir()) == [path]
