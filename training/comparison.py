"""Runs side by side: settings that differ, figures, curves; mean and spread of runs that differ by seed alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from samdetr.datasets.coco_eval import METRICS
from samdetr.training.published import published_by_epoch, recipe_of
from samdetr.training.runs import Epoch, Run, read_run
from samdetr.util.files import whole_file
from samdetr.util.logger import printable, shorter

# Settings that say where and how a run is executed, not what it computes.
_PLACES = {
    "output_dir", "seed", "resume", "start_epoch", "num_workers", "print_every", "verbose", "track", "compare", "keep",
    "save_every_epoch", "save_every_iterations", "save_every_minutes", "max_hours", "timeout", "overwrite", "dist_url",
    "local_rank", "profile", "cache_mode", "allow_http",
}  # fmt: skip
_DATA = ("coco_path", "train_images", "train_annotations", "val_images", "val_annotations")
UNKNOWN = "?"
_MARK = "samdetr compare"  # in the pictures that may be replaced


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n - 1) by metric, of runs at one epoch or of their best epochs."""

    mean: dict[str, float]
    deviation: dict[str, float]


@dataclass(frozen=True)
class Seeds:
    """Runs that differ by seed alone. `last` is at the `epoch` that all have evaluated last; `best` up to it."""

    runs: tuple[Run, ...]
    epoch: int
    last: Spread
    best: Spread

    def over_epochs(self, name: str) -> dict[int, list[float]]:
        """Values of a metric by epoch, of those runs that have it."""
        values: dict[int, list[float]] = {}
        for number, value in (item for run in self.runs for item in run.by_epoch(name).items()):
            values.setdefault(number, []).append(value)
        return dict(sorted(values.items()))


@dataclass(frozen=True)
class Comparison:
    """`differences`: for each setting that differs the value of each run as text, UNKNOWN where it is not known."""

    runs: tuple[Run, ...]
    names: tuple[str, ...]  # short and distinct
    differences: dict[str, tuple[str, ...]]
    seeds: tuple[Seeds, ...]

    @property
    def recipes(self) -> list[str]:
        """Published runs with the network and the number of epochs of a run."""
        return list(dict.fromkeys(name for run in self.runs if (name := recipe_of(run.settings))))


def compare_runs(folders: Sequence[str | Path]) -> Comparison:
    """Read output folders and compare them. Raises ValueError: one is no run, or is named twice."""
    paths = [Path(folder) for folder in folders]
    resolved = [path.resolve() for path in paths]
    for place, path in enumerate(resolved):
        if path in resolved[:place]:
            raise ValueError(f"{paths[place]} is named twice; leave one out")
    runs = tuple(map(read_run, paths))
    short = [path.name for path in resolved]
    names = tuple(name if short.count(name) == 1 else str(path) for name, path in zip(short, paths))
    keys = sorted({key for run in runs for key in run.settings} - {"output_dir", "local_rank"})
    rows = {key: tuple(_value(run, key) for run in runs) for key in keys}
    rows |= {f"({key})": tuple(_made_with(run, key) for run in runs) for key in ("commit", "device", "versions")}
    differences = {key: row for key, row in rows.items() if len({*row} - {UNKNOWN}) > 1}
    return Comparison(runs, names, differences, _seeds(runs))


def _value(run: Run, key: str) -> str:
    return _shown(run.settings[key]) if key in run.settings else UNKNOWN


def _made_with(run: Run, key: str) -> str:
    return _shown(run.about[key]) if key in run.about else UNKNOWN


def _shown(value: Any) -> str:
    try:
        return printable(value if isinstance(value, str) else json.dumps(value))
    except (RecursionError, ValueError):
        return UNKNOWN


def _seeds(runs: Sequence[Run]) -> tuple[Seeds, ...]:
    groups: dict[str, dict[str, Run]] = {}
    for run in runs:
        if run.settings and run.epochs:
            groups.setdefault(_key(run), {}).setdefault(_value(run, "seed"), run)
    found = []
    for group in groups.values():
        alike = tuple(group.values())
        common = set.intersection(*({epoch.number for epoch in run.evaluated} for run in alike))
        if len(alike) < 2 or not common:
            continue
        end = max(common)
        last = [next(epoch for epoch in run.evaluated if epoch.number == end) for run in alike]
        best = [
            max(
                (epoch for epoch in run.evaluated if epoch.number <= end), key=lambda epoch: epoch.metrics.get("AP", -1)
            )
            for run in alike
        ]
        found.append(Seeds(alike, end, _spread(last), _spread(best)))
    return tuple(found)


def _key(run: Run) -> str:
    """The same for runs that compute the same except for random numbers."""
    settings = {name: value for name, value in run.settings.items() if name not in _PLACES}
    hashes = run.about.get("annotations_sha256")
    if hashes:  # the data are known: their places do not matter
        settings = {name: value for name, value in settings.items() if name not in _DATA} | {"data": hashes}
    resume = str(run.settings.get("resume", ""))
    own = resume in ("", "auto") or Path(resume).parent == Path(str(run.settings.get("output_dir", "")))
    return json.dumps([settings, "" if own else resume, run.epochs[0].number], sort_keys=True)


def _spread(epochs: Sequence[Epoch]) -> Spread:
    names = [name for name in METRICS if all(name in epoch.metrics for epoch in epochs)]
    values = {name: [epoch.metrics[name] for epoch in epochs] for name in names}
    return Spread(
        {name: statistics.mean(of_name) for name, of_name in values.items()},
        {name: statistics.stdev(of_name) for name, of_name in values.items()},
    )


