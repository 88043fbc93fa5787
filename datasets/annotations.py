"""Annotation files in COCO format: reading them into arrays, and the rules that their entries must obey.

The rules are stated once, here. `Annotations.require_valid` raises for the first entry that breaks one;
datasets.check lists all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from itertools import chain
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from samdetr.datasets.values import convert, quoted, shown
from samdetr.util.regular_files import open_regular

Size = tuple[float, float]  # (width, height) in pixels

LISTS = ("images", "annotations", "categories")
LARGEST = 1e100  # bound of the numbers of a box, so that their sums and products are finite


class Annotations:
    """The content of an annotation file, with its N annotations that are JSON objects in arrays.

    Entries may be of any type and value: the arrays mark what is unknown or malformed, and only `require_valid` raises.
    Numbers written as text or as 1.0 are read as what they mean (datasets.values), here and nowhere else: `content` has
    them converted. Of images or categories that share an id, annotations belong to the first.

    - `annotated`: False for a content without 'annotations', which is that of images to detect objects in.
    - `converted`: list and place of each entry that was converted; `conversion` describes one.
    - `images`, `categories`: the entries with a valid id and a name; `entries`: the N annotations.
    - `image` int64 (N,): row in `images`, -1 for an unknown image; `row_of` maps an image id to its row.
    - `category_ids` int64 (N,): 0 where `known_category` (N,) is False; `names` maps a category id to its name.
    - `boxes` float64 (N, 4): left, top, width, height, NaN for an entry that is not a list of four numbers.
    - `areas` float64 (N,): NaN for what is missing or not a number.
    - `crowd` bool (N,), False where `bad_crowd` (N,): an iscrowd that is neither 0 nor 1.
    - `frames` float64 (N, 2): (width, height) of the image that a box lies in, NaN where unknown.
    """

    def __init__(self, content: dict, *, file: str | Path = "the annotation file") -> None:
        """`file` appears in messages."""
        self.file = file
        self.annotated = "annotations" in content
        content = {"annotations": [], **content}
        self.converted: list[tuple[str, int]] = []
        self._original = content
        self.content = content = {**content, **{name: self._convert(name, content[name]) for name in LISTS}}
        self.images = [entry for entry in content["images"] if is_image(entry)]
        self.categories = [entry for entry in content["categories"] if is_category(entry)]
        self.entries = [entry for entry in content["annotations"] if isinstance(entry, dict)]
        self.row_of: dict[int, int] = {}
        for row, entry in enumerate(self.images):
            self.row_of.setdefault(entry["id"], row)
        self.names = {entry["id"]: entry["name"] for entry in reversed(self.categories)}

        image_ids = [entry.get("image_id") for entry in self.entries]
        category_ids = [entry.get("category_id") for entry in self.entries]
        self.image = np.array([self.row_of.get(i, -1) if type(i) is int else -1 for i in image_ids], np.int64)
        self.known_category = np.array([type(i) is int and i in self.names for i in category_ids], bool)
        self.category_ids = np.array([i if ok else 0 for i, ok in zip(category_ids, self.known_category)], np.int64)
        crowd = [entry.get("iscrowd", 0) for entry in self.entries]
        self.crowd = np.array([type(value) is int and value == 1 for value in crowd], bool)
        self.bad_crowd = np.array([type(value) is not int or value not in (0, 1) for value in crowd], bool)
        self.boxes, self._has_box = boxes_of([entry.get("bbox") for entry in self.entries])
        self.areas = np.array([number(entry.get("area")) for entry in self.entries], np.float64)
        self.frames = self._frames({})

    @classmethod
    def read(cls, file: Path) -> Annotations:
        """Raises ValueError for a file that does not exist or is not a COCO instances file."""
        return cls(read_content(file, LISTS), file=file)

    def with_sizes(self, sizes: Mapping[str, Size | None]) -> Annotations:
        """A copy whose `frames` follow `sizes`: (width, height) by file name, None if unknown. Other images keep
        the size in their entry."""
        other = copy(self)
        other.frames = self._frames(sizes)
        return other

    def name(self, row: int) -> str:
        """How messages refer to an annotation."""
        return f"annotation id {self.entries[row].get('id')!r} (image id {self.entries[row].get('image_id')!r})"

    def objects(self) -> np.ndarray:
        """Mask (N,) of the objects: annotations of known images and categories that are not crowds."""
        return ~self.crowd & (self.image >= 0) & self.known_category

    def usable(self) -> np.ndarray:
        """Mask (N,) of the objects whose boxes have an area inside their image: what a network can learn from."""
        left, top, width, height = self.boxes.T
        columns, rows = np.nan_to_num(self.frames, nan=np.inf).T
        with np.errstate(invalid="ignore"):
            inside = (left < columns) & (top < rows) & (left + width > 0) & (top + height > 0)
            return self.objects() & (width > 0) & (height > 0) & inside & ~np.any(list(self.box_faults().values()), 0)

    def objects_per_image(self) -> np.ndarray:
        """Number of objects of each row of `images`."""
        return np.bincount(self.image[self.objects()], minlength=len(self.images))

    def box_faults(self) -> dict[str, np.ndarray]:
        """Masks (N,) of the boxes that cannot be used, by kind of fault; they exclude each other."""
        with np.errstate(invalid="ignore"):
            finite = (np.abs(self.boxes) < LARGEST).all(1)
            negative = (self.boxes[:, 2:] < 0).any(1)
        return {
            "box_entry": ~self._has_box,
            "box_not_finite": self._has_box & ~finite,
            "box_negative_size": finite & negative,
        }

    def require_valid(self) -> None:
        """Raise ValueError, with file, id, value and remedy, for the first image or annotation that breaks a rule.
        `Categories.from_annotations` does the same for categories."""
        if not self.content["images"]:
            raise ValueError(f"{self.file}: 'images' is empty; list at least one image")
        for entry in self.content["images"]:
            if not is_image(entry):
                raise ValueError(
                    f"{self.file}: image {entry!r:.200} needs an integer 'id' of 64 bits and a text 'file_name'"
                )
        for identity, (first, second, *_) in repeated(self.images, "id").items():
            raise ValueError(
                f"{self.file}: image id {identity} is listed twice, for {quoted(first['file_name'])} and "
                f"{quoted(second['file_name'])}; remove one or give it a different id"
            )
        for position, entry in enumerate(self.content["annotations"]):
            if not isinstance(entry, dict):
                raise ValueError(
                    f"{self.file}: annotation number {position} is {entry!r:.200}; it must be a JSON object"
                )
        bad_box = np.any(list(self.box_faults().values()), axis=0)
        faulty = (self.image < 0) | ~self.known_category | bad_box | self.bad_crowd
        if not faulty.any():
            return
        row = int(faulty.argmax())
        entry = self.entries[row]
        image, category, box = (entry.get(key) for key in ("image_id", "category_id", "bbox"))
        where = f"{self.file}: annotation id {entry.get('id', f'(none, number {row})')}"
        if self.image[row] < 0:
            raise ValueError(f"{where} belongs to image id {image!r}, which 'images' does not list; add or remove it")
        where += f" (image id {image})"
        if not self.known_category[row]:
            raise ValueError(
                f"{where} has category id {category!r}, which 'categories' does not define; define it or correct the id"
            )
        if self.bad_crowd[row]:
            raise ValueError(f"{where} has iscrowd {entry['iscrowd']!r:.200}; it must be 0 or 1: correct it")
        raise ValueError(
            f"{where} has bbox {box!r:.200}; it must be four finite numbers [left, top, width, height] "
            "without a negative size: correct or remove it"
        )

    def conversion(self, name: str, place: int) -> str:
        old, new = self._original[name][place], self.content[name][place]
        return f"{name}[{place}]: " + ", ".join(f"{key} {old[key]!r:.80}" for key in old if new[key] is not old[key])

    def _convert(self, name: str, entries: list) -> list:
        converted, changed = convert(name, entries)
        self.converted += [(name, place) for place in changed]
        return converted

    def _frames(self, sizes: Mapping[str, Size | None]) -> np.ndarray:
        known = [sizes[e["file_name"]] if e["file_name"] in sizes else image_size(e) for e in self.images]
        by_image = np.array([*(size or (np.nan, np.nan) for size in known), (np.nan, np.nan)], np.float64)
        return by_image[self.image]  # row -1 is that of unknown images


def read_content(file: Path, lists: Sequence[str] = ("images", "categories")) -> dict[str, Any]:
    """The content of a COCO annotation file, which has these `lists`.

    Raises ValueError for a file that does not exist or is not one.
    """
    content = read_json(file, kind="annotation file", expected="a COCO instances file")
    for key in LISTS:
        needed = key in lists or not isinstance(content, dict) or key in content
        if needed and (not isinstance(content, dict) or not isinstance(content.get(key), list)):
            raise ValueError(f"{file} has no list {key!r}; pass a COCO instances file")
    return content


def read_json(file: Path, *, kind: str, expected: str) -> Any:
    """The content of a JSON file, which messages call `kind` and `expected`. Raises ValueError."""
    try:
        with open_regular(file) as stream:
            text = stream.read()
    except FileNotFoundError:
        raise ValueError(f"{kind} {shown(file)} does not exist; check the path") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{kind} {shown(file)} cannot be read: {error}") from None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # wrong encoding or syntax, numbers of thousands of digits
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{file} is not JSON ({reason}); pass {expected}") from None


def is_image(entry: Any) -> bool:
    return isinstance(entry, dict) and is_id(entry.get("id")) and isinstance(entry.get("file_name"), str)


def is_category(entry: Any) -> bool:
    return isinstance(entry, dict) and is_id(entry.get("id")) and isinstance(entry.get("name"), str)


def has_text_id(entry: Any) -> bool:
    """An image or category whose only fault is that its id is a text, such as "cat" or "b1946"."""
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
        return False
    return is_image({**entry, "id": 1}) or is_category({**entry, "id": 1})


def is_id(value: Any) -> TypeGuard[int]:
    return type(value) is int and abs(value) < 2**63


def image_size(entry: dict) -> Size | None:
    """(width, height) of an entry of 'images', if it has both."""
    width, height = entry.get("width"), entry.get("height")
    return (width, height) if _is_side(width) and _is_side(height) else None  # type: ignore[return-value]


def repeated(entries: Iterable[dict], key: str) -> dict[Any, list[dict]]:
    """Groups of entries with the same value under `key`, by that value."""
    groups: dict[Any, list[dict]] = {}
    for entry in entries:
        groups.setdefault(entry[key], []).append(entry)
    return {value: group for value, group in groups.items() if len(group) > 1}


def number(value: Any) -> float:
    """A JSON number as float64, NaN for anything else. Integers beyond float64 become infinite."""
    if type(value) not in (int, float):
        return np.nan
    try:
        return float(value)
    except OverflowError:
        return np.inf if value > 0 else -np.inf


def first_few(items: Iterable[str], limit: int = 3) -> str:
    items = list(items)
    return ", ".join(items[:limit]) + (", ..." if len(items) > limit else "")


def _is_side(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 2**31


def boxes_of(boxes: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (n, 4) float64, and a mask (n,) of those that are lists of four numbers; the others are NaN."""
    valid = [type(box) is list and len(box) == 4 and {*map(type, box)} <= {int, float} for box in boxes]
    numbers = list(chain.from_iterable(box for box, is_valid in zip(boxes, valid) if is_valid))
    values = np.full((len(boxes), 4), np.nan)
    try:
        values[valid] = np.array(numbers, np.float64).reshape(-1, 4)
    except OverflowError:
        values[valid] = np.array([number(value) for value in numbers]).reshape(-1, 4)
    return values, np.array(valid, bool)
