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


def colour(place: int) -> str:
    """Of a run by its place: twenty that can be told apart, again from the start after that."""
    from matplotlib import colormaps, colors  # takes a second, as all of matplotlib

    return colors.to_hex(colormaps["tab10" if place % 20 < 10 else "Dark2"](place % 10))


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
        axes.fill_between(epochs, low, high, color=of_band, alpha=0.2, linewidth=0)
    for curve, style in curves:
        if curve:
            points: Any = zip(*sorted(curve.items()))
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
    """A panel for the sums and for each term of the last layer, with all runs; published ones dashed."""
    terms = dict.fromkeys(key for run in found.runs for epoch in run.epochs for key in epoch.values)
    keys = ["train_loss", "test_loss", *(key for key in terms if (t := _TERM.fullmatch(key)) and t[2] is None)]
    panels = {}
    for key in keys:
        curves = [(run.by_epoch(key), {"color": colour(place)}) for place, run in enumerate(found.runs)]
        curves += [(published_by_epoch(name, key), _dashed(place)) for place, name in enumerate(found.recipes)]
        if picture := panel(key.replace("_", " "), curves):
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


def precision(found: Comparison) -> dict[str, bytes]:
    """Panels of AP, AP50 and the size buckets; a band of one standard deviation around the mean of seeds."""
    panels = {}
    for name in METRICS[:6]:
        curves = [(run.by_epoch(name), {"color": colour(place)}) for place, run in enumerate(found.runs)]
        curves += [(published_by_epoch(recipe, name), _dashed(place)) for place, recipe in enumerate(found.recipes)]
        bands = []
        for seeds in found.seeds:
            by_epoch = seeds.over_epochs(name)
            spread = {epoch: values for epoch, values in by_epoch.items() if len(values) == len(seeds.runs)}
            if spread:
                centre = [statistics.mean(values) for values in spread.values()]
                width = [statistics.stdev(values) for values in spread.values()]
                low, high = ([c + sign * w for c, w in zip(centre, width)] for sign in (-1, 1))
                bands.append((list(spread), low, high, colour(found.runs.index(seeds.runs[0]))))
        if picture := panel(name, curves, band=bands):
            panels[name] = picture
    return panels


def _dashed(place: int) -> dict[str, Any]:
    return {"color": ("black", "dimgray", "silver")[place % 3], "linestyle": "--", "marker": ""}
