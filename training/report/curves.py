"""Curves of runs as SVG. Names are text of users, so they stand in the page and not in the pictures."""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from samdetr.datasets.coco_eval import METRICS
from samdetr.training.comparison import Comparison
from samdetr.training.published import published_by_epoch
from samdetr.training.runs import Run

Curve = Mapping[int, float]
_TERM = re.compile(r"train_(loss_[a-z]+)(?:_(\d+|enc|dn))?")
_LAYERS = 12  # lines of a panel at most
_LARGEST = 1e100  # value of a run that diverged, whose square is a number
THIN = {"linewidth": 0.8, "alpha": 0.6, "markersize": 1.5}


def colour(place: int) -> str:
    """Of a run by its place: twenty that can be told apart, again from the start after that."""
    from matplotlib import colormaps, colors  # takes a second, as all of matplotlib

    return colors.to_hex(colormaps["tab10" if place % 20 < 10 else "Dark2"](place % 10))


def seeds_colour(found: Comparison, place: int) -> str:
    """Of the mean of the runs that differ by seed alone, of which there may be several groups: that of the first."""
    return colour(found.runs.index(found.seeds[place].runs[0]))


def panel(title: str, curves: Sequence[tuple[Curve, dict[str, Any]]], *, band: Sequence[tuple] = ()) -> bytes | None:
    """One picture of some curves over epochs, each with its style; `band`: epochs, low and high values, colour. None if
    there is nothing to draw."""
    if not any(curve for curve, _ in curves):
        return None
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.2, 2.9), layout="constrained")
    axes = figure.subplots()
    for epochs, low, high, of_band in band:
        axes.fill_between(epochs, low, high, color=of_band, alpha=0.2, linewidth=0 if len(epochs) > 1 else 4)
    for curve, style in curves:
        if curve:
            points: Any = zip(*((epoch, min(max(v, -_LARGEST), _LARGEST)) for epoch, v in sorted(curve.items())))
            look: dict[str, Any] = {"linewidth": 1.4, "marker": "o", "markersize": 2} | style
            axes.plot(*points, **look)
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if any("label" in style for _, style in curves):
        axes.legend(fontsize=8, frameon=False)
    text = io.BytesIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def losses(found: Comparison) -> dict[str, bytes]:
    """A panel for the sums and for each term of the last layer."""
    terms = dict.fromkeys(key for run in found.runs for epoch in run.epochs for key in epoch.values)
    keys = ["train_loss", "test_loss", *(key for key in terms if (t := _TERM.fullmatch(key)) and t[2] is None)]
    return _all_runs(found, keys)


def precision(found: Comparison) -> dict[str, bytes]:
    """Panels of AP, AP50 and the size buckets."""
    return _all_runs(found, METRICS[:6])


def _all_runs(found: Comparison, keys: Sequence[str]) -> dict[str, bytes]:
    """A panel for each key, with all runs and, dashed, the published ones. Runs that differ by seed alone are thin
    lines around their mean, which has a band of one standard deviation."""
    panels = {}
    alike = {id(run) for seeds in found.seeds for run in seeds.runs}
    for key in keys:
        curves = [
            (run.by_epoch(key), {"color": colour(place), **(THIN if id(run) in alike else {})})
            for place, run in enumerate(found.runs)
        ]
        curves += [(published_by_epoch(recipe, key), dashed(place)) for place, recipe in enumerate(found.recipes)]
        bands = []
        for place, seeds in enumerate(found.seeds):
            of_all = {epoch: v for epoch, v in seeds.over_epochs(key).items() if len(v) == len(seeds.runs)}
            spread = {epoch: v for epoch, v in of_all.items() if max(map(abs, v)) < _LARGEST}
            if spread:
                mean = {epoch: statistics.mean(values) for epoch, values in spread.items()}
                width = {epoch: statistics.stdev(values) for epoch, values in spread.items()}
                low, high = ([mean[epoch] + sign * width[epoch] for epoch in mean] for sign in (-1, 1))
                of_seeds = seeds_colour(found, place)
                bands.append((list(mean), low, high, of_seeds))
                curves.append((mean, {"color": of_seeds, "linewidth": 2.2}))
        if picture := panel(key.replace("_", " "), curves, band=bands):
            panels[key] = picture
    return panels


def layers(run: Run) -> dict[str, bytes]:
    """A panel for each term with a line for each decoder layer, the proposals (enc) and denoising queries (dn)."""
    from matplotlib import colormaps

    found: dict[str, dict[str, None]] = {}
    for key in dict.fromkeys(key for epoch in run.epochs for key in epoch.values):
        if match := _TERM.fullmatch(key):
            found.setdefault(match[1], {})[match[2] or "last"] = None
    panels = {}
    for term, suffixes in found.items():
        names = sorted(suffixes, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0))
        names = [name for name in names if name != "last"][: _LAYERS - 1] + ["last"] * ("last" in suffixes)
        if len(names) < 2:
            continue
        curves = [
            (
                run.by_epoch(f"train_{term}" + ("" if name == "last" else f"_{name}")),
                {"color": colormaps["viridis"](0.9 * place / (len(names) - 1)), "label": name},
            )
            for place, name in enumerate(names)
        ]
        if picture := panel(f"{term.replace('_', ' ')} by layer", curves):
            panels[term] = picture
    return panels


def dashed(place: int) -> dict[str, Any]:
    """Style of the curve of a published run."""
    return {"color": ("black", "dimgray", "silver")[place % 3], "linestyle": "--", "marker": ""}
