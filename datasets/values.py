"""Values of annotation files: numbers written as text or as 1.0, truth values, and how messages show names.

Converters return the value that is meant, if its meaning is exact, and else the value itself, which the rules of
datasets.annotations then judge.
"""

from __future__ import annotations

import json
import operator
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

_INTEGER = re.compile(r"\s*([+-]?\d{1,19})(\.0*)?\s*", re.ASCII)
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*", re.ASCII | re.IGNORECASE)
_PLAIN = re.compile(r"[^\s'\"\\]+")


def integer(value: Any) -> Any:
    """7, 7.0, "7" and "7.0" are 7. Floats from 2**53 are not exact."""
    if isinstance(value, str) and (match := _INTEGER.fullmatch(value)):
        return int(match[1])
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def real(value: Any) -> Any:
    """ "7.5" is 7.5 and "7" is 7."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        whole = integer(value)
        return float(value) if isinstance(whole, str) else whole
    return value


def box(value: Any) -> Any:
    """A list of numbers, which may be text, one by one or together: "[1, 2, 3, 4]"."""
    if isinstance(value, str) and value.strip()[:1] == "[":
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return value
    if not isinstance(value, list) or {*map(type, value)} <= {int, float}:
        return value
    parts = [real(part) for part in value]
    return value if all(map(operator.is_, parts, value)) else parts


def truth(value: Any) -> Any:
    """0, 1, true, false, null, "0" and "1" as 0 or 1."""
    if value is None or (isinstance(value, (bool, float)) and value in (0, 1)):
        return int(value or 0)
    return int(value.strip()) if isinstance(value, str) and value.strip() in ("0", "1") else value


def label(value: Any) -> Any:
    """A name that is written as a number: digits as classes, say."""
    return str(value) if type(value) is int and abs(value) < 2**63 else value


# What each list of an annotation file is converted by: key, converter, types that need no conversion.
CONVERTERS: dict[str, list[tuple[str, Callable[[Any], Any], set[type]]]] = {
    "images": [("id", integer, {int}), ("file_name", label, {str}), ("width", real, {int}), ("height", real, {int})],
    "categories": [("id", integer, {int}), ("name", label, {str})],
    "annotations": [
        ("id", integer, {int}),
        ("image_id", integer, {int}),
        ("category_id", integer, {int}),
        ("bbox", box, set()),
        ("area", real, {int, float}),
        ("iscrowd", truth, {int}),
    ],
    # A list of COCO results, which is a file of its own.
    "detections": [
        ("image_id", integer, {int}),
        ("category_id", integer, {int}),
        ("bbox", box, set()),
        ("score", real, {int, float}),
    ],
}


def convert(name: str, entries: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """The entries of a list of an annotation file with every value converted, and the places of those that changed.

    Entries that need no conversion are the same objects; the others are copies.
    """
    found = list(entries)
    changed: set[int] = set()
    for key, converter, plain in CONVERTERS[name]:
        for place, entry in enumerate(found):
            if not isinstance(entry, dict) or key not in entry:
                continue
            value = entry[key]
            if type(value) in plain:
                continue
            new = converter(value)
            if new is not value:
                if place not in changed:
                    changed.add(place)
                    entry = found[place] = dict(entry)
                entry[key] = new
    return found, sorted(changed)


def quoted(name: str) -> str:
    """A name in quotes that shows every character: what is invisible or looks like something else is escaped."""
    return repr(name) if unicodedata.normalize("NFC", name) == name else ascii(name)


def shown(path: Any) -> str:
    """A path for a message: quoted if it holds more than plain characters."""
    text = str(path)
    plain = _PLAIN.fullmatch(text) and text.isprintable()
    return text if plain and unicodedata.normalize("NFC", text) == text else quoted(text)
