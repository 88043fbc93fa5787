"""What runs left in their output folders, to be read after them: `samdetr.read_run(folder)`.

Nothing in the files is trusted: what is missing or damaged is left out and becomes a line of `Run.problems`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samdetr.datasets.coco_eval import METRICS
from samdetr.training.checkpoints import TIMES
from samdetr.util.logger import printable
from samdetr.util.regular_files import open_regular
from samdetr.util.schema import brief

_MOST = 10**9  # epochs, and seconds, images or MiB of one


def coco_metrics(line: Mapping[str, Any]) -> list[float] | None:
    """The 12 metrics in a line of the log, those of averaged weights if any; None without an evaluation."""
    return line.get("test_ema_coco_eval_bbox") or line.get("test_coco_eval_bbox")


def by_name(metrics: Sequence[float | None]) -> dict[str, float]:
    """The 12 metrics by their names, without those that are undefined."""
    return {name: figure for name, figure in zip(METRICS, metrics) if figure is not None and figure >= 0}


def average_precision(line: Mapping[str, Any]) -> float | None:
    """None also where it is undefined (-1): then it is no figure to compare."""
    metrics = coco_metrics(line)
    return metrics[0] if metrics and metrics[0] is not None and metrics[0] >= 0 else None


@dataclass(frozen=True)
class Epoch:
    """A line of log.txt."""

    number: int  # from 0
    values: dict[str, float]  # losses and rates by their keys
    metrics: dict[str, float]  # the 12 by name, those of averaged weights if any; what is undefined is left out


@dataclass(frozen=True)
class Evaluation:
    """eval.json and the files beside it."""

    metrics: dict[str, float]
    classes: list[dict[str, Any]]  # name, num_objects, num_detections and metrics of each
    threshold: float  # with the best F1; 0 if that is undefined
    settings: dict[str, Any]  # of the evaluation; empty for one of a file of detections


@dataclass(frozen=True)
class Spent:
    """What times.txt has of a run: all parts of epochs, those that came again included."""

    train_images: float
    train_seconds: float
    test_images: float  # that were evaluated
    test_seconds: float
    peak_mib: float | None
    epoch_seconds: float | None  # mean of those in the log, with their evaluations


@dataclass(frozen=True)
class Run:
    """A run. `settings` are empty if they are not known; `about` says what it was made with; `spent` is None if it was
    not recorded."""

    folder: Path
    settings: dict[str, Any]
    about: dict[str, Any]
    epochs: tuple[Epoch, ...]  # in order; of each number the last line counts
    evaluation: Evaluation | None
    problems: tuple[str, ...] = field(default=())
    spent: Spent | None = None

    @property
    def evaluated(self) -> list[Epoch]:
        return [epoch for epoch in self.epochs if epoch.metrics]

    @property
    def last(self) -> Epoch | None:
        """The last epoch that was evaluated."""
        return self.evaluated[-1] if self.evaluated else None

    @property
    def best(self) -> Epoch | None:
        """The epoch with the highest AP, the first of equal ones."""
        return max((e for e in self.evaluated if "AP" in e.metrics), key=lambda e: e.metrics["AP"], default=None)

    def by_epoch(self, name: str) -> dict[int, float]:
        """A loss, a rate or a metric of the epochs that have it."""
        values = {epoch.number: {**epoch.values, **epoch.metrics}.get(name) for epoch in self.epochs}
        return {number: value for number, value in values.items() if value is not None}

    @property
    def planned(self) -> int | None:
        """Epochs that the run is to have, if that is known."""
        epochs = self.settings.get("epochs")
        return epochs if isinstance(epochs, int) and not isinstance(epochs, bool) and 0 <= epochs < _MOST else None

    @property
    def done(self) -> int:
        """Epochs up to the last in the log, those before a resume included."""
        return self.epochs[-1].number + 1 if self.epochs else 0

    @property
    def seconds_left(self) -> float | None:
        """Until the last epoch, as fast as until now, if that is known."""
        if self.planned is None or self.spent is None or self.spent.epoch_seconds is None:
            return None
        return max(self.planned - self.done, 0) * self.spent.epoch_seconds


def read_run(folder: str | Path) -> Run:
    """Read an output folder. Raises ValueError: it is none."""
    path = Path(folder)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise ValueError(f"{path} {what}; pass the output folder of a run, which has a log.txt")
    problems: list[str] = []
    contents = {name: _read(path / name, problems) for name in ("log.txt", "settings.json", "eval.json", TIMES)}
    if contents["log.txt"] is None and contents["eval.json"] is None and not problems:
        raise ValueError(f"{path} holds no run: neither log.txt nor eval.json; pass the output folder of a run")
    epochs = _epochs(path / "log.txt", contents["log.txt"], problems)
    settings = _object(path / "settings.json", contents["settings.json"], problems)
    evaluated = _object(path / "eval.json", contents["eval.json"], problems)
    about = settings.pop("about", None)
    if not settings and isinstance(evaluated.get("settings"), dict):
        settings = evaluated["settings"]
    elif contents["log.txt"] is not None and contents["settings.json"] is None:
        problems.append(f"{path / 'settings.json'} is missing: the run's flags are not known")
    if contents["log.txt"] is not None and not epochs:
        problems.append(f"{path / 'log.txt'} has no epoch yet")
    evaluation = None
    if evaluated:
        metrics = _metrics(evaluated.get("coco_eval_bbox"))
        if metrics is None:
            problems.append(f"{path / 'eval.json'} has no 12 COCO figures under coco_eval_bbox; they are left out")
        classes = evaluated.get("classes")
        rows = [row for row in classes if isinstance(row, dict)] if isinstance(classes, list) else []
        best, own = evaluated.get("best_f1"), evaluated.get("settings")
        threshold = _number(best.get("threshold")) if isinstance(best, dict) else None
        named = [{**row, "name": _text(row.get("name"))} for row in rows]
        evaluation = Evaluation(metrics or {}, named, threshold or 0.0, own if isinstance(own, dict) else {})
    spent = _spent(path / TIMES, contents[TIMES], {epoch.number for epoch in epochs}, problems)
    return Run(path, settings, about if isinstance(about, dict) else {}, epochs, evaluation, tuple(problems), spent)


def _read(path: Path, problems: list[str]) -> str | None:
    """The text of a file; None if it is not there or cannot be read."""
    try:
        with open_regular(path) as file:
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        problems.append(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}")
        return None


def _json(text: str) -> Any:
    """Raises ValueError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _object(path: Path, text: str | None, problems: list[str]) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = _json(text)
    except ValueError as error:
        problems.append(f"{path} is damaged ({error}); it is left out")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path} holds {brief(value)}, no object of JSON; it is left out")
        return {}
    return value


