"""An annotation file without the faults that the file itself can be cured of."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence

import numpy as np

from samdetr.datasets.check.annotations import Annotations, is_category, is_id, is_image, number, repeated
from samdetr.datasets.check.boxes import ROUNDING, area_fits, box_verdicts
from samdetr.datasets.check.files import FileState

UNUSABLE = ("missing_image", "zero_byte_image", "truncated_image", "unreadable_image")
HOPELESS = ("box_entry", "box_not_finite", "box_negative_size", "box_zero_size", "box_outside")


def repair(content: dict, states: dict[str, FileState], *, remove: Collection[str] = ()) -> tuple[dict, Counter[str]]:
    """A repaired copy of the content of an annotation file, and how many entries of each kind were repaired.

    `states` tell about the image files after decoding them; those in `remove` are left out as well. What goes is listed
    under "removed_images" (file name, reason), so that a later check does not take the files for forgotten ones.
    `content` stays as it is.
    """
    done: Counter[str] = Counter()
    categories = _categories(content, done)
    images, new_id, removed, sizes = _images(content, states, remove, done)
    annotations = Annotations({**content, "categories": categories}, sizes)
    repaired = {
        **content,
        "images": images,
        "annotations": _annotations(annotations, new_id, done),
        "categories": categories,
    }
    if removed:
        repaired["removed_images"] = [*removed_images(content), *removed]
    return repaired, done


def removed_images(content: dict) -> list[dict]:
    """What earlier repairs removed."""
    removed = content.get("removed_images")
    entries = removed if isinstance(removed, list) else []
    return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("file_name"), str)]


def _categories(content: dict, done: Counter[str]) -> list[dict]:
    valid = [entry for entry in content["categories"] if is_category(entry)]
    done["category_entry"] += len(content["categories"]) - len(valid)
    kept = _first_of(valid, "id", "name")
    done["duplicate_category_id"] += len(valid) - len(kept)
    return kept


def _images(
    content: dict, states: dict[str, FileState], remove: Collection[str], done: Counter[str]
) -> tuple[list[dict], dict[int, int], list[dict], dict[str, tuple[float, float] | None]]:
    """Entries that stay; their ids by those that annotations name, where images were merged; what was removed; and the
    frames of boxes by file name."""
    valid = [entry for entry in content["images"] if is_image(entry)]
    done["image_entry"] += len(content["images"]) - len(valid)
    # Under one id boxes of several images cannot be told apart: all of these images go.
    ambiguous = {
        identity
        for identity, entries in repeated(valid, "id").items()
        if len({entry["file_name"] for entry in entries}) > 1
    }
    done["duplicate_image_id"] += len(valid) - len(_first_of(valid, "id", "file_name"))
    resized = any(state.fault == "image_size" for state in states.values())
    extents = _extents(content) if resized else {}
    kept: dict[str, dict] = {}
    new_id: dict[int, int] = {}
    removed: list[dict] = []
    for entry in _first_of(valid, "id", "file_name"):
        identity, name = entry["id"], entry["file_name"]
        state = states[name]
        reason = None
        if identity in ambiguous:
            reason = "duplicate_image_id"
        elif state.fault in UNUSABLE:
            reason = state.fault
        elif name in remove:
            reason = "shared_image"
        elif state.fault == "image_size":
            done["image_size"] += 1
            if _fits(extents.get(identity), state.file_size):
                entry = {**entry, "width": state.file_size[0], "height": state.file_size[1]}
            else:
                reason = "image_size"
        if reason:
            done[reason] += reason != "image_size"
            removed.append({"file_name": name, "reason": reason})
        elif name in kept:
            done["duplicate_file_name"] += 1
            new_id[identity] = kept[name]["id"]
        else:
            kept[name] = entry
            new_id[identity] = identity
    sizes = {name: state.file_size if state.fault == "image_size" else state.size for name, state in states.items()}
    known = {name: size for name, size in sizes.items() if size}
    return list(kept.values()), new_id, [entry for entry in removed if entry["file_name"] not in kept], known


def _annotations(annotations: Annotations, new_id: dict[int, int], done: Counter[str]) -> list[dict]:
    verdict = {row: kind for kind, rows in box_verdicts(annotations).items() for row in np.flatnonzero(rows).tolist()}
    done["annotation_entry"] += len(annotations.content["annotations"]) - len(annotations.entries)
    form = _form_of_fractions(annotations.boxes[[row for row, kind in verdict.items() if kind == "box_normalised"]])
    next_id = max((entry["id"] for entry in annotations.entries if is_id(entry.get("id"))), default=0) + 1
    seen: dict[int, list[dict]] = defaultdict(list)
    times = Counter(new_id.values())
    merged: dict[int, list] = {identity: [] for identity, count in times.items() if count > 1}
    kept = []
    for row, entry in enumerate(annotations.entries):
        kind = verdict.get(row)
        if annotations.image[row] < 0:
            kind = "unknown_image"
        elif not annotations.known_category[row]:
            kind = "unknown_category"
        elif entry["image_id"] not in new_id:
            kind = "annotations of removed images"
        if kind:
            done[kind] += 1
        if kind in (*HOPELESS, "unknown_image", "unknown_category", "annotations of removed images"):
            continue
        if kind:
            entry = _new_box(
                entry, form if kind == "box_normalised" else kind, annotations.boxes[row], annotations.frames[row]
            )

        identity = entry.get("id")
        if is_id(identity):
            if identity in seen:
                done["duplicate_annotation_id"] += 1
                if entry in seen[identity]:
                    continue
                entry, next_id = {**entry, "id": next_id}, next_id + 1
            seen[identity].append(entry)
        if new_id[entry["image_id"]] != entry["image_id"]:
            entry = {**entry, "image_id": new_id[entry["image_id"]]}
        if entry["image_id"] in merged:
            what = (entry["category_id"], entry["bbox"])
            if what in merged[entry["image_id"]]:
                done["boxes twice in merged images"] += 1
                continue
            merged[entry["image_id"]].append(what)
        kept.append(entry)
    return kept


def _new_box(entry: dict, kind: str, box: np.ndarray, frame: np.ndarray) -> dict:
    """The annotation with its box in pixels and inside the image, and with an area that fits.

    `kind` is that of the fault, or for fractions one of FORMS.
    """
    old_area = box[2] * box[3]
    if kind in FORMS:
        box = FORMS[kind](box) * [*frame, *frame]
    elif kind == "box_xyxy":
        box = FORMS["xyxy"](box)
    if kind != "area":
        start, end = box[:2].clip(0), np.fmin(box[:2] + box[2:], frame)
        if kind == "box_partly_outside" or (abs(end - start - box[2:]) > ROUNDING).any():
            box = np.concatenate([start, end - start])
    values = box.tolist()
    if all(type(value) is int for value in entry["bbox"]) and all(value.is_integer() for value in values):
        values = [int(value) for value in values]
    entry = {**entry, "bbox": values}
    if "area" in entry:
        area = number(entry["area"])
        of_the_box = abs(area - old_area) <= 0.01 * old_area  # and so to change with it
        if kind == "area" or of_the_box or not area_fits(np.array(area), *box[2:]):
            entry["area"] = values[2] * values[3]
    return entry


# What four numbers may stand for -> left, top, width, height.
FORMS = {
    "xywh": lambda box: box,
    "cxcywh": lambda box: np.concatenate([box[..., :2] - box[..., 2:] / 2, box[..., 2:]], -1),
    "xyxy": lambda box: np.concatenate([box[..., :2], box[..., 2:] - box[..., :2]], -1),
}


def _form_of_fractions(boxes: np.ndarray) -> str:
    """The first form in which all boxes are in order and within the image; centres are as usual as left and top."""
    for name, convert in FORMS.items():
        start, size = np.split(convert(boxes), 2, axis=1)
        if (start >= -0.02).all() and (size > 0).all() and (start + size <= 1.02).all():
            return name
    return "xywh"


def _extents(content: dict) -> dict[int, tuple[float, float]]:
    """How far right and down the boxes of each image reach."""
    annotations = Annotations(content)
    extents: dict[int, tuple[float, float]] = {}
    ends = annotations.boxes[:, :2] + annotations.boxes[:, 2:]
    for row in np.flatnonzero(np.isfinite(ends).all(1) & (annotations.image >= 0)):
        identity = annotations.entries[row]["image_id"]
        old = extents.get(identity, (0, 0))
        extents[identity] = (max(old[0], ends[row, 0]), max(old[1], ends[row, 1]))
    return extents


def _fits(extent: tuple[float, float] | None, size: tuple[int, int]) -> bool:
    return extent is None or (extent[0] <= size[0] + ROUNDING and extent[1] <= size[1] + ROUNDING)


def _first_of(entries: Sequence[dict], *keys: str) -> list[dict]:
    """Of entries that are alike in `keys`, the first."""
    found: dict[tuple, dict] = {}
    for entry in entries:
        found.setdefault(tuple(entry[key] for key in keys), entry)
    return list(found.values())
