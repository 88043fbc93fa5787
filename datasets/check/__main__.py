"""Check a data set in any layout, and repair its annotation files as far as possible.

    python -m datasets.check data/coco
    python -m datasets.check my_data --fix repaired.json

Exit status: 0 without findings or with notes only, 1 with warnings or errors (with --fix: if any are left), 2 if the
data cannot be checked, 3 if --fix left out more than 5 % of the images or objects of a split and --allow_loss was not
passed. --fix writes the training split to OUT.json and the validation split beside it, to
OUT_val.json; with --split it writes only that split, to OUT.json.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from samdetr.datasets.annotations import Annotations
from samdetr.datasets.check import draw
from samdetr.datasets.check.files import inspect_files
from samdetr.datasets.check.repair import repair_splits
from samdetr.datasets.check.report import KINDS, by_severity, counts, is_clean, table
from samdetr.datasets.check.splits import SPLITS, Split, all_findings, check_splits, missing_splits
from samdetr.datasets.settings import Data
from samdetr.datasets.sources import add_source_flags, find_split
from samdetr.util.command_line import run_command
from samdetr.util.files import write_json

LARGEST_LOSS = 0.05  # share of the images or objects of a split that --fix may leave out without a warning
TOO_MUCH_LOST = 3  # exit status


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m datasets.check") -> int:
    """Run the program and return its exit status."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of the data set, or data.yaml")
    parser.add_argument("--split", choices=(*SPLITS, "test"), help="check only this split")
    add_source_flags(parser.add_argument)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--short", action="store_true", help="read only the ends of image files, as training does")
    form.add_argument("--fix", type=Path, metavar="OUT.json", help="write repaired annotations")
    parser.add_argument("--allow_loss", action="store_true", help="status as usual if --fix leaves out more than 5 %%")
    parser.add_argument("--allow_outside", action="store_true", help="read files whose names leave the image folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a report in JSON")
    parser.add_argument(
        "--draw",
        type=Path,
        metavar="FOLDER",
        help="draw images with boxes, as read and after the transforms of training",
    )
    parser.add_argument("--draw_images", type=int, default=12, metavar="N", help="images to draw (default: 12)")
    parser.add_argument(
        "--train_sizes",
        type=int,
        nargs="+",
        default=Data.train_sizes,
        metavar="PIXELS",
        help="for --draw, as of training",
    )
    parser.add_argument("--eval_size", type=int, default=Data.eval_size, metavar="PIXELS", help="the same")
    parser.add_argument("--max_size", type=int, default=Data.max_size, metavar="PIXELS", help="the same")
    parser.add_argument("--no_crop", dest="crop_augmentation", action="store_false", help="the same")
    parser.add_argument("--num_queries", type=int, default=300, help="objects that a network can find in an image")
    parser.add_argument("--num_workers", type=int, default=min(16, os.cpu_count() or 1), help="decoding threads")
    args = parser.parse_args(argv)
    return run_command(prog, lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Check, print and write. Returns 0 if the data set is clean, after repairs if any, else 1. Raises ValueError."""
    data, only, fix = args.data, args.split, args.fix
    for flag, file in (("--fix", fix), ("--json", args.json)):
        if file and (file.is_dir() or not os.access(file.absolute().parent, os.W_OK)):
            raise ValueError(f"{flag} {file} cannot be written; name a file in an existing folder")
    chosen = {name: value for name, value in vars(args).items() if name != "split"}
    settings = Data.pick({**chosen, "coco_path": str(data)})
    outputs = _outputs(fix, only, settings) if fix else {}
    if args.draw:
        if args.draw_images < 1:
            raise ValueError(f"--draw_images {args.draw_images} must be at least 1")
        draw.require_new(args.draw)

    loaded: dict[str, Annotations] = {}
    splits: list[Split] = []
    how: dict[str, Any] = {"full": not args.short, "num_workers": args.num_workers, "allow_outside": args.allow_outside}
    for read, split in check_splits(settings, only=only, num_queries=args.num_queries, **how):
        splits.append(split)
        if fix:
            loaded[split.name] = read
    findings = by_severity([*([] if only else missing_splits(splits)), *all_findings(splits)])
    for split in splits:
        print(f"{data}, {split.name}: " + ", ".join(f"{number:,} {what}" for what, number in split.sizes().items()))
    print(table(findings))
    report: dict[str, Any] = {
        "data": str(data),
        "form": "short" if args.short else "full",
        "splits": {split.name: split.sizes() for split in splits},
        "counts": counts(findings),
        "findings": [finding.to_json() for finding in findings],
    }
    status = 0
    if fix:
        before = {
            name: {what: len(read.content[what]) for what in ("images", "annotations")} for name, read in loaded.items()
        }
        contents, repairs, findings = repair_splits(
            splits, loaded, inspect=lambda split, sizes: inspect_files(split.folder, sizes, **how),
            num_queries=args.num_queries,
        )  # fmt: skip
        if len(contents) == 1:
            outputs = dict.fromkeys(contents, fix)
        lost = {name: one.losses(before[name], LARGEST_LOSS) for name, one in repairs.items()}
        for name, losses in lost.items():
            for what, removed, total, kinds in losses:
                print(f"\nWARNING: {removed:,} of the {total:,} {what} of {name} ({removed / total:.0%}) are left out:")
                print("\n".join(f"{count:>15,}  {kind}: {_what(kind)}" for kind, count in kinds.items() if count))
        if any(lost.values()) and not args.allow_loss:
            print("If that is meant, pass --allow_loss; otherwise correct the cause.")
            status = TOO_MUCH_LOST
        for name, content in contents.items():
            _write(outputs[name], content)
            done = {kind: number for kind, number in repairs[name].done.items() if number}
            print(f"\n{outputs[name]}: {name} {'repaired' if done else 'unchanged'}")
            for kind, number in done.items():
                print(f"{number:>15,}  {kind}: {KINDS[kind][2] if kind in KINDS else 'removed'}")
            report.setdefault("repaired", {})[name] = {"file": str(outputs[name]), "done": done}
        if is_clean(findings):
            print("\nafter repairs only notes are left")
        else:
            print("left after repairs:")
            print(table([finding for finding in findings if finding.severity != "note"]))
        report["left"] = [finding.to_json() for finding in findings]
    if args.json:
        _write(args.json, report, indent=2)
    if args.draw:
        files = draw.draw(settings, args.draw, split=only or "train", number=args.draw_images)
        print(f"\n{len(files)} images of {only or 'train'} are drawn in {args.draw}")
    return status or int(not is_clean(findings))


def _what(kind: str) -> str:
    return KINDS[kind][1] if kind in KINDS else "removed with them"


def _outputs(file: Path, only: str | None, data: Data) -> dict[str, Path]:
    """The files for repaired splits. Raises ValueError if one is an annotation file of `data` itself."""
    outputs = {only: file} if only else {"train": file, "val": file.with_name(f"{file.stem}_val{file.suffix}")}
    originals = [source.file for split in (*SPLITS, "test") if (source := find_split(split, data))]
    for split, output in outputs.items():
        if output.exists() and any(path.exists() and output.samefile(path) for path in originals):
            raise ValueError(f"--fix {output} is the annotation file of {split} itself; choose another name")
    return outputs


def _write(file: Path, value: dict, indent: int | None = None) -> None:
    try:
        write_json(file, value, indent=indent)
    except OSError as error:
        raise ValueError(f"{file} cannot be written: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
