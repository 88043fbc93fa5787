"""Metrics and pictures of a run in other programs' files: `track`."""

from __future__ import annotations

import csv
import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Thread
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from samdetr.training.checkpoints import TRACKED
from samdetr.training.runs import by_name
from samdetr.util.files import whole_file, write_json
from samdetr.util.logger import log

WAITING = 1000  # calls that may wait for a tracker
SECONDS = 20.0  # until one must have written everything, at the end of a run
LOST: set[str] = set()  # names of trackers that are lost; what their packages do when the process ends may hang


class Tracker(Protocol):
    """Writes into a `folder` of its own. Steps are counted from the start of the first epoch. `last`: the steps up to
    which a resumed run has written its steps and its epochs; what lies behind them comes again."""

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Values of a "step" or an "epoch"."""

    def draw(self, step: int, pictures: Mapping[str, Image.Image]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Csv:
    """step.csv and epoch.csv."""

    def __init__(self, folder: Path, *, last: Mapping[str, int], settings: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._tables = {kind: _Table(folder / f"{kind}.csv", last=step) for kind, step in last.items()}

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self._tables[kind].add({"step": step, **values})

    def draw(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        """A table has none."""

    def flush(self) -> None:
        for table in self._tables.values():
            table.stream.flush()

    def close(self) -> None:
        for table in self._tables.values():
            table.stream.close()


class _Table:
    """Rows are added at the end of the file. It is written anew if they have further columns."""

    def __init__(self, file: Path, *, last: int) -> None:
        self._file, self._columns = file, ["step"]
        rows: list[dict[str, Any]] = []
        if file.exists():
            with open(file, newline="", encoding="utf-8") as stream:
                # A killed run may have left half a line at the end.
                rows = [row for row in csv.DictReader(stream) if (row.get("step") or "").isdigit()]
        self._rewrite([row for row in rows if int(row["step"]) <= last])

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._columns = list(dict.fromkeys([*self._columns, *(name for row in rows for name in row if name)]))
        with whole_file(self._file) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, self._columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        self.stream = open(self._file, "a", newline="", encoding="utf-8")  # noqa: SIM115
        self._writer = csv.DictWriter(self.stream, self._columns)

    def add(self, row: Mapping[str, Any]) -> None:
        if not row.keys() <= set(self._columns):
            self.stream.close()
            with open(self._file, newline="", encoding="utf-8") as stream:
                self._rewrite([*csv.DictReader(stream), row])
        else:
            self._writer.writerow(row)


class TensorBoard:
    """Event files; what a killed run wrote after the step that is resumed is taken back."""

    def __init__(self, folder: Path, *, last: Mapping[str, int], settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _silence_tensorboard()
        self._writer = SummaryWriter(str(folder), purge_step=last["step"] + 1)
        text = json.dumps(settings, indent=2, default=str)
        self._writer.add_text("settings", f"```json\n{text}\n```", last["step"] + 1)

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def draw(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        for name, picture in pictures.items():
            pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
            self._writer.add_image(name, pixels.view(picture.height, picture.width, 3), step, dataformats="HWC")

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _silence_tensorboard() -> None:
    """TensorBoard's own thread raises what its next call raises, too: one report is enough."""
    before = threading.excepthook

    def report(failed: Any, /) -> None:
        if type(failed.thread).__name__ != "_AsyncWriterThread":
            before(failed)

    threading.excepthook = report