def table(found: Comparison) -> str:
    """All of a comparison in lines for the console."""
    label = {id(run): shorter(printable(name), 40) for run, name in zip(found.runs, found.names)}
    lines = [f"note: {printable(problem)}" for run in found.runs for problem in run.problems]
    rows: list[tuple[str, str, dict[str, float]]] = []
    for run in found.runs:
        name = label[id(run)]
        state = f"{run.done} of {run.planned} epochs" if run.planned else f"{run.done} epochs"
        lines.append(f"{name}: {state if run.epochs or not run.evaluation else 'an evaluation'}")
        if run.last:
            rows.append((name, f"last, {run.last.number}", run.last.metrics))
        if run.best:
            rows.append((name, f"best, {run.best.number}", run.best.metrics))
        if run.evaluation:
            rows.append((name, "eval.json", run.evaluation.metrics))
    if len(found.runs) > 1:
        lines += ["", "flags that differ:" if found.differences else "no flag differs"]
        width = max(map(len, found.differences), default=0)
        for key, values in found.differences.items():
            of_value: dict[str, list[str]] = {}
            for run, value in zip(found.runs, values):
                of_value.setdefault(value, []).append(label[id(run)])
            texts = [f"{shorter(value, 60) or 'empty'} ({', '.join(names)})" for value, names in of_value.items()]
            lines.append(f"  {printable(key):{width}}  {'; '.join(texts)}")
    for seeds in found.seeds:
        name = f"{len(seeds.runs)} seeds: {', '.join(label[id(run)] for run in seeds.runs)}"
        for which, spread in ((f"last, {seeds.epoch}", seeds.last), ("best", seeds.best)):
            rows.append((f"mean of {name}", which, spread.mean))
            rows.append(("  standard deviation", which, spread.deviation))
    if not rows:
        return "\n".join([*lines, "", "no evaluation yet"])
    width, second = (max(len(row[place]) for row in rows) for place in (0, 1))
    width = min(width, 60)
    lines += ["", f"{'':{width}}  {'epoch':{second}} " + "".join(f"{name:>7}" for name in METRICS)]
    for name, which, metrics in rows:
        cells = (f"{metrics[each]:7.4f}" if each in metrics else f"{'-':>7}" for each in METRICS)
        lines.append(f"{shorter(name, width):{width}}  {which:{second}} " + "".join(cells))
    return "\n".join(lines)


def draw(found: Comparison, figure: Any) -> None:
    """Training loss and AP of the runs on a figure of matplotlib, and the published curves of their recipes, dashed."""
    panels = dict(zip(("train_loss", "AP"), figure.subplots(1, 2)))
    lines, texts = [], []

    def plot(label: str, values: Callable[[str], dict[int, float]], **style: Any) -> None:
        curves = {key: values(key) for key in panels}
        drawn = [panels[key].plot(*zip(*curve.items()), **style)[0] for key, curve in curves.items() if curve]
        if drawn:
            lines.append(drawn[0])
            texts.append(label)

    for place, (run, name) in enumerate(zip(found.runs, found.names)):
        plot(name, run.by_epoch, color=f"C{place % 10}", marker="o", markersize=2.5)
    for place, name in enumerate(found.recipes):
        values = partial(published_by_epoch, name)
        plot(f"published {name}", values, color=("black", "dimgray")[place % 2], linestyle="--")
    panels["train_loss"].set(title="training loss", xlabel="epoch")
    panels["AP"].set(title="AP", xlabel="epoch")
    for panel in panels.values():
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        if not panel.lines:
            panel.text(0.5, 0.5, "none yet", ha="center", transform=panel.transAxes)
    if lines:  # texts afterwards: one that begins with _ would be left out, and $ starts a formula
        legend = figure.legend(lines, [" "] * len(lines), loc="outside lower center", ncols=2, frameon=False)
        for text, label in zip(legend.get_texts(), texts):
            text.set(text=shorter(printable(label), 50), parse_math=False)


def write_picture(found: Comparison, path: Path, *, overwrite: bool) -> None:
    """The curves as a PNG. Raises ValueError: the file cannot be written, or is something else's."""
    from matplotlib.figure import Figure  # a second to import

    if path.suffix.lower() != ".png":
        raise ValueError(f"`picture` {path} is no PNG; name a file that ends in .png")
    check_place(path, _MARK, name="picture", overwrite=overwrite)
    figure = Figure(figsize=(11, 4.2 + 0.2 * (len(found.runs) // 2)), dpi=110, layout="constrained")
    draw(found, figure)
    with whole_file(path) as temporary:
        figure.savefig(temporary, metadata={"Software": _MARK})


def check_place(path: Path, mark: str, *, name: str, overwrite: bool) -> None:
    """Make the folder of a file to write. What is there is replaced if `mark` shows that it is ours, or if asked to.

    Raises ValueError, which names the argument `name`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() or path.is_symlink():
            if not path.is_file():
                raise ValueError(f"`{name}` {path} is no file; name another")
            with open(path, "rb") as file:
                if mark.encode() not in file.read(2000) and not overwrite:
                    raise ValueError(f"`{name}` {path} is something else's; `overwrite` replaces it, or name another")
    except OSError as error:
        raise ValueError(f"`{name}` {path} cannot be written: {error.strerror}; name another file") from None
