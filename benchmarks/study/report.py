"""Tables and figures of a convergence study, from its result files alone."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from samdetr.util.files import whole_file

BASELINE = "off"
LABELS = {
    "off": "no aligner",
    "aligner": "aligner",
    "smca": "aligner + SMCA",
    "average": "average of the box",
    "maximum": "maximum of the box",
    "point": "1 salient point",
    "ungated": "no re-weighting",
    "image": "search range image",
    "deformable": "Deformable DETR",
    "deformable-aligner": "Deformable DETR + aligner",
    "sap": "SAP-DETR",
    "multiscale": "multi-scale",
}
CHANGES = {  # after a dash, of the rows above
    "slow": "slow points",
    "dropout": "dropout 0.1",
    "denoising": "denoising",
    "box_noise": "denoising of boxes alone",
    "label_noise": "denoising of labels alone",
    "ia_bce": "IA-BCE",
    "mal": "MAL",
    "position": "cost by position",
    "relation": "bias by relations",
}
COLOURS = {
    "off": "#555555",
    "aligner": "#1f4e79",
    "smca": "#d1495b",
}
DASHES = ["-", (0, (1, 1)), "--", (0, (6, 1)), "-.", (0, (3, 1, 1, 1, 1, 1)), (0, (8, 3)), (0, (1, 3)), (0, (5, 5))]
Runs = dict[str, list[dict[str, Any]]]  # by row


def split(row: str) -> tuple[str, str]:
    """The row that it is a change of, and which: "aligner-slow" is ("aligner", "slow"), "aligner" ("aligner", "")."""
    base, _, change = ("", "", row) if row in LABELS else row.rpartition("-")
    return (base, change) if base else (row, "")


def label(row: str) -> str:
    """What a table calls it; "aligner-slow" is "aligner, slow points"."""
    base, change = split(row)
    return LABELS.get(base, base) + (f", {CHANGES.get(change, change)}" if change else "")


def place(row: str) -> tuple[bool, int, int]:
    """Where a table has it: first rows that are no change of others."""
    base, change = split(row)
    return bool(change), [*LABELS, base].index(base), ["", *CHANGES, change].index(change)


def curve(run: dict[str, Any]) -> list[float]:
    """AP after each epoch; what is undefined (-1) counts as 0."""
    return [max(epoch["ap"][0] or 0, 0) for epoch in run["epochs"]]


def epochs_to(target: float, ap: Sequence[float]) -> float | None:
    """The epoch at which AP, 0 at the start and in between on a straight line, first reaches `target`."""
    before = 0.0
    for epoch, now in enumerate(ap):
        if now >= target:
            return epoch + (target - before) / (now - before) if now > before else float(epoch)
        before = now
    return None


def area(ap: Sequence[float]) -> float:
    """Mean height of the curve of AP, which starts at 0."""
    return sum((a + b) / 2 for a, b in zip([0.0, *ap], ap)) / len(ap)


def layer_values(run: dict[str, Any], name: str, layer: int) -> list[float]:
    """A figure of a layer after each epoch; empty if it was not measured."""
    layers = [epoch.get("layers", []) for epoch in run["epochs"]]
    layers = [found for found in layers if found and found[layer].get(name) is not None]
    return [found[layer][name] for found in layers]


def difference(run: dict[str, Any], first: str, second: str, layer: int) -> list[float]:
    return [a - b for a, b in zip(layer_values(run, first, layer), layer_values(run, second, layer))]


def relative_instability(run: dict[str, Any]) -> list[float]:
    """IS over its largest possible value, of each epoch from the second."""
    return [e["instability"] / (2 * e["objects"]) for e in run["epochs"] if e.get("instability") is not None]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation over seeds."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def convergence_table(runs: Runs) -> str:
    number = min(len(run["epochs"]) for of_row in runs.values() for run in of_row)
    shown = sorted({max(number // 4, 1), number // 2 or 1, number})
    finals = [curve(run)[-1] for run in runs.get(BASELINE, [])]
    targets = [share * statistics.mean(finals) for share in (1, 0.9)] if finals else []

    def reached(curves: list[list[float]], target: float) -> str:
        found = [epoch for ap in curves if (epoch := epochs_to(target, ap)) is not None]
        return spread(found, 1) + (f" ({len(found)} of {len(curves)})" if len(found) < len(curves) else "")

    rows = []
    for row, of_row in runs.items():
        curves = [curve(run) for run in of_row]
        cells = [spread([ap[epoch - 1] for ap in curves]) for epoch in shown]
        cells += [spread([area(ap) for ap in curves]), *(reached(curves, target) for target in targets)]
        cpu = [sum(e["cpu_seconds"] for e in run["epochs"]) / 60 for run in of_row if "cpu_seconds" in run["epochs"][0]]
        rows.append([label(row), str(len(of_row)), *cells, spread(cpu, 1)])
    names = [f"AP, epoch {epoch}" for epoch in shown]
    names += ["area", *[f"epochs to AP {target:.3f}" for target in targets], "CPU minutes"]
    return table(["row", "seeds", *names], rows)


def alignment_table(runs: Runs) -> str:
    """After the last epoch, the layers one after the other."""

    def cell(of_row: list[dict[str, Any]], name: str, layers: Sequence[int]) -> str:
        columns = [[v[-1] for run in of_row if (v := layer_values(run, name, layer))] for layer in layers]
        return ", ".join(f"{statistics.mean(column):.2f}" for column in columns) if all(columns) else "-"

    rows = []
    for row, of_row in runs.items():
        of_row = [run for run in of_row if run["epochs"][-1].get("layers")]
        if not of_row:
            continue
        every = range(len(of_row[0]["epochs"][-1]["layers"]))
        names = ("cosine_inside", "cosine_outside", "attention", "saturated", "edge")
        cells = [cell(of_row, name, every) for name in names]
        changes = [relative_instability(run) for run in of_row]
        first, last = ([values[place] for values in changes if values] for place in (0, -1))
        l1 = [v[-1] for run in of_row if (v := layer_values(run, "reference_l1", 0))]
        rows.append([label(row), *cells, spread(l1, 2), spread(first, 2), spread(last, 2)])
    head = ["row", "cosine inside", "outside", "attention inside", "saturated", "to the edge", "L1 of references"]
    return table([*head, "IS, epoch 2", "IS, last epoch"], rows)


LAST = -1  # decoder layer
PANELS: dict[str, Callable[[dict[str, Any]], list[float]]] = {
    "AP": curve,
    "IS / (2 x objects)": relative_instability,
    "attention inside the object - its area, last layer": lambda run: difference(run, "attention", "area", LAST),
    "cosine inside - outside, last layer": lambda run: difference(run, "cosine_inside", "cosine_outside", LAST),
}


def draw(runs: Runs, path: Path, *, rows: Sequence[str], title: str, panels: Sequence[str] = tuple(PANELS)) -> None:
    """Some rows by epoch; bands from least to most."""
    from matplotlib.figure import Figure  # here, because nothing else needs it and it takes a second to import
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11 if len(panels) > 1 else 5.5, 3.2), dpi=90, layout="constrained")
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        read = PANELS[name]
        for row in rows:
            values = [found for run in runs.get(row, []) if (found := read(run))]
            if not values:
                continue
            columns = list(zip(*values))
            epochs = range(len(runs[row][0]["epochs"]) + 1 - len(columns), len(runs[row][0]["epochs"]) + 1)
            seeds = f" ({len(values)} seed{'s' * (len(values) > 1)})"
            means = [statistics.mean(column) for column in columns]
            *_, change = place(row)
            style = {"color": COLOURS.get(split(row)[0]), "linestyle": DASHES[change % len(DASHES)]}
            (line,) = axes.plot(epochs, means, label=label(row) + seeds, **style)
            if len(values) > 1:
                least, most = ([extreme(column) for column in columns] for extreme in (min, max))
                axes.fill_between(epochs, least, most, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set_title(name, fontsize=8)
        axes.set_xlabel("epoch", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylim(0, None)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=4 if len(panels) > 1 else 2, frameon=False, fontsize=8
    )
    figure.suptitle(title, fontsize=10)
    with whole_file(path) as temporary:
        figure.savefig(temporary)


def read_result(file: Path) -> dict[str, Any]:
    """What a run has left. Raises ValueError: it is something else."""
    try:
        run = json.loads(file.read_text())
        assert {"row", "command", "epochs"} <= run.keys()
    except (ValueError, AttributeError, AssertionError):
        raise ValueError(f"{file} is no result of a run; delete it, and the run is made again") from None
    return run


def write_report(output: Path) -> None:
    """Write OUTPUT/report.md and a figure for each setting that has results. Raises ValueError: there are none."""
    files = sorted((output / "results").glob("*.json"))
    if not files:
        raise ValueError(f"`output` {output} has no results; leave `report` out to make some")
    settings: dict[tuple, Runs] = defaultdict(lambda: defaultdict(list))
    for file in files:
        run = read_result(file)
        settings[tuple(run[name] for name in ("data", "size", "images", "number_of_epochs"))][run["row"]].append(run)
    text = []
    for (data, size, images, epochs), found in sorted(settings.items(), key=str):
        runs = {row: found[row] for row in sorted(found, key=place)}
        title = f"{data}, {size} pixels, {images} training images, {epochs} epochs"
        every = [run for of_row in runs.values() for run in of_row]
        share = [e["seconds"] / e["cpu_seconds"] for run in every for e in run["epochs"] if "seconds" in e]
        cost = f"Measuring took {statistics.mean(share):.1%} of the processor time. " if share else ""
        made = {f"{run['processor']}, torch {run['versions']['torch']}, commit {run['commit']}" for run in every}
        text.append(
            f"## {title}\n\n{convergence_table(runs)}\n{alignment_table(runs)}\n{cost}{'; '.join(sorted(made))}.\n"
        )
        name = f"{data}-{size}px-{images}i-{epochs}e"
        coloured = [row for row in COLOURS if row in runs]
        draw(runs, output / f"{name}.png", rows=coloured, title=title)
        draw(runs, output / f"{name}-ap.png", rows=coloured, title=title, panels=["AP"])
        others = [row for row in runs if row not in COLOURS and not split(row)[1]]
        changed = [row for row in runs if split(row)[1]]
        for kind, rows in {"others": others, "changes": changed}.items():
            if rows:
                draw(runs, output / f"{name}-{kind}.png", rows=rows, title=title)
    with whole_file(output / "report.md") as temporary:
        temporary.write_text("\n".join(text))
    print(f"{output / 'report.md'}: {len(files)} runs")
