"""What is wrong or unusual in one annotation file, apart from boxes and image files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from samdetr.datasets.annotations import (
    Annotations,
    first_few,
    has_text_id,
    image_size,
    is_category,
    is_id,
    is_image,
    repeated,
)
from samdetr.datasets.check.report import Finding
from samdetr.datasets.values import quoted


def annotation_findings(annotations: Annotations, *, split: str, num_queries: int) -> list[Finding]:
    """Everything except boxes."""
    content, entries = annotations.content, annotations.entries

    known = annotations.image >= 0
    objects = annotations.objects_per_image()
    crowds = np.bincount(annotations.image[annotations.crowd & known], minlength=len(objects))
    of_any_kind = np.bincount(annotations.image[known], minlength=len(objects))
    times = Counter(entry["id"] for entry in entries if is_id(entry.get("id")))
    ids = {"image": set(annotations.row_of), "annotation": set(times), "category": set(annotations.names)}
    ranges = {name: (min(i), max(i), max(i) - min(i) + 1 - len(i)) for name, i in ids.items() if i}
    findings: list[Finding] = []

    def found(kind: str, faulty: Sequence | np.ndarray, describe: Callable[[Any], str] = str) -> None:
        findings.extend(Finding.of(kind, split, faulty, describe))

    def image(row: int) -> str:
        return f"image id {annotations.images[row]['id']} ({quoted(annotations.images[row]['file_name'])})"

    found("empty_list", [key for key in ("images", "categories") if not content[key]])
    found("number_form", annotations.converted, lambda place: annotations.conversion(*place))
    for name, kind, is_valid in (("images", "image_entry", is_image), ("categories", "category_entry", is_category)):
        text_ids, others = (
            [e for e in content[name] if has_text_id(e)],
            [e for e in content[name] if not has_text_id(e)],
        )
        found("text_id", text_ids, f"{name}: {{!r:.200}}".format)
        found(kind, [e for e in others if not is_valid(e)], "{!r:.200}".format)
    found("annotation_entry", [e for e in content["annotations"] if not isinstance(e, dict)], "{!r:.200}".format)

    groups = list(repeated(annotations.images, "id").items())
    found("duplicate_image_id", groups, lambda i: f"image id {i[0]}: {_names(i[1], 'file_name')}")
    distinct = {(entry["file_name"], entry["id"]): entry for entry in annotations.images}.values()
    groups = list(repeated(distinct, "file_name").items())
    found("duplicate_file_name", groups, lambda i: f"{quoted(i[0])}: image ids {_names(i[1], 'id')}")
    groups = list(repeated(annotations.categories, "id").items())
    found("duplicate_category_id", groups, lambda i: f"category id {i[0]}: {_names(i[1], 'name')}")
    found("duplicate_annotation_id", [i for i, count in times.items() if count > 1], lambda i: f"annotation id {i}")

    if not annotations.usable().any():
        found("no_objects" if split == "train" else "no_val_objects", [len(entries)], "{:,} annotations".format)
    found(
        "iscrowd",
        np.flatnonzero(annotations.bad_crowd),
        lambda row: f"{annotations.name(row)}: iscrowd {entries[row]['iscrowd']!r:.80}",
    )
    found("unknown_image", np.flatnonzero(~known), annotations.name)
    found(
        "unknown_category",
        np.flatnonzero(~annotations.known_category),
        lambda row: f"{annotations.name(row)}: category id {entries[row].get('category_id')!r}",
    )
    crowded = np.argsort(-objects, kind="stable")[: (objects > num_queries).sum()]  # the largest first
    found("too_many_objects", crowded, lambda row: f"{image(row)}: {objects[row]} objects, {num_queries} queries")
    found("crowd_only_image", np.flatnonzero((of_any_kind > 0) & (crowds == of_any_kind)), image)
    # Annotations belong to the first of the images that share an id.
    found("empty_image", [row for row in annotations.row_of.values() if of_any_kind[row] == 0], image)
    found("no_image_size", [row for row, e in enumerate(annotations.images) if image_size(e) is None], image)

    found("no_annotation_id", [row for row, e in enumerate(entries) if not is_id(e.get("id"))], annotations.name)
    found(
        "ids_with_gaps",
        [(name, *limits) for name, limits in ranges.items() if limits[2]],
        lambda i: f"{i[0]} ids: {i[3]:,} numbers between {i[1]} and {i[2]} are not used",
    )
    found("ids_from_zero", [i for i in ranges.items() if i[1][0] <= 0], lambda i: f"{i[0]} ids start at {i[1][0]}")
    return findings


def _names(entries: Sequence[dict], key: str) -> str:
    return first_few((repr(entry[key]) for entry in entries), 5)
