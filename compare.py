"""Compare runs by what they left in their output folders.

    samdetr compare output/a output/b output/c

Prints the flags that differ, the 12 COCO figures of the last epoch that was evaluated and of the best, and mean and
standard deviation over runs that differ by seed alone. Draws losses and AP into one picture, with the published curve
of a recipe dashed. --against says how far every epoch is from a published run, and warns where it is further than
repeated runs are. `samdetr.compare_runs` gives the same as dataclasses.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from samdetr.cli import program_parser
from samdetr.training import judge
from samdetr.training.comparison import compare_runs, table, write_picture
from samdetr.util.command_line import run_command
from samdetr.util.logger import log, printable


def main(argv: Sequence[str] | None = None) -> int:
    parser = program_parser("compare.py", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a run")
    parser.add_argument(
        "--picture", type=Path, default=Path("output/compare.png"), metavar="FILE", help="(default: output/compare.png)"
    )
    parser.add_argument(
        "--against", default="", metavar="{RECIPE,auto}", help="a published run, or that of a run's network"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE even if it is something else's")
    args = parser.parse_args(argv)

    def run() -> None:
        found = compare_runs(args.runs)
        lines = [table(found)]
        if args.against:
            for run, label in zip(found.runs, found.names):
                name = judge.published_name(args.against, run.settings, flag="against")
                epochs = [(each.number, {**each.values, **each.metrics}) for each in run.epochs]
                lines += ["", f"{printable(label)} against {name}:", *judge.table(epochs, name=name)]
        write_picture(found, args.picture, overwrite=args.overwrite)
        log("\n".join([*lines, "", f"curves are in {args.picture}"]))

    return run_command("compare.py", run)


if __name__ == "__main__":
    sys.exit(main())