class WandB:
    """One run of Weights & Biases, whose id run.json keeps. It cannot take anything back, so steps that a resumed run
    repeats are left out."""

    def __init__(self, folder: Path, *, last: Mapping[str, int], settings: Mapping[str, Any]) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._file, self._wandb = folder / "run.json", wandb
        known = json.loads(self._file.read_text()) if any(last.values()) and self._file.exists() else {}
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "samdetr"),
            name=folder.absolute().parents[1].name,
            id=known.get("id"),
            resume="allow" if known else None,
            dir=str(folder),
            config=dict(settings),
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._last = {kind: known.get(kind, step) for kind, step in last.items()}
        for kind in self._last:  # every kind has an axis of its own: the library's own must not fall
            wandb.define_metric(f"{kind}/number")
            wandb.define_metric(f"{kind}/*", step_metric=f"{kind}/number")

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        if step <= self._last[kind]:
            return
        self._run.log({f"{kind}/number": step, **{f"{kind}/{name}": value for name, value in values.items()}})
        self._last[kind] = step

    def draw(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        self._run.log({name: self._wandb.Image(picture, caption=f"step {step}") for name, picture in pictures.items()})

    def flush(self) -> None:
        write_json(self._file, {"id": self._run.id, **self._last})

    def close(self) -> None:
        self.flush()
        self._run.finish()


# Name -> class, and the package that it needs.
TRACKERS: dict[str, tuple[Callable[..., Tracker], str]] = {
    "tensorboard": (TensorBoard, "tensorboard"), "wandb": (WandB, "wandb"), "csv": (Csv, "csv"),
}  # fmt: skip


def require_packages(names: Sequence[str]) -> None:
    """Raise ValueError if a tracker's package is not installed."""
    for name in names:
        if find_spec(TRACKERS[name][1]) is None:
            raise ValueError(f"`track` {name} needs a package that is not installed: pip install {TRACKERS[name][1]}")


class Trackers:
    """Hands on what a run logs, to each tracker in a thread of its own: none can stop a run or make it wait.

    Values of steps stay on the device until `every` steps are together, which then are read at once.
    """

    def __init__(
        self,
        folder: Path | None,
        names: Sequence[str],
        *,
        last: Mapping[str, int],
        settings: Mapping[str, Any],
        every: int,
    ) -> None:
        """`folder`: of the run; None: nothing is tracked. `last`: as of `Tracker`."""
        self._every = every
        self._steps: list[tuple[int, Sequence[Mapping[str, Tensor | float]]]] = []
        self._threads = []
        for name in dict.fromkeys(names) if folder else ():
            assert folder is not None
            options = {"folder": folder / TRACKED / name, "last": last, "settings": settings}
            self._threads.append(_Background(name, partial(TRACKERS[name][0], **options)))
        for thread in self._threads:
            thread.start()

    @property
    def on(self) -> bool:
        return any(not thread.lost for thread in self._threads)

    def step(self, step: int, metrics: Sequence[Mapping[str, Tensor | float]]) -> None:
        """The metrics of the parts of a step: numbers, and tensors that stay on the device for now."""
        if self.on:
            self._steps.append((step, metrics))
        if len(self._steps) >= self._every:
            self.flush()

    def epoch(self, step: int, line: Mapping[str, Any]) -> None:
        """A line of the log, after the step that ends its epoch."""
        self.flush()
        self._hand_on("write", "epoch", step, flat(line))
        self._hand_on("flush")

    def draw(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        self._hand_on("draw", step, pictures)

    def flush(self) -> None:
        """Pass on the steps that wait. Also called before a checkpoint: a run that is killed and resumed there does not
        repeat them."""
        if not self._steps:
            return
        on_device = [
            value.to(torch.float64) for _, parts in self._steps for part in parts for value in part.values()
            if isinstance(value, Tensor)
        ]  # fmt: skip
        read = iter(torch.stack(on_device).tolist() if on_device else [])
        for step, parts in self._steps:
            named: dict[str, list[float]] = {}
            for part in parts:
                for name, value in part.items():
                    named.setdefault(name, []).append(next(read) if isinstance(value, Tensor) else value)
            found = {name: sum(values) / len(values) for name, values in named.items()}
            if found.pop("good", 1.0):  # of a bad step all values are 0
                self._hand_on("write", "step", step, {n: v for n, v in found.items() if math.isfinite(v)})
        self._steps.clear()
        self._hand_on("flush")

    def close(self) -> None:
        """Wait until everything is written, but not for ever."""
        self.flush()
        until = time.monotonic() + SECONDS
        self._hand_on("close")
        for thread in self._threads:
            thread.wait(until)

    def _hand_on(self, *call: Any) -> None:
        for thread in self._threads:
            thread.put(*call)


class _Background(Thread):
    """Makes a tracker and its calls. Whatever goes wrong is told once; then the tracker is lost."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        super().__init__(daemon=True)  # one that hangs does not keep the process
        self.tracker, self.lost = name, False
        self._make, self._calls = make, Queue[tuple[Any, ...]](maxsize=WAITING)

    def run(self) -> None:
        try:
            tracker = self._make()
            while not self.lost and (call := self._calls.get())[0] != "close":
                getattr(tracker, call[0])(*call[1:])
            tracker.close()
        except (Exception, SystemExit) as error:
            self._lose(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def put(self, *call: Any) -> None:
        try:
            if not self.lost:
                self._calls.put_nowait(call)
        except Full:
            self._lose(f"{WAITING} calls wait for it")

    def wait(self, until: float) -> None:
        if not self.lost:
            self.join(max(until - time.monotonic(), 0))
            if self.is_alive():
                self._lose(f"it has not ended within {SECONDS:.0f} seconds")

    def _lose(self, reason: str) -> None:
        if not self.lost:
            self.lost = True
            LOST.add(self.tracker)
            log(f"warning: `track` {self.tracker} is off from here on ({reason}); the run goes on")
        while True:  # what waits would keep its memory
            try:
                self._calls.get_nowait()
            except Empty:
                return


def flat(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in a line of the log; COCO's metrics by their names, undefined ones left out."""
    found: dict[str, float] = {}
    for name, value in line.items():
        if name.endswith("coco_eval_bbox"):
            prefix = name.removesuffix("coco_eval_bbox")
            found |= {f"{prefix}{metric}": figure for metric, figure in by_name(value).items()}
        elif isinstance(value, (int, float)) and math.isfinite(value):
            found[name] = value
    return found
