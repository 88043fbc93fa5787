"""The check of one split, and of two splits together, given what is known about their image files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samdetr.datasets.annotations import Annotations, Size, image_size
from samdetr.datasets.check.annotations import annotation_findings
from samdetr.datasets.check.boxes import box_findings
from samdetr.datasets.check.files import FileState, file_findings, inspect_files, shared_pixels, unlisted_files
from samdetr.datasets.check.report import Finding
from samdetr.datasets.settings import Data
from samdetr.datasets.sources import find_split, require_split
from samdetr.datasets.values import quoted

SPLITS = ("train", "val")


@dataclass(frozen=True)
class Split:
    """The findings in one split, and what a comparison with another split needs."""

    name: str
    folder: Path
    states: dict[str, FileState]  # by file name
    removed: list[str]  # file names that an earlier repair removed
    categories: dict[int, str]
    used: set[int]  # ids of the categories that have objects
    annotations: int
    findings: list[Finding]
    shared_folder: bool = False  # with splits that are not checked

    def sizes(self) -> dict[str, int]:
        return {"images": len(self.states), "annotations": self.annotations, "categories": len(self.categories)}


def check_splits(
    data: Data, *, only: str | None, full: bool, num_queries: int, **how: Any
) -> Iterator[tuple[Annotations, Split]]:
    """Read and check the splits train and val of a data set, or `only` one.

    `full` decodes every image; otherwise only the ends of files are read. `how` as of `inspect_files`.
    Raises ValueError for what cannot be checked.
    """
    found = {only: require_split(only, data)} if only else {name: find_split(name, data) for name in SPLITS}
    sources = {name: source for name, source in found.items() if source}
    for name, source in (sources or {"train": require_split("train", data)}).items():
        folder, annotations = source.folder, source.read(unannotated=name == "test")
        if not folder.is_dir():
            raise ValueError(f"image folder {folder} does not exist; {source.file} names its images")
        states = inspect_files(folder, listed_sizes(annotations), full=full, **how)
        yield annotations, check_split(annotations, states, split=name, folder=folder, num_queries=num_queries)


def missing_splits(splits: Sequence[Split]) -> list[Finding]:
    return [Finding("no_split", name, 1, [name]) for name in SPLITS if name not in {split.name for split in splits}]


def removed_images(content: dict) -> list[dict]:
    """Entries of the images that earlier repairs removed."""
    removed = content.get("removed_images")
    entries = removed if isinstance(removed, list) else []
    return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("file_name"), str)]


def listed_sizes(annotations: Annotations) -> dict[str, Size | None]:
    """File names of the images, and their (width, height) in the annotation file."""
    sizes: dict[str, Size | None] = {}
    for entry in annotations.images:
        sizes.setdefault(entry["file_name"], image_size(entry))
    return sizes


def check_split(
    annotations: Annotations, states: dict[str, FileState], *, split: str, folder: Path, num_queries: int
) -> Split:
    """Check the annotations of a split, given what is known about the image files that they list."""
    sizes = {name: state.size for name, state in states.items() if state.size or state.fault == "image_size"}
    annotations = annotations.with_sizes(sizes)
    removed = [entry["file_name"] for entry in removed_images(annotations.content)]
    findings = [
        *file_findings(states, split=split, ids={e["file_name"]: e["id"] for e in annotations.images}, removed=removed),
        *annotation_findings(annotations, split=split, num_queries=num_queries),
        *box_findings(annotations, split=split),
    ]
    shared = annotations.content.get("shared_folder") is True
    used = set(annotations.category_ids[annotations.objects()].tolist())
    return Split(split, folder, states, removed, annotations.names, used, len(annotations.entries), findings, shared)


def all_findings(splits: Sequence[Split]) -> list[Finding]:
    """Findings of each split and of their comparison."""
    return [*(finding for split in splits for finding in split.findings), *compare_splits(splits)]


def compare_splits(splits: Sequence[Split]) -> list[Finding]:
    """Findings that concern several splits, or files that no split lists."""
    findings: list[Finding] = []

    for split in splits:
        same_folder = [other for other in splits if other.folder.resolve() == split.folder.resolve()]
        listed = [name for other in same_folder for name in (*other.states, *other.removed)]
        listed += [state.new_name for other in same_folder for state in other.states.values() if state.new_name]
        if not split.shared_folder:
            findings += Finding.of("unlisted_image", split.name, unlisted_files(split.folder, listed), quoted)
    used: set[int] = set().union(*(split.used for split in splits))
    names = {i: name for split in reversed(splits) for i, name in split.categories.items()}
    unused = sorted(names.keys() - used)
    if len(used) == 1:
        findings += Finding.of("single_class", splits[0].name, list(used), lambda i: repr(names[i]))
    elif splits:
        findings += Finding.of("unused_category", splits[0].name, unused, lambda i: f"{i}: {names[i]!r}")
    if len(splits) == 2:
        train, val = splits
        shared = shared_pixels(train.states, val.states)
        findings += Finding.of(
            "shared_image", "train", shared, lambda pair: f"train {quoted(pair[0])}, val {quoted(pair[1])}"
        )
        unlike = sorted(i for i, name in val.categories.items() if train.categories.get(i) != name)

        def in_each(i: int) -> str:
            return f"id {i}: {train.categories.get(i, 'absent')!r} in train, {val.categories[i]!r} in val"

        findings += Finding.of("categories_differ", "val", [i for i in unlike if i in val.used], in_each)
        findings += Finding.of("unknown_val_category", "val", [i for i in unlike if i not in val.used], in_each)
        only = sorted(val.used - train.used - set(unlike))
        findings += Finding.of("category_only_in_val", "val", only, lambda i: f"{i}: {val.categories[i]!r}")
    return findings
