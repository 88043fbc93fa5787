"""The page: one file of HTML that fetches nothing. Everything that files of a run hold is escaped."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from samdetr.datasets.coco_eval import METRICS
from samdetr.training.comparison import Comparison
from samdetr.training.published import departures, recipe_of
from samdetr.training.report import curves
from samdetr.training.report.images import best_and_worst, jpeg, some_images
from samdetr.training.runs import Run
from samdetr.util.files import whole_file
from samdetr.util.logger import duration, printable, shorter
from samdetr.util.regular_files import open_regular

MARK = "<!-- samdetr report -->"
PICTURES = {"precision_recall.png": "Precision and recall", "confusion_matrix.png": "Confusion matrix"}
_LARGEST = 20_000_000  # bytes of a picture
_CLASSES = 1000  # rows of a table

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.45 system-ui, sans-serif; color: #18181b; background: #fff; max-width: 1240px; margin: 0 auto;
       padding: 0 12px 40px; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; border-bottom: 1px solid #d4d4d8; }
h3 { font-size: 1.05rem; margin-bottom: .3rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 10px; border-bottom: 1px solid #e4e4e7; text-align: right; vertical-align: top;
         overflow-wrap: normal; }
th:first-child, td:first-child { text-align: left; max-width: 22rem; overflow-wrap: anywhere; min-width: 11rem; }
table:not(.text) td:nth-child(2) { white-space: nowrap; }
thead th { border-bottom: 2px solid #a1a1aa; white-space: nowrap; }
.text td { text-align: left; } .text th { text-align: left; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); gap: 10px; }
.grid img, .wide img { width: 100%; height: auto; display: block; }
.grid img { max-width: 480px; } .wide { overflow-x: auto; } .wide img { min-width: 640px; max-width: 1000px; }
.sheets { display: flex; flex-wrap: wrap; gap: 6px 24px; }
.sheets figure { max-width: 100%; overflow-x: auto; } .sheets img { display: block; max-width: max(100%, 640px); }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: .875rem; }
.legend svg { vertical-align: middle; margin-right: 6px; }
.problems { background: #fef3c7; padding: 8px 12px 8px 28px; border-radius: 4px; }
.pairs { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(520px, 100%), 1fr)); gap: 10px; }
.pairs div { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(250px, 100%), 1fr)); gap: 4px; }
.pairs img { width: 100%; height: auto; } figure { margin: 0; } figcaption { font-size: .875rem; }
.note { color: #52525b; font-size: .875rem; }
"""


# Where the network looks in the image of a file: what it found, and pictures by title; None where it has no such thing.
Look = Callable[[Path], tuple[str, Mapping[str, Image.Image | None]]]
Explain = Callable[[Run], Look]  # loads the network of a run; both raise ValueError


def write_page(found: Comparison, path: Path, *, images: int, looks: int, explain: Explain) -> None:
    """Write the report of runs. `images`: number of best images, and of worst ones; `looks`: number of images in which
    it shows where queries look. The caller has checked the place."""
    with whole_file(path) as temporary:
        temporary.write_text(page(found, images=images, looks=looks, explain=explain), encoding="utf-8")


def page(found: Comparison, *, images: int, looks: int, explain: Explain) -> str:
    """The whole page."""
    title = "Report of " + (found.names[0] if len(found.runs) == 1 else f"{len(found.runs)} runs")
    sections = [
        _overview(found), _problems(found), _differences(found), _metrics(found), _time(found),
        _section("AP", _legend(found), _grid(curves.precision(found)), _bands(found)),
        _section("Losses", _legend(found), _grid(curves.losses(found)), _bands(found)),
        *(_section(f"Losses by layer: {text(name)}", _grid(curves.layers(run))) for run, name in _named(found)),
        *(_evaluation(run, name, images) for run, name in _named(found)),
        *(_where_it_looks(run, name, looks, explain) for run, name in _named(found) if looks),
    ]  # fmt: skip
    return (
        f'<!DOCTYPE html>\n{MARK}\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{_STYLE}</style></head>\n<body><h1>{text(title)}</h1>\n"
        + "\n".join(filter(None, sections))
        + "\n</body></html>\n"
    )


def text(value: object, longest: int = 200) -> str:
    """Anything as text of one line in HTML."""
    return escape(shorter(printable(str(value)), longest))


def _named(found: Comparison) -> Iterable[tuple[Run, str]]:
    return zip(found.runs, found.names)


def _section(title: str, *parts: str) -> str:
    """With its heading, `title` in HTML; nothing if the parts after a legend are empty."""
    body = [part for part in parts if part]
    return f"<section><h2>{title}</h2>{''.join(body)}</section>" if any("legend" not in part for part in body) else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Cells are HTML already."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _image(content: bytes, kind: str, alt: str) -> str:
    return f'<img alt="{text(alt)}" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'


