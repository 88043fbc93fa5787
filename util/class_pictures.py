"""Pictures of an evaluation by class: precision-recall curves and the confusion matrix."""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from samdetr.util.files import whole_file
from samdetr.util.fonts import letters
from samdetr.util.logger import log, shorter

# matplotlib is imported where it is used, because nothing else needs it and it takes a second.

_LONGEST = 28  # characters of a name
_HIGHLIGHTED = 5  # classes with the highest and the lowest AP50 that have colours, if there are more than twice as many
_LARGEST = 20.0  # side of a matrix in inches


def draw_precision_recall(
    path: str | os.PathLike, *, curves: np.ndarray, ap50: Sequence[float], labels: Sequence[str], families: list[str]
) -> None:
    """Precision at recalls 0, 0.01, ..., 1 of K classes, `curves` (K, 101), of which those below 0 are left out, and
    their mean. `labels` and `families` as of `drawable`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5), dpi=110)
    panel = figure.add_axes((0.08, 0.1, 0.54, 0.8))
    recall = np.linspace(0, 1, curves.shape[1])
    there = [k for k in np.argsort(-np.array(ap50), kind="stable").tolist() if curves[k, 0] >= 0]
    few = len(there) <= 2 * _HIGHLIGHTED
    coloured = there if few else there[:_HIGHLIGHTED] + there[-_HIGHLIGHTED:]
    for k in there if not few else ():
        panel.plot(recall, curves[k], color="#cccccc", linewidth=0.6)
    lines = [panel.plot(recall, curves[k], color=f"C{i}", linewidth=1.2)[0] for i, k in enumerate(coloured)]
    texts = [f"{ap50[k]:.3f}  {labels[k]}" for k in coloured]
    if there:
        mean = curves[there].mean(0)
        lines[:0] = panel.plot(recall, mean, color="black", linewidth=2.5)
        texts[:0] = [f"{mean.mean():.3f}  mean of {len(there)} classes"]
        # Texts are set afterwards: a label that begins with _ would be left out, and $ starts a formula.
        legend = panel.legend(lines, [" "] * len(lines), loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
        legend.set_title("AP50" if few else f"AP50, {_HIGHLIGHTED} best and {_HIGHLIGHTED} worst")
        for text, label in zip(legend.get_texts(), texts):
            text.set(text=label, parse_math=False, family=families, fontsize=9)
    else:
        panel.text(0.5, 0.5, "no class has objects", ha="center", transform=panel.transAxes)
    panel.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision", title="Precision and recall, IoU 0.5")
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def draw_confusion(
    path: str | os.PathLike, *, counts: np.ndarray, labels: Sequence[str], families: list[str], title: str
) -> None:
    """Counts (n, n) of objects by their class (rows) and by that of what found them (columns), coloured by their share
    of the row. Every label and every number is drawn that fits."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    size = len(counts)
    cell = min(max(0.22, min(0.5, 12 / size)), _LARGEST / size)  # inches
    side, margin = max(cell * size, 3.0), 0.075 * max(map(_width, labels)) + 0.6
    cell = side / size
    width, height = side + margin + 1.3, side + margin + 0.5
    figure = Figure(figsize=(width, height), dpi=100)
    panel = figure.add_axes((margin / width, margin / height, side / width, side / height))
    norm = PowerNorm(0.5, 0, 1)  # a root, so that rare confusions are seen
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    panel.imshow(share, cmap="Blues", norm=norm, aspect="auto", interpolation="nearest")
    shown = np.arange(0, size, math.ceil(0.14 / cell))  # the height of a line
    if shown[-1] != size - 1:
        shown[-1] = size - 1  # the background
    style: dict[str, Any] = {"family": families, "fontsize": 7 if cell < 0.3 else 9, "parse_math": False}
    panel.set_xticks(shown, [labels[k] for k in shown.tolist()], rotation=90, **style)
    panel.set_yticks(shown, [labels[k] for k in shown.tolist()], **style)
    if cell >= 0.3:
        for row, column in np.argwhere(counts):
            colour = "white" if share[row, column] > 0.4 else "black"
            text = _short(int(counts[row, column]))
            panel.text(column, row, text, color=colour, ha="center", va="center", fontsize=min(16 * cell, 10))
    panel.set(xlabel="detected as", ylabel="object")
    panel.set_title(title, fontsize=10, loc="left")
    panel.axhline(size - 1.5, color="#888888", linewidth=0.8)
    panel.axvline(size - 1.5, color="#888888", linewidth=0.8)
    bar = figure.add_axes(((margin + side + 0.25) / width, margin / height, 0.18 / width, side / height))
    figure.colorbar(ScalarMappable(norm, "Blues"), cax=bar, ticks=[0, 0.01, 0.05, 0.1, 0.25, 0.5, 1], format="%g")
    bar.set_ylabel("share of the row")
    _save(figure, path)


def drawable(names: Sequence[str], identities: Sequence[int]) -> tuple[list[str], list[str]]:
    """A label of one line for each name, and the font families that draw all of them; an id for a name that has
    characters of none, with one note."""
    wanted = {ord(character) for name in names for character in name if character.isprintable()}
    families = ["DejaVu Sans"]
    missing = wanted - letters(_font_files().get("DejaVu Sans", ""))
    for family, file in _font_files().items() if missing else ():
        if missing & letters(file):
            families.append(family)
            missing -= letters(file)
        if not missing:
            break
    labels, replaced = [], []
    for name, identity in zip(names, identities):
        if not name.strip() or not all(c.isprintable() and ord(c) not in missing for c in name):
            replaced.append(name)
            name = f"id {identity}"
        labels.append(shorter(name, _LONGEST))
    if replaced:
        some = ", ".join(map(repr, replaced[:3])) + (", ..." if len(replaced) > 3 else "")
        log(f"note: no font here draws the names of {len(replaced)} class(es) ({some}): pictures show ids")
    return labels, families


@cache
def _font_files() -> dict[str, str]:
    """The upright regular font of each family. A "last resort" font has a box for every character, and colour fonts
    cannot be drawn."""
    from matplotlib.font_manager import fontManager

    upright = [font for font in fontManager.ttflist if font.style == "normal" and font.weight in (400, "normal")]
    names = {font.name: font.fname for font in upright}
    return {name: names[name] for name in sorted(names) if not {"color", "colour", "resort"} & {*name.lower().split()}}


def _width(text: str) -> float:
    """In units of about an average Latin letter."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _short(number: int) -> str:
    return f"{number / 1000:.0f}k" if number >= 10_000 else str(number)


def _save(figure: Any, path: str | os.PathLike) -> None:
    with whole_file(path) as temporary:
        figure.savefig(temporary)
