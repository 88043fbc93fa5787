"""One HTML page about one run or several: it needs no network and no other file.

    samdetr report output/run
    samdetr report output/seed1 output/seed2 output/other --output runs.html

Settings that differ, the 12 COCO figures, AP and loss curves by term and layer, with the published curve where a run
has the network and the number of epochs of one; after `--eval` into the same folder also the figures of each class,
precision and recall, the confusion matrix, and the best and the worst images with objects and detections; where the
queries look in the best one, if the checkpoint is still there. Unfinished runs and damaged files will do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from samdetr.cli import program_parser
from samdetr.inference.explain import check_points, explain
from samdetr.inference.predictor import load
from samdetr.training.comparison import check_place, compare_runs
from samdetr.training.report.page import MARK, write_page
from samdetr.training.runs import Run
from samdetr.util.command_line import run_command
from samdetr.util.logger import log, printable

TITLES = {
    "points": "Salient points by decoder layer",
    "sampling": "Sampling points of the encoder",
    "sampling_queries": "Sampling points of the decoder",
}


def number(text: str) -> int:
    if not text.isdecimal() or int(text) > 100:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 100")
    return int(text)


def where_it_looks(run: Run, image: Path) -> dict[str, Image.Image]:
    """Salient points of each decoder layer, sampling points of the encoder and the decoder, of the network that was
    evaluated, if its checkpoint is still here. Raises ValueError."""
    evaluation = run.evaluation
    source = str(evaluation.settings.get("resume", "")) if evaluation else ""
    if not Path(source).is_file():
        raise ValueError(f"the checkpoint {source} is not here")
    predictor = load(source, device="cpu")
    wanted: dict[str, Any] = {}
    for points in ({"salient_points": True}, {"sampling_points": "best"}):
        with suppress(ValueError):  # the network has none
            check_points(predictor, **points)  # type: ignore[arg-type]
            wanted |= points
    threshold = evaluation.threshold if evaluation else 0.0
    _, pictures = explain(predictor, str(image), threshold=min(max(threshold, 0.0), 1.0), **wanted)
    return {TITLES[name]: picture for name, picture in pictures.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = program_parser("report.py", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a run")
    parser.add_argument(
        "--output", type=Path, default=Path("output/report.html"), metavar="FILE", help="(default: output/report.html)"
    )
    parser.add_argument(
        "--images", type=number, default=4, metavar="N", help="of the best and of the worst, at most 100 (default: 4)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE even if it is something else's")
    args = parser.parse_args(argv)

    def run() -> None:
        found = compare_runs(args.runs)
        check_place(args.output, MARK, name="output", overwrite=args.overwrite)
        write_page(found, args.output, images=args.images, explain=where_it_looks)
        for problem in (problem for run in found.runs for problem in run.problems):
            log(f"note: {printable(problem)}")
        log(f"the report is in {args.output}")

    return run_command("report.py", run)


if __name__ == "__main__":
    sys.exit(main())
