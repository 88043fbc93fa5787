"""The check of one split, and of two splits together, from what is known about their image files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from samdetr.datasets.check.annotations import Annotations, annotation_findings, image_size, is_image
from samdetr.datasets.check.boxes import box_findings
from samdetr.datasets.check.files import FileState, file_findings, shared_pixels, unlisted_files
from samdetr.datasets.check.repair import removed_images
from samdetr.datasets.check.report import Finding, by_severity


@dataclass(frozen=True)
class Split:
    """What a check of one split needs to remember, and what it found in it."""

    name: str
    folder: Path
    states: dict[str, FileState]  # by file name
    removed: list[str]  # file names that an earlier repair removed
    categories: dict[int, str]
    used: set[int]  # ids of the categories that have objects
    annotations: int
    findings: list[Finding]


def places(root: Path, split: str) -> tuple[Path, Path]:
    """The image folder and the annotation file of a split in the layout of COCO 2017."""
    return root / f"{split}2017", root / "annotations" / f"instances_{split}2017.json"


def listed_sizes(content: dict) -> dict[str, tuple[float, float] | None]:
    """Names of the image files that an annotation file lists, and the (width, height) that it gives."""
    sizes: dict[str, tuple[float, float] | None] = {}
    for entry in filter(is_image, content["images"]):
        sizes.setdefault(entry["file_name"], image_size(entry))
    return sizes


def check_split(content: dict, states: dict[str, FileState], *, split: str, folder: Path, num_queries: int) -> Split:
    """Check what an annotation file says, given what is known about the image files that it lists."""
    sizes = {name: state.size for name, state in states.items() if state.size or state.fault == "image_size"}
    annotations = Annotations(content, sizes)
    removed = [entry["file_name"] for entry in removed_images(content)]
    findings = [
        *file_findings(states, split=split, ids={e["file_name"]: e["id"] for e in annotations.images}, removed=removed),
        *annotation_findings(annotations, split=split, num_queries=num_queries),
        *box_findings(annotations, split=split),
    ]
    used = annotations.used_categories()
    return Split(split, folder, states, removed, annotations.names, used, len(annotations.entries), findings)


def all_findings(splits: Sequence[Split]) -> list[Finding]:
    """Those of each split, and of their comparison."""
    return [*(finding for split in splits for finding in split.findings), *compare_splits(splits)]


def compare_splits(splits: Sequence[Split]) -> list[Finding]:
    """What only several splits together, or a look into their folders, show."""
    findings = []
    for split in splits:
        same_folder = [other for other in splits if other.folder.resolve() == split.folder.resolve()]
        unlisted = unlisted_files(split.folder, [n for other in same_folder for n in (*other.states, *other.removed)])
        if unlisted:
            findings.append(Finding.of("unlisted_image", split.name, unlisted, repr))
    used = set().union(*(split.used for split in splits))
    names = {i: name for split in reversed(splits) for i, name in split.categories.items()}
    unused = sorted(names.keys() - used)
    if len(used) == 1:
        findings.append(Finding("single_class", splits[0].name, 1, [repr(names[i]) for i in used]))
    elif unused:
        findings.append(Finding.of("unused_category", splits[0].name, unused, lambda i: f"{i}: {names[i]!r}"))
    if len(splits) == 2:
        train, val = splits
        shared = shared_pixels(train.states, val.states)
        if shared:
            findings.append(
                Finding.of("shared_image", "train", shared, lambda names: "train {!r}, val {!r}".format(*names))
            )
        unlike = [i for i in sorted(val.categories) if train.categories.get(i) != val.categories[i]]
        if unlike:
            findings.append(
                Finding.of(
                    "categories_differ",
                    "val",
                    unlike,
                    lambda i: f"id {i}: {train.categories.get(i, 'absent')!r} in train, {val.categories[i]!r} in val",
                )
            )
        only = sorted(val.used - train.used - set(unlike))
        if only:
            findings.append(Finding.of("category_only_in_val", "val", only, lambda i: f"{i}: {val.categories[i]!r}"))
    return findings


def start_lines(splits: Sequence[Split]) -> list[str]:
    """What a run should tell before it begins: warnings and errors, a line each."""
    return [finding.line() for finding in by_severity(all_findings(splits)) if finding.severity != "note"]