def _lines(path: Path, text: str | None, problems: list[str]) -> list[tuple[int, dict[str, Any]]]:
    """Number of the epoch and content of each line."""
    lines, damaged = [], []
    for number, line in enumerate((text or "").splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = _json(line)
        except ValueError:
            found = None
        epoch = found.get("epoch") if isinstance(found, dict) else None
        if not isinstance(epoch, int) or isinstance(epoch, bool) or not 0 <= epoch < _MOST:
            damaged.append(number)
        else:
            lines.append((epoch, found))
    if damaged:
        where = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        problems.append(
            f"{path}: {len(damaged)} {'lines are' if len(damaged) > 1 else 'line is'} damaged and left out ({where})"
        )
    return lines


def _spent(path: Path, text: str | None, logged: set[int], problems: list[str]) -> Spent | None:
    """`logged`: numbers of the epochs that are complete."""
    names = ("train_images", "train_seconds", "test_images", "test_seconds", "peak_mib")
    parts: list[tuple[int, list[float]]] = []
    lines = _lines(path, text, problems)
    for epoch, line in lines:
        figures = [_number(line.get(name, 0)) for name in names]
        values = [figure for figure in figures if figure is not None and 0 <= figure < _MOST]
        if len(values) == len(names):
            parts.append((epoch, values))
    if len(parts) < len(lines):
        problems.append(f"{path}: lines with values that no run writes are left out")
    if not parts:
        return None
    whole = {epoch for epoch, _ in parts} & logged
    seconds = sum(values[1] + values[3] for epoch, values in parts if epoch in whole)
    columns = dict(zip(names, zip(*(values for _, values in parts))))
    peak = max(columns.pop("peak_mib")) or None
    sums = {name: sum(column) for name, column in columns.items()}
    return Spent(**sums, peak_mib=peak, epoch_seconds=seconds / len(whole) if whole else None)


def _epochs(path: Path, text: str | None, problems: list[str]) -> tuple[Epoch, ...]:
    epochs, wrong = {}, set()
    for epoch, found in _lines(path, text, problems):
        values = {}
        for key, value in found.items():
            if key.startswith(("train_", "test_")) and not key.endswith("_coco_eval_bbox") and value is not None:
                if (figure := _number(value)) is not None:
                    values[key] = figure
                else:
                    wrong.add(key)
        metrics: dict[str, float] = {}
        for key in ("test_coco_eval_bbox", "test_ema_coco_eval_bbox"):  # the second counts, as in coco_metrics
            if found.get(key):
                of_key = _metrics(found[key])
                wrong |= {key} if of_key is None else set()
                metrics = metrics if of_key is None else of_key
        epochs[epoch] = Epoch(epoch, values, metrics)
    if wrong:
        keys = ", ".join(printable(key) for key in sorted(wrong)[:5])
        problems.append(f"{path}: values of {keys} are not what a run writes; they are left out")
    return tuple(epochs[number] for number in sorted(epochs))


def _metrics(values: Any) -> dict[str, float] | None:
    """By name, without those that are undefined; None for what is not twelve figures."""
    if not isinstance(values, list) or len(values) != len(METRICS):
        return None
    figures = [None if value is None else _number(value) for value in values]
    if any(figure is None and value is not None for figure, value in zip(figures, values)):
        return None
    if any(figure is not None and figure > 1 for figure in figures):
        return None
    return by_name(figures)


def _number(value: Any) -> float | None:
    """A finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _text(value: Any) -> str:
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else brief(value)
