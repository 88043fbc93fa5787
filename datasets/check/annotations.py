"""What is wrong, or only odd, in one annotation file, apart from boxes and image files.

Everything in it may be of any type. COCO has 860,000 annotations, so that they are looked at together, in arrays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from samdetr.datasets.check.report import Finding

LARGEST = 1e100  # of numbers that a box may have: sums and products of them are finite


class Annotations:
    """An annotation file in arrays: a row for each of `entries`, its annotations that are JSON objects.

    `sizes` are the true (width, height) of image files by their names, where known; None for a file that is of another
    size than its entry says, so that nobody knows what its boxes are relative to.
    """

    def __init__(self, content: dict, sizes: dict[str, tuple[float, float] | None] | None = None) -> None:
        self.content = content
        self.images = [entry for entry in content["images"] if is_image(entry)]
        self.categories = [entry for entry in content["categories"] if is_category(entry)]
        self.entries = [entry for entry in content["annotations"] if isinstance(entry, dict)]

        self.row_of: dict[int, int] = {}  # in `images`, by image id
        for row, entry in enumerate(self.images):
            self.row_of.setdefault(entry["id"], row)  # of images that share an id, the first
        self.names = {entry["id"]: entry["name"] for entry in reversed(self.categories)}  # here, too, the first
        image_ids = [entry.get("image_id") for entry in self.entries]
        category_ids = [entry.get("category_id") for entry in self.entries]
        # The row in `images`, -1 for an unknown image.
        self.image = np.array([self.row_of.get(i, -1) if type(i) is int else -1 for i in image_ids], np.int64)
        self.known_category = np.array([type(i) is int and i in self.names for i in category_ids], bool)
        self.crowd = np.array([bool(entry.get("iscrowd")) for entry in self.entries], bool)
        self.boxes, self.box_is_given = _boxes([entry.get("bbox") for entry in self.entries])  # NaN where not
        # NaN for what is no number, and for what is left out.
        self.areas = np.array([number(entry.get("area")) for entry in self.entries], np.float64)
        self.area_is_given = np.array(["area" in entry for entry in self.entries], bool)

        known = sizes or {}
        frames = [known[e["file_name"]] if e["file_name"] in known else image_size(e) for e in self.images]
        frames = np.array([frame or (np.nan, np.nan) for frame in frames], np.float64).reshape(-1, 2)
        # The (width, height) of each annotation's image, NaN where unknown.
        self.frames = np.full((len(self.entries), 2), np.nan)
        self.frames[self.image >= 0] = frames[self.image[self.image >= 0]]

    def name(self, row: int) -> str:
        """An annotation, for a person to find it."""
        return f"annotation id {self.entries[row].get('id')!r} (image id {self.entries[row].get('image_id')!r})"

    def objects(self) -> np.ndarray:
        """Which are objects of known images and categories, not crowds."""
        return ~self.crowd & (self.image >= 0) & self.known_category

    def used_categories(self) -> set[int]:
        """Ids of the categories that have objects."""
        return {self.entries[row]["category_id"] for row in np.flatnonzero(self.objects())}


def annotation_findings(annotations: Annotations, *, split: str, num_queries: int) -> list[Finding]:
    """Everything but boxes."""
    content, entries = annotations.content, annotations.entries

    def found(kind: str, faulty: Sequence, describe=str) -> None:
        if len(faulty):
            findings.append(Finding.of(kind, split, faulty, describe))

    findings: list[Finding] = []
    found("empty_list", [key for key in ("images", "categories") if not content[key]])
    found("image_entry", [e for e in content["images"] if not is_image(e)], _short)
    found("category_entry", [e for e in content["categories"] if not is_category(e)], _short)
    found("annotation_entry", [e for e in content["annotations"] if not isinstance(e, dict)], _short)

    by_id = repeated(annotations.images, "id")
    found("duplicate_image_id", list(by_id.items()), lambda i: f"image id {i[0]}: {_names(i[1], 'file_name')}")
    distinct = {(entry["file_name"], entry["id"]): entry for entry in annotations.images}.values()
    by_file = repeated(distinct, "file_name")
    found("duplicate_file_name", list(by_file.items()), lambda i: f"{i[0]!r}: image ids {_names(i[1], 'id')}")
    by_id = repeated(annotations.categories, "id")
    found("duplicate_category_id", list(by_id.items()), lambda i: f"category id {i[0]}: {_names(i[1], 'name')}")
    times = Counter(entry["id"] for entry in entries if is_id(entry.get("id")))
    found("duplicate_annotation_id", [i for i, count in times.items() if count > 1], lambda i: f"annotation id {i}")

    found("unknown_image", np.flatnonzero(annotations.image < 0), annotations.name)
    faulty = np.flatnonzero(~annotations.known_category)
    found(
        "unknown_category",
        faulty,
        lambda row: f"{annotations.name(row)}: category id {entries[row].get('category_id')!r}",
    )

    of_known = annotations.image[annotations.image >= 0]
    objects = np.bincount(annotations.image[annotations.objects()], minlength=len(annotations.images))
    crowds = np.bincount(annotations.image[annotations.crowd & (annotations.image >= 0)], minlength=len(objects))
    of_any_kind = np.bincount(of_known, minlength=len(objects))

    def image(row: int) -> str:
        return f"image id {annotations.images[row]['id']} ({annotations.images[row]['file_name']!r})"

    crowded = np.flatnonzero(objects > num_queries)
    found("too_many_objects", crowded, lambda row: f"{image(row)}: {objects[row]} objects, {num_queries} queries")
    found("crowd_only_image", np.flatnonzero((of_any_kind > 0) & (crowds == of_any_kind)), image)
    # Of images that share an id, only the first has annotations.
    found("empty_image", [row for row in annotations.row_of.values() if of_any_kind[row] == 0], image)
    sizeless = [row for row, entry in enumerate(annotations.images) if image_size(entry) is None]
    found("no_image_size", sizeless, image)

    found("no_annotation_id", [row for row, e in enumerate(entries) if not is_id(e.get("id"))], annotations.name)
    ids = {
        "image": {entry["id"] for entry in annotations.images},
        "annotation": set(times),
        "category": set(annotations.names),
    }
    gaps = {name: (min(i), max(i), max(i) - min(i) + 1 - len(i)) for name, i in ids.items() if i}
    found(
        "ids_with_gaps",
        [(name, gap) for name, gap in gaps.items() if gap[2]],
        lambda i: f"{i[0]} ids: {i[1][2]:,} numbers between {i[1][0]} and {i[1][1]} are not used",
    )
    found(
        "ids_from_zero",
        [(name, gap) for name, gap in gaps.items() if gap[0] <= 0],
        lambda i: f"{i[0]} ids start at {i[1][0]}",
    )
    return findings


def is_image(entry: Any) -> bool:
    return isinstance(entry, dict) and is_id(entry.get("id")) and isinstance(entry.get("file_name"), str)


def is_category(entry: Any) -> bool:
    return isinstance(entry, dict) and is_id(entry.get("id")) and isinstance(entry.get("name"), str)


def is_id(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


def image_size(entry: dict) -> tuple[float, float] | None:
    """(width, height) of an entry of 'images', if it has them."""
    size = (entry.get("width"), entry.get("height"))
    return size if all(isinstance(side, (int, float)) and 0 < side < 2**31 for side in size) else None


def repeated(entries: Sequence[dict], key: str) -> dict[Any, list[dict]]:
    """Entries that share what they have under `key`."""
    times = Counter(entry[key] for entry in entries)
    groups: dict[Any, list[dict]] = {value: [] for value, count in times.items() if count > 1}
    for entry in entries:
        if entry[key] in groups:
            groups[entry[key]].append(entry)
    return groups


def _boxes(boxes: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """(n, 4) float64, and which of them are lists of four numbers; the others are NaN."""
    given = [type(box) is list and len(box) == 4 and {*map(type, box)} <= {int, float} for box in boxes]
    numbers = list(chain.from_iterable(box for box, is_given in zip(boxes, given) if is_given))
    values = np.full((len(boxes), 4), np.nan)
    try:
        values[given] = np.array(numbers, np.float64).reshape(-1, 4)
    except OverflowError:
        values[given] = np.array([number(value) for value in numbers]).reshape(-1, 4)
    return values, np.array(given, bool)


def number(value: Any) -> float:
    """NaN for what is no number; JSON knows whole numbers of any length, which become infinite."""
    if type(value) not in (int, float):
        return np.nan
    try:
        return float(value)
    except OverflowError:
        return np.inf if value > 0 else -np.inf


def _short(value: Any) -> str:
    return f"{value!r:.200}"


def _names(entries: Sequence[dict], key: str, limit: int = 5) -> str:
    names = [repr(entry[key]) for entry in entries]
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
