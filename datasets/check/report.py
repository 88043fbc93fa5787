"""Findings of a check: kinds of faults by severity, and how they are printed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Error: training or evaluation refuses it, drops it or learns something wrong. Warning: works, but is probably a
# mistake. Note: correct, but good to know.
SEVERITIES = ("error", "warning", "note")

# Kind: severity, description, what --fix does about it (empty: the annotation file cannot repair it).
KINDS = {
    # image files
    "missing_image": ("error", "image files that are listed but missing", "entries removed"),
    "image_name": ("error", "image files that are there under another name", "name of the file in the folder"),
    "outside_image": ("error", "file names that leave the image folder, without --allow_outside", "entries removed"),
    "zero_byte_image": ("error", "image files without any content", "entries removed"),
    "truncated_image": ("error", "image files that are cut", "entries removed"),
    "unreadable_image": ("error", "image files that cannot be decoded", "entries removed"),
    "huge_image": ("error", "images with more pixels than are decoded", "entries removed"),
    "special_file": ("error", "image files that are no regular files", "entries removed"),
    "image_size": ("error", "sizes that differ from the files", "size of the file if all boxes fit, else removed"),
    "exif_size": ("warning", "EXIF turns the image, but the size is that of the stored pixels, to which the boxes "
                  "therefore refer: turn the pixels of the file and remove the tag", ""),
    "narrow_range": ("warning", "images of 12 or 16 bits that use less than 1/16 of their range, of which training "
                     "sees the upper 8 bits: nearly nothing", ""),
    "unlisted_image": ("warning", "image files in the folder that the annotation file does not list", ""),
    "shared_image": ("warning", "the same pixels in train and val: the evaluation is too good", "removed from train"),
    "repeated_image": ("note", "the same pixels in several files of a split", ""),
    "exif_turned": ("note", "images that are turned upright as their EXIF tag says", ""),
    "removed_image": ("note", "images that an earlier --fix removed", ""),
    # the annotation file
    "no_objects": ("error", "training split without a single usable object: nothing can be learnt", ""),
    "no_val_objects": ("warning", "validation split without a single usable object: its AP says nothing", ""),
    "number_form": ("note", "numbers as text or as 1.0, read as what they mean", "converted"),
    "text_id": ("error", "ids that are texts", "numbered"),
    "iscrowd": ("error", "iscrowd that is neither 0 nor 1", "\"true\", \"no\" and the like converted, others removed"),
    "empty_list": ("error", "lists of the annotation file without any entry", ""),
    "image_entry": ("error", "entries of 'images' without an integer id and a file name", "removed"),
    "category_entry": ("error", "entries of 'categories' without an integer id and a name", "removed"),
    "annotation_entry": ("error", "entries of 'annotations' that are not JSON objects", "removed"),
    "duplicate_image_id": ("error", "image ids that are listed twice", "one of equal entries kept, others removed"),
    "duplicate_file_name": ("error", "files that are listed under several image ids", "merged into the first"),
    "duplicate_annotation_id": ("error", "annotation ids that occur twice", "the later ones get new ids"),
    "duplicate_category_id": ("error", "category ids that are defined twice", "one of equal entries kept"),
    "categories_differ": ("error", "categories with objects in val that train does not define with this id and name",
                          "those of the same name get train's id, others are added to train"),
    "unknown_val_category": ("note", "categories without objects in val that train does not define", ""),
    "unknown_image": ("error", "annotations of images that are not listed", "removed"),
    "unknown_category": ("error", "annotations of categories that are not defined", "removed"),
    "too_many_objects": ("warning", "images with more objects than queries, of which as many are learned and found as "
                         "there are queries", ""),
    # boxes
    "box_entry": ("error", "boxes that are not four numbers", "removed"),
    "box_not_finite": ("error", "boxes with NaN or infinity", "removed"),
    "box_negative_size": ("error", "boxes of negative width or height", "removed"),
    "box_zero_size": ("warning", "boxes without area: skipped in training, missed in evaluation", "removed"),
    "box_outside": ("error", "boxes entirely outside their image", "removed"),
    "box_partly_outside": ("warning", "boxes that exceed their image by more than a pixel", "clipped"),
    "box_xyxy": ("error", "boxes given by two corners, not as [left, top, width, height]", "converted"),
    "box_normalised": ("error", "boxes in fractions of the image, not in pixels", "converted"),
    "area": ("warning", "areas that are not positive or do not fit the box", "set to width x height"),
    # classes and contents
    "category_only_in_val": ("warning", "categories with objects in val but none in train", ""),
    "single_class": ("note", "all objects are of one category", ""),
    "unused_category": ("note", "categories without any object in any split", ""),
    "crowd_only_image": ("note", "images with crowd regions but no object", ""),
    "empty_image": ("note", "images without annotations", ""),
    "no_image_size": ("note", "images without a width and height in the annotation file", ""),
    "no_annotation_id": ("note", "annotations without an integer id", ""),
    "ids_with_gaps": ("note", "ids with gaps", ""),
    "ids_from_zero": ("note", "ids that start at 0 or below; pycocotools counts an annotation with id 0 as missed", ""),
    "no_split": ("note", "missing split: training needs both", ""),
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One kind of fault in one split: the number of occurrences, and descriptions of the first ones."""

    kind: str
    split: str
    count: int
    items: list[str] = field(repr=False)

    @classmethod
    def of(cls, kind: str, split: str, faulty: Sequence | np.ndarray, describe: Callable[[Any], str]) -> list[Finding]:
        """A finding whose items are `describe` of the first 1000 of `faulty`; an empty list if there are none."""
        return [cls(kind, split, len(faulty), [describe(one) for one in faulty[:1000]])] if len(faulty) else []

    @property
    def severity(self) -> str:
        return KINDS[self.kind][0]

    def line(self) -> str:
        """A single line with one example."""
        return f"data, {self.split}: {self.severity}: {KINDS[self.kind][1]}: {self.count}, such as {self.items[0]}"

    def to_json(self) -> dict:
        severity, what, repair = KINDS[self.kind]
        head = {"kind": self.kind, "severity": severity, "split": self.split, "count": self.count}
        return {**head, "what": what, "repair": repair or None, "items": self.items}


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def counts(findings: Iterable[Finding]) -> dict[str, int]:
    """Number of findings of each severity."""
    severities = [finding.severity for finding in findings]
    return {severity: severities.count(severity) for severity in SEVERITIES}


def is_clean(findings: Iterable[Finding]) -> bool:
    """Whether there are no findings except notes."""
    return all(finding.severity == "note" for finding in findings)


def table(findings: Sequence[Finding]) -> str:
    """A readable report with three examples of each finding, sorted by severity."""
    lines = []
    for finding in by_severity(findings):
        severity, what, repair = KINDS[finding.kind]
        lines.append(f"{severity:8} {finding.split:6} {finding.count:>8,}  {finding.kind}: {what}")
        lines += [f"{'':27}{item}" for item in finding.items[:3]]
        if finding.count > 3:
            lines.append(f"{'':27}... and {finding.count - 3:,} more")
        if repair and severity != "note":
            lines.append(f"{'':27}--fix: {repair}")
    found = counts(findings)
    lines.append("kinds of " + ", ".join(f"{severity}s: {found[severity]}" for severity in SEVERITIES))
    return "\n".join(lines)
