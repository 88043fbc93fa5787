"""Check a data set in COCO format, and repair what its annotation files can be cured of.

    python -m datasets.check data/coco
    python -m datasets.check my_data --fix repaired.json

Exit status: 0 without findings or with notes alone, 1 with warnings or errors (after --fix: with those that are left),
2 for what cannot be checked. --fix writes the training split to OUT.json and the validation split beside it, to
OUT_val.json; with --split that split alone, to OUT.json.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from samdetr.datasets.check.files import FileState, inspect_files, shared_pixels
from samdetr.datasets.check.repair import repair
from samdetr.datasets.check.report import KINDS, Finding, by_severity, counts, is_clean, table
from samdetr.datasets.check.splits import Split, all_findings, check_split, listed_sizes, places
from samdetr.datasets.coco import read_annotations
from samdetr.util.command_line import run_command
from samdetr.util.files import write_json

SPLITS = ("train", "val")


class Check:
    """A check of all splits of a data set, or of one."""

    def __init__(
        self, root: Path, *, only: str | None, full: bool, num_queries: int, num_workers: int, keep: bool
    ) -> None:
        """`keep` the contents of the annotation files, for repairs. Raises ValueError for what cannot be checked."""
        self.root, self.num_queries = root, num_queries
        if not root.is_dir():
            raise ValueError(f"data folder {root} does not exist; it must hold train2017/, val2017/ and annotations/")
        there = [split for split in SPLITS if any(path.exists() for path in places(root, split))]
        names = [only] if only else there
        if not names:
            raise ValueError(
                f"data folder {root} holds neither train2017/ nor val2017/; pass a data set in COCO format"
            )
        self.contents: dict[str, dict] = {}
        self.splits: list[Split] = []
        for name in names:
            folder, file = places(root, name)
            content = read_annotations(file)
            if not folder.is_dir():
                raise ValueError(f"image folder {folder} does not exist; {file} names its images")
            states = inspect_files(folder, listed_sizes(content), full=full, num_workers=num_workers)
            self.splits.append(check_split(content, states, split=name, folder=folder, num_queries=num_queries))
            if keep:
                self.contents[name] = content
        missing = [] if only else [Finding("no_split", split, 1, [split]) for split in SPLITS if split not in there]
        self.findings = by_severity([*missing, *all_findings(self.splits)])

    def repaired(self) -> tuple[dict[str, dict], dict[str, dict[str, int]], list[Finding]]:
        """By split the contents of repaired annotation files and what was done; and what a check of them finds."""
        states = {split.name: split.states for split in self.splits}
        shared = {name for name, _ in shared_pixels(states["train"], states["val"])} if len(states) == 2 else set()
        contents, done, again = {}, {}, []
        for split in self.splits:
            remove = shared if split.name == "train" else ()
            content, counter = repair(self.contents[split.name], split.states, remove=remove)
            if not content["images"]:
                raise ValueError(f"no image of {split.name} would be left; the files or the sizes are wrong as a whole")
            contents[split.name] = content
            done[split.name] = {kind: number for kind, number in counter.items() if number}
            left = {name: _with_the_files_size(split.states[name]) for name in listed_sizes(content)}
            again.append(
                check_split(content, left, split=split.name, folder=split.folder, num_queries=self.num_queries)
            )
        return contents, done, by_severity(all_findings(again))


def _with_the_files_size(state: FileState) -> FileState:
    return FileState(size=state.file_size, pixels=state.pixels) if state.fault == "image_size" else state


def run(args: argparse.Namespace) -> bool:
    """Whether the data set is clean, after repairs if any. Raises ValueError."""
    for name, file in (("--fix", args.fix), ("--json", args.json)):
        if file and (file.is_dir() or not os.access(file.absolute().parent, os.W_OK)):
            raise ValueError(f"{name} {file} cannot be written; name a file in a folder that is there")
    outputs = _outputs(args.fix, args.split) if args.fix else {}
    for split, file in outputs.items():
        if any(
            file.exists() and path.exists() and file.samefile(path)
            for path in (places(args.data, s)[1] for s in SPLITS)
        ):
            raise ValueError(f"--fix {file} is the annotation file of {split} itself; choose another name")
    check = Check(
        args.data,
        only=args.split,
        full=not args.short,
        num_queries=args.num_queries,
        num_workers=args.num_workers,
        keep=bool(args.fix),
    )
    for split in check.splits:
        print(
            f"{args.data}, {split.name}: {len(split.states):,} images, {split.annotations:,} annotations, "
            f"{len(split.categories)} categories"
        )
    print(table(check.findings))
    report = {
        "data": str(args.data),
        "form": "short" if args.short else "full",
        "splits": {
            split.name: {
                "images": len(split.states),
                "annotations": split.annotations,
                "categories": len(split.categories),
            }
            for split in check.splits
        },
        "counts": counts(check.findings),
        "findings": [finding.to_json() for finding in check.findings],
    }
    left = check.findings
    if args.fix:
        contents, done, left = check.repaired()
        if len(contents) == 1:
            outputs = dict.fromkeys(contents, args.fix)
        for split, content in contents.items():
            _write(outputs[split], content)
            print(f"\n{outputs[split]}: {split} repaired" if done[split] else f"\n{outputs[split]}: {split} as it was")
            for kind, number in done[split].items():
                print(f"{number:>15,}  {kind}: {KINDS[kind][2] if kind in KINDS else 'removed'}")
        print("left after repairs:" if not is_clean(left) else "\nnothing but notes is left after repairs")
        if not is_clean(left):
            print(table([finding for finding in left if finding.severity != "note"]))
        report["repaired"] = {split: {"file": str(outputs[split]), "done": done[split]} for split in contents}
        report["left"] = [finding.to_json() for finding in left]
    if args.json:
        _write(args.json, report, indent=2)
    return is_clean(left)


def _outputs(file: Path, only: str | None) -> dict[str, Path]:
    """Where repaired files go."""
    return {only: file} if only else {"train": file, "val": file.with_name(f"{file.stem}_val{file.suffix}")}


def _write(file: Path, value: dict, indent: int | None = None) -> None:
    try:
        write_json(file, value, indent=indent)
    except OSError as error:
        raise ValueError(f"{file} cannot be written: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status, as above."""
    parser = argparse.ArgumentParser(
        prog="python -m datasets.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="folder with train2017/, val2017/ and annotations/")
    parser.add_argument("--split", choices=SPLITS, help="check this one alone")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--short", action="store_true", help="look at the ends of image files, as training does at start")
    form.add_argument("--fix", type=Path, metavar="OUT.json", help="write repaired annotations")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report for machines")
    parser.add_argument("--num_queries", type=int, default=300, help="objects that a network can find in an image")
    parser.add_argument("--num_workers", type=int, default=min(16, os.cpu_count() or 1), help="threads that decode")
    args = parser.parse_args(argv)
    clean = []
    status = run_command(parser.prog, lambda: clean.append(run(args)))
    return status or int(not clean[0])


if __name__ == "__main__":
    sys.exit(main())
