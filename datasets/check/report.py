"""What a check of a data set finds: kinds of faults by severity, and how they are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")

# Error: training or evaluation refuses it, drops it or learns something wrong. Warning: works, but is hardly meant so.
# Note: fine, but good to know.
SEVERITIES = ("error", "warning", "note")

# Kind: severity, what it is, what --fix does about it (empty: nothing that an annotation file could repair).
KINDS = {
    # image files
    "missing_image": ("error", "image files that are listed but not there", "entries removed"),
    "zero_byte_image": ("error", "image files without any content", "entries removed"),
    "truncated_image": ("error", "image files that are cut", "entries removed"),
    "unreadable_image": ("error", "image files that cannot be decoded", "entries removed"),
    "image_size": ("error", "sizes unlike those of the files", "size of the file where all boxes fit, else removed"),
    "exif_size": ("warning", "EXIF turns the image, but the size is that of the stored pixels, so boxes are taken for "
                  "theirs: turn the pixels of the file and remove the tag", ""),
    "unlisted_image": ("warning", "image files in the folder that the annotation file does not list", ""),
    "shared_image": ("warning", "the same pixels in train and val: evaluation flatters", "removed from train"),
    "repeated_image": ("note", "the same pixels in several files of a split", ""),
    "exif_turned": ("note", "images that are turned upright as their EXIF tag says", ""),
    "removed_image": ("note", "images that an earlier --fix removed", ""),
    # the annotation file
    "empty_list": ("error", "lists of the annotation file without any entry", ""),
    "image_entry": ("error", "entries of 'images' without an integer id and a file name", "removed"),
    "category_entry": ("error", "entries of 'categories' without an integer id and a name", "removed"),
    "annotation_entry": ("error", "entries of 'annotations' that are no JSON objects", "removed"),
    "duplicate_image_id": ("error", "image ids that are listed twice", "one of equal entries kept, others removed"),
    "duplicate_file_name": ("error", "files that are listed under several image ids", "merged into the first"),
    "duplicate_annotation_id": ("error", "annotation ids that occur twice", "the later ones get new ids"),
    "duplicate_category_id": ("error", "category ids that are defined twice", "one of equal entries kept"),
    "categories_differ": ("error", "categories of val that train does not define with this id and name", ""),
    "unknown_image": ("error", "annotations of images that are not listed", "removed"),
    "unknown_category": ("error", "annotations of categories that are not defined", "removed"),
    "too_many_objects": ("error", "images with more objects than queries: set --num_queries to the largest count", ""),
    # boxes
    "box_entry": ("error", "boxes that are not four numbers", "removed"),
    "box_not_finite": ("error", "boxes with NaN or infinity", "removed"),
    "box_negative_size": ("error", "boxes of negative width or height", "removed"),
    "box_zero_size": ("warning", "boxes without any area: left out in training, missed in evaluation", "removed"),
    "box_outside": ("error", "boxes that lie wholly outside their image", "removed"),
    "box_partly_outside": ("warning", "boxes that reach more than a pixel beyond their image", "clipped"),
    "box_xyxy": ("error", "boxes given by two corners, not as [left, top, width, height]", "converted"),
    "box_normalised": ("error", "boxes in fractions of the image, not in pixels", "converted"),
    "area": ("warning", "areas that are not positive or unlike the box", "set to width x height"),
    # what there is to learn
    "category_only_in_val": ("warning", "categories with objects in val but none in train", ""),
    "single_class": ("note", "all objects are of one category", ""),
    "unused_category": ("note", "categories without any object in any split", ""),
    "crowd_only_image": ("note", "images with crowd regions but no object", ""),
    "empty_image": ("note", "images without annotations", ""),
    "no_image_size": ("note", "images without a width and height in the annotation file", ""),
    "no_annotation_id": ("note", "annotations without an integer id", ""),
    "ids_with_gaps": ("note", "ids that leave numbers out", ""),
    "ids_from_zero": ("note", "ids that start at 0 or below; pycocotools counts an annotation with id 0 as missed", ""),
    "no_split": ("note", "split that is not there: training needs both", ""),
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One kind of fault in one split: how many there are, and what each is in words."""

    kind: str
    split: str
    count: int
    items: list[str] = field(repr=False)  # the first ones

    @classmethod
    def of(cls, kind: str, split: str, faulty: Sequence[T], describe: Callable[[T], str], limit: int = 1000) -> Finding:
        """What `describe` says of each of `faulty`."""
        return cls(kind, split, len(faulty), [describe(one) for one in faulty[:limit]])

    @property
    def severity(self) -> str:
        return KINDS[self.kind][0]

    def line(self) -> str:
        """All in one line, with one example."""
        return f"data, {self.split}: {self.severity}: {KINDS[self.kind][1]}: {self.count}, such as {self.items[0]}"

    def to_json(self) -> dict:
        severity, what, repair = KINDS[self.kind]
        return {
            "kind": self.kind,
            "severity": severity,
            "split": self.split,
            "count": self.count,
            "what": what,
            "repair": repair or None,
            "items": self.items,
        }


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def counts(findings: Iterable[Finding]) -> dict[str, int]:
    """How many findings there are of each severity."""
    severities = [finding.severity for finding in findings]
    return {severity: severities.count(severity) for severity in SEVERITIES}


def is_clean(findings: Iterable[Finding]) -> bool:
    """Whether there are notes at most."""
    return all(finding.severity == "note" for finding in findings)


def table(findings: Sequence[Finding], *, examples: int = 3) -> str:
    """A readable report, the worst first."""
    lines = []
    for finding in by_severity(findings):
        severity, what, repair = KINDS[finding.kind]
        lines.append(f"{severity:8} {finding.split:6} {finding.count:>8,}  {finding.kind}: {what}")
        lines += [f"{'':27}{item}" for item in finding.items[:examples]]
        if finding.count > examples:
            lines.append(f"{'':27}... and {finding.count - examples:,} more")
        if repair and severity != "note":
            lines.append(f"{'':27}--fix: {repair}")
    found = counts(findings)
    lines.append("kinds of " + ", ".join(f"{severity}s: {found[severity]}" for severity in SEVERITIES))
    return "\n".join(lines)
