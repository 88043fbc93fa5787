"""One HTML page about one run or several: it needs no network and no other file.

    samdetr report output/run
    samdetr report output/seed1 output/seed2 output/other --output runs.html

Settings that differ, the 12 COCO figures, AP and loss curves by term and layer, with the published curve where a run
has the network and the number of epochs of one; after `--eval` into the same folder also the figures of each class,
precision and recall, the confusion matrix, and the best and the worst images with objects and detections. Unfinished
runs and damaged files will do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from samdetr.training.comparison import check_place, compare_runs
from samdetr.training.report.page import MARK, write_page
from samdetr.util.command_line import program_name, run_command
from samdetr.util.logger import log, printable


def number(text: str) -> int:
    if not text.isdecimal() or int(text) > 100:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 100")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        program_name("report.py"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
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
        write_page(found, args.output, images=args.images)
        for problem in (problem for run in found.runs for problem in run.problems):
            log(f"note: {printable(problem)}")
        log(f"the report is in {args.output}")

    return run_command("report.py", run)


if __name__ == "__main__":
    sys.exit(main())
