"""Training curves from the lines of log.txt."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from samdetr.util.files import whole_file


def plot_training_curves(log_lines: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Losses, learning rate, AP and AP50 by epoch, from the lines of log.txt; the suffix of `path` says the format.

    Keys that a line lacks leave a gap. Of an epoch that a resumed run wrote twice, the later line counts.
    """
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure  # here, because nothing else needs it and it takes a second to import
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    assert log_lines, "no lines to plot"
    lines = sorted({line["epoch"]: line for line in log_lines}.values(), key=lambda line: line["epoch"])

    def plot(panel: Axes, key: str, index: int | None = None, *, label: str = "", **style: Any) -> None:
        found = [line for line in lines if line.get(key) is not None]
        values = {line["epoch"]: line[key] if index is None else line[key][index] for line in found}
        # COCO's metrics are -1 where they are not defined.
        values = {
            epoch: value for epoch, value in values.items() if value is not None and (index is None or value >= 0)
        }
        if values:
            *_, last = values.values()
            label = label.format(last=last, best=max(values.values()))
            panel.plot(*zip(*values.items()), label=label, marker="o", **style)

    # Fixed margins: to look for the best ones takes as long as all the rest, after each epoch.
    margins = {"left": 0.09, "right": 0.99, "bottom": 0.11, "top": 0.93, "wspace": 0.12, "hspace": 0.18}
    figure = Figure(figsize=(11, 4.6), dpi=130)
    panels = figure.subplot_mosaic([["loss", "ap"], ["rate", "ap"]], height_ratios=[4, 1], gridspec_kw=margins)

    for key, label, colour in (
        ("train_loss", "training, sum over layers", "#1f4e79"),
        ("test_loss", "validation, sum over layers", "#d1495b"),
        ("train_loss_ce", "classes, last layer, training", "#6c9a8b"),
        ("train_loss_bbox", "L1 of boxes, last layer, training", "#e0a030"),
        ("train_loss_giou", "GIoU of boxes, last layer, training", "#8d6a9f"),
    ):
        style = "-" if "sum" in label else "--"
        plot(panels["loss"], key, label=label, color=colour, linestyle=style, markersize=2.5)
    panels["loss"].set(yscale="log", ylabel="loss", title="Losses")  # the sum is some twenty times a single term
    panels["loss"].legend(frameon=False, fontsize=8)
    panels["loss"].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels["loss"].yaxis.set_minor_formatter(NullFormatter())

    plot(panels["rate"], "train_lr", color="#555555", markersize=2.5)
    panels["rate"].set(xlabel="epoch", ylabel="learning rate", ylim=(0, None))

    for key, index, name, colour in (
        ("test_coco_eval_bbox", 1, "AP50", "#e0a030"),
        ("test_coco_eval_bbox", 0, "AP", "#1f4e79"),
        ("test_ema_coco_eval_bbox", 0, "AP, averaged weights", "#6c9a8b"),
    ):
        label = name + ": last {last:.3f}, best {best:.3f}"
        plot(panels["ap"], key, index, label=label, color=colour, markersize=3)
    panels["ap"].set(xlabel="epoch", ylim=(0, None), title="Average precision on the validation split")
    if panels["ap"].lines:
        panels["ap"].legend(frameon=False, fontsize=9, loc="lower right")
    else:
        panels["ap"].text(0.5, 0.5, "no evaluation yet", ha="center", transform=panels["ap"].transAxes)

    for panel in panels.values():
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        panel.set_xlim(lines[0]["epoch"] - 0.5, lines[-1]["epoch"] + 0.5)
    with whole_file(path) as temporary:
        figure.savefig(temporary)
