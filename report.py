"""One HTML page about one run or several: it needs no network and no other file.

    samdetr report output/run
    samdetr report output/seed1 output/seed2 output/other --output runs.html

Settings that differ, the 12 COCO figures, AP and loss curves by term and layer, with the published curve where a run
has the network and the number of epochs of one; after `--eval` into the same folder also the figures of each class,
precision and recall, the confusion matrix, and the best and the worst images with objects and detections. If checkpoint
and images are still there, sheets of where the query of the best detection looks, by head and layer: salient points,
sampling points, prior and attention. Unfinished runs and damaged files will do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from samdetr.cli import import_plugin, program_parser
from samdetr.inference.explain import check_points, explain
from samdetr.inference.predictor import load
from samdetr.training.checkpoints import BEST, NEWEST
from samdetr.training.comparison import check_place, compare_runs
from samdetr.training.report.page import MARK, Look, write_page
from samdetr.training.runs import Run
from samdetr.util.command_line import run_command
from samdetr.util.logger import log, printable

TITLES = {
    "points": "Salient points by decoder layer",
    "prior": "Prior by decoder layer and head",
    "attention": "Attention by decoder layer and head",
    "sampling": "Sampling points by encoder layer",
    "sampling_queries": "Sampling points by decoder layer",
}


def number(text: str) -> int:
    if not text.isdecimal() or int(text) > 100:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 100")
    return int(text)


def where_it_looks(run: Run) -> Look:
    """By the network of the run's best checkpoint, else of its newest, else of the one that was evaluated. Raises
    ValueError: there is none that can be used."""
    evaluated = str(run.evaluation.settings.get("resume", "")) if run.evaluation else ""
    places = [run.folder / BEST, run.folder / NEWEST, *([Path(evaluated)] if evaluated else [])]
    source = next((place for place in places if place.is_file()), None)
    if source is None:
        raise ValueError(f"no checkpoint is here: {', '.join(map(str, places))}")
    try:
        predictor = load(str(source), device="cpu")
    except ValueError as error:
        raise ValueError(str(error).replace("`source` ", "")) from None
    kinds: dict[str, Any] = {"salient_points": True, "sampling_points": "best", "attention": True}
    wanted: dict[str, Any] = {}
    for name, value in kinds.items():
        with suppress(ValueError):  # the network has none
            check_points(predictor, **{name: value})
            wanted[name] = value

    def look(image: Path) -> tuple[str, dict[str, Image.Image | None]]:
        found, pictures = explain(predictor, str(image), threshold=0, most=1, **wanted)
        if not len(found):
            raise ValueError("nothing is detected, whatever the score")
        best = next(iter(found))
        what = f"The best detection: {best.name} {best.score:.2f}, query {best.query}; {source.name}."
        return what, {title: pictures.get(kind) for kind, title in TITLES.items()}

    return look


def main(argv: Sequence[str] | None = None) -> int:
    parser = program_parser("report.py", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a run")
    parser.add_argument(
        "--output", type=Path, default=Path("output/report.html"), metavar="FILE", help="(default: output/report.html)"
    )
    parser.add_argument(
        "--images", type=number, default=4, metavar="N", help="of the best and of the worst, at most 100 (default: 4)"
    )
    parser.add_argument(
        "--explain", type=number, default=2, metavar="N",
        help="images of the validation set for sheets of where queries look, at most 100; 0: none, which is faster "
        "(default: 2)",
    )  # fmt: skip
    parser.add_argument("--plugin", default="", metavar="MODULE", help="module or .py file that registers a family")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE even if it is something else's")
    args = parser.parse_args(argv)

    def run() -> None:
        if args.plugin:
            import_plugin(args.plugin)
        found = compare_runs(args.runs)
        check_place(args.output, MARK, name="output", overwrite=args.overwrite)
        write_page(found, args.output, images=args.images, looks=args.explain, explain=where_it_looks)
        for problem in (problem for run in found.runs for problem in run.problems):
            log(f"note: {printable(problem)}")
        log(f"the report is in {args.output}")

    return run_command("report.py", run)


if __name__ == "__main__":
    sys.exit(main())