def _grid(panels: Mapping[str, bytes]) -> str:
    pictures = "".join(_image(svg, "svg+xml", f"{name} over epochs") for name, svg in panels.items())
    return f'<div class="grid">{pictures}</div>' if panels else ""


def _legend(found: Comparison) -> str:
    def entry(stroke: str, dash: str, name: str, width: int = 3) -> str:
        line = f'<line x1="0" y1="5" x2="28" y2="5" stroke="{stroke}" stroke-width="{width}"{dash}/>'
        return f'<li><svg width="28" height="10" aria-hidden="true">{line}</svg>{text(name, 80)}</li>'

    entries = [entry(curves.colour(place), "", name) for place, name in enumerate(found.names)]
    for place, name in enumerate(found.recipes):
        entries.append(entry(curves.dashed(place)["color"], ' stroke-dasharray="6 4"', f"published {name}, COCO"))
    for place, name in enumerate(_groups(found)):
        entries.append(entry(curves.seeds_colour(found, place), "", name, 6))
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _overview(found: Comparison) -> str:
    rows = []
    for run, name in _named(found):
        done = "-" if run.evaluation and not run.epochs else f"{run.done} of {run.planned or '?'}"
        known = [epoch if epoch and "AP" in epoch.metrics else None for epoch in (run.last, run.best)]
        ap = [f"{epoch.metrics['AP']:.4f} (epoch {epoch.number})" if epoch else "-" for epoch in known]
        versions = run.about.get("versions")
        torch = versions.get("torch") if isinstance(versions, dict) else None
        about = [text(run.about.get(key) or "-", 60) for key in ("device", "commit", "command")]
        rows.append([text(name, 80), done, *ap, text(torch or "-"), *about])
    head = ["run", "epochs", "last AP", "best AP", "torch", "device", "commit", "command"]
    return _section("Runs", _table(head, rows, "text"))


def _problems(found: Comparison) -> str:
    lines = [f"<li>{text(problem, 500)}</li>" for run in found.runs for problem in run.problems]
    return _section("What could not be read", f'<ul class="problems">{"".join(lines)}</ul>') if lines else ""


def _differences(found: Comparison) -> str:
    rows = [[text(key), *(text(value) or "empty" for value in row)] for key, row in found.differences.items()]
    parts = []
    if len(found.runs) > 1:
        head = ["setting", *(text(name, 40) for name in found.names)]
        parts.append(_table(head, rows, "text") if rows else "<p>No setting differs.</p>")
    for run, name in _named(found):
        if recipe := recipe_of(run.settings):
            others = departures(run.settings, recipe)
            how = f"differs in {text(', '.join(others), 1000)}" if others else "has its optimisation, losses and sizes"
            parts.append(f"<p>{text(name, 80)}, beside the published {recipe}: {how}.</p>")
    return _section("Settings that differ", *parts)


def _metrics(found: Comparison) -> str:
    rows: list[tuple[str, str, Mapping[str, float]]] = []
    for run, name in _named(found):
        rows += [(name, f"last, {run.last.number}", run.last.metrics)] if run.last else []
        rows += [(name, f"best, {run.best.number}", run.best.metrics)] if run.best else []
        rows += [(name, "eval.json", run.evaluation.metrics)] if run.evaluation else []
    if not rows:
        return _section("The 12 COCO figures", "<p>No evaluation yet.</p>")
    cells = [[text(name, 80), text(which), *_figures(metrics, METRICS)] for name, which, metrics in rows]
    for seeds, title in zip(found.seeds, _groups(found)):
        for which, spread in ((f"last, {seeds.epoch}", seeds.last), ("best", seeds.best)):
            pairs = zip(_figures(spread.mean, METRICS), _figures(spread.deviation, METRICS))
            cells.append([text(title), which, *(f"{m} ±&nbsp;{d}" if m != "-" else m for m, d in pairs)])
    note = '<p class="note">Mean ± one standard deviation (n - 1) of runs that differ by seed alone.</p>' * bool(
        found.seeds
    )
    return _section("The 12 COCO figures", _table(["run", "epoch", *METRICS], cells), note)


def _groups(found: Comparison) -> list[str]:
    """Titles of the groups of runs that differ by seed alone."""
    name = {id(run): name for run, name in _named(found)}
    return [f"mean of {len(s.runs)} seeds: {', '.join(name[id(run)] for run in s.runs)}" for s in found.seeds]


def _bands(found: Comparison) -> str:
    if not found.seeds:
        return ""
    return (
        '<p class="note">Thick lines: mean of runs that differ by seed alone, at epochs that all of them have; bands: '
        "one standard deviation (n - 1) around it. Thin lines: these runs.</p>"
    )


def _time(found: Comparison) -> str:
    rows = []
    for run, name in _named(found):
        if not (spent := run.spent):
            rows.append([text(name, 80), *["not recorded" if run.epochs else "-"] * 6])
            continue
        parts = (spent.train_images, spent.train_seconds), (spent.test_images, spent.test_seconds)
        rates = [f"{images / seconds:.1f}" if images and seconds else "-" for images, seconds in parts]
        spans = [spent.train_seconds, spent.test_seconds, run.seconds_left]
        hours = ["-" if seconds is None else f"{seconds / 3600:.2f} ({duration(seconds)})" for seconds in spans]
        rows.append([text(name, 80), *rates, *hours, f"{spent.peak_mib:,.0f} MiB" if spent.peak_mib else "-"])
    head = [
        "run",
        "images/s, training",
        "images/s, evaluation",
        "hours of training",
        "hours of evaluation",
        "hours left",
    ]
    note = (
        '<p class="note">Hours (and h:mm:ss) of all starts of a run, as far as an epoch ended or the run stopped by '
        "itself. Hours left: the missing epochs at the mean time of those done. Peak memory: of tensors on a GPU, else "
        "of the process.</p>"
    )
    return _section("Throughput and hours", _table([*head, "peak memory"], rows), note)


def _figures(values: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    numbers = [values.get(name) for name in names]
    return [f"{v:.4f}" if isinstance(v, float) and 0 <= v <= 1 else "-" for v in numbers]


def _evaluation(run: Run, name: str, images: int) -> str:
    """Classes and pictures that `--eval` wrote."""
    parts = []
    if run.evaluation and run.evaluation.classes:
        columns = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
        rows = []
        for row in run.evaluation.classes[:_CLASSES]:
            number = row.get("num_objects")
            best = row.get("best_f1")
            figures = [*_figures(row, columns), *_figures(best if isinstance(best, dict) else {}, ("f1", "threshold"))]
            rows.append([text(row["name"], 60), text(number, 12) if isinstance(number, int) else "-", *figures])
        parts.append(_table(["class", "objects", *columns, "best F1", "from score"], rows))
        if len(run.evaluation.classes) > _CLASSES:
            parts.append(f'<p class="note">and {len(run.evaluation.classes) - _CLASSES:,} more classes</p>')
    for file, title in PICTURES.items():
        if content := _picture(run.folder / file):
            parts.append(f'<h3>{title}</h3><div class="wide" tabindex="0">{_image(content, "png", title)}</div>')
    if run.evaluation and run.evaluation.settings and images:
        parts.append(_best_and_worst(run, images))
    return _section(f"Evaluation: {text(name, 80)}", *parts)


def _best_and_worst(run: Run, images: int) -> str:
    try:
        groups = best_and_worst(run, images)
    except ValueError as error:
        return f'<h3>Images</h3><p class="note">No images: {text(error, 500)}</p>'
    parts = []
    for title, pairs in zip(("Best images", "Worst images"), groups):
        figures = [
            f"<figure><div>{_image(pair.objects, 'jpeg', 'objects')}"
            f"{_image(pair.detections, 'jpeg', 'detections')}</div>"
            f"<figcaption>{text(pair.title)}</figcaption></figure>"
            for pair in pairs
        ]
        parts += [f"<h3>{title}</h3>", f'<div class="pairs">{"".join(figures)}</div>'] if figures else []
    return "".join(parts)


def _where_it_looks(run: Run, name: str, number: int, explain: Explain) -> str:
    """Sheets of points, prior and attention in a few images, or a line that says why there are none."""
    parts, lacking = ['<p class="note">For the best detection in each image. Colours are those of heads.</p>'], ""
    try:
        if not run.settings:
            raise ValueError("the run's settings are not known")
        look, files = explain(run), some_images(run, number)
    except (OSError, ValueError) as error:
        return _section(f"Where queries look: {text(name, 80)}", _no_sheets(error))
    for file in files:
        parts.append(f"<h3>{text(file.name)}</h3>")
        try:
            what, pictures = look(file)
        except (OSError, ValueError) as error:
            parts.append(_no_sheets(error))
            continue
        sheets = (
            f'<figure tabindex="0"><figcaption>{title}</figcaption>{_image(jpeg(picture), "jpeg", title)}</figure>'
            for title, picture in pictures.items()
            if picture
        )
        parts.append(f'<p>{text(what)}</p><div class="sheets">{"".join(sheets)}</div>')
        lacking = "; ".join(title.lower() for title, picture in pictures.items() if not picture)
    if lacking:
        model = text(run.settings.get("model", "network"), 60)
        parts.append(f'<p class="note">Not in this {model}: {lacking}.</p>')
    return _section(f"Where queries look: {text(name, 80)}", *parts)


def _no_sheets(error: Exception) -> str:
    return f'<p class="note">No sheets: {text(error, 500)}</p>'


def _picture(path: Path) -> bytes | None:
    """A PNG that is there and not too large."""
    try:
        with open_regular(path) as file:
            content = file.read(_LARGEST + 1)
    except (OSError, ValueError):
        return None
    return content if content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) <= _LARGEST else None
