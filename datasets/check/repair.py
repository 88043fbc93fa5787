"""Repair annotation files, as far as the files themselves allow: what can be converted is not removed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from samdetr.datasets.annotations import Annotations, Size, has_text_id, is_id, number, repeated
from samdetr.datasets.check.boxes import ROUNDING, area_fits, box_verdicts
from samdetr.datasets.check.files import FileState, shared_pixels
from samdetr.datasets.check.report import Finding, by_severity
from samdetr.datasets.check.splits import Split, all_findings, check_split, listed_sizes, removed_images
from samdetr.datasets.check.unite import unite_categories

UNUSABLE: tuple[str, ...] = ("missing_image", "zero_byte_image", "truncated_image", "unreadable_image", "huge_image")
UNUSABLE += ("special_file", "outside_image")
# Annotations of these kinds are removed.
HOPELESS: tuple[str, ...] = ("box_entry", "box_not_finite", "box_negative_size", "box_zero_size", "box_outside")
HOPELESS += ("unknown_image", "unknown_category", "iscrowd", "annotations of removed images")
TRUTHS = {"false": 0, "no": 0, "n": 0, "f": 0, "": 0, "0.0": 0, "true": 1, "yes": 1, "y": 1, "t": 1, "1.0": 1}
PASSES = 8  # a repair can uncover another fault; two or three passes are usual

Inspect = Callable[[Split, dict[str, Size | None]], dict[str, FileState]]


@dataclass(frozen=True)
class Repairs:
    """Numbers of repairs by kind, and how many objects and images were removed, by the kind of their fault.

    What occurs twice and is kept once is not removed.
    """

    done: Counter[str] = field(default_factory=Counter)
    objects: Counter[str] = field(default_factory=Counter)
    images: Counter[str] = field(default_factory=Counter)

    def losses(self, before: Mapping[str, int], share: float) -> list[tuple[str, int, int, Counter[str]]]:
        """What was removed in a larger share than `share` of the numbers `before`: "images" or "annotations", how many,
        of how many, and by kind."""
        lost = {"images": self.images, "annotations": self.objects}
        numbers = [(what, sum(kinds.values()), before[what], kinds) for what, kinds in lost.items()]
        return [(what, n, total, kinds) for what, n, total, kinds in numbers if n > share * total]


def repair_splits(
    splits: Sequence[Split], loaded: Mapping[str, Annotations], *, inspect: Inspect, num_queries: int
) -> tuple[dict[str, dict], dict[str, Repairs], list[Finding]]:
    """Repair decoded splits, whose annotations are `loaded`, until nothing is left to repair.

    `inspect` decodes files by names that a repair has found. Raises ValueError if no image would be left.

    Returns the contents of repaired annotation files and the repairs, both by split, and the findings that a check of
    the repaired data reports.
    """
    states = {split.name: dict(split.states) for split in splits}
    contents = {split.name: loaded[split.name].content for split in splits}
    repairs = {split.name: Repairs() for split in splits}
    for split in splits:
        if number_of := len(loaded[split.name].converted):
            repairs[split.name].done["number_form"] = number_of
    for _ in range(PASSES):
        before = sum(one.done.total() for one in repairs.values())
        shared = {name for name, _ in shared_pixels(states["train"], states["val"])} if len(states) == 2 else set()
        for split in splits:
            name = split.name
            annotations = Annotations(_number_text_ids(contents[name], repairs[name].done), file=loaded[name].file)
            sizes = listed_sizes(annotations)
            unknown = {file: size for file, size in sizes.items() if file not in states[name]}
            states[name] |= inspect(split, unknown) if unknown else {}
            contents[name] = content = repair(
                annotations, states[name], repairs[name], remove=shared if name == "train" else ()
            )
            if not content["images"]:
                raise ValueError(f"no image of {name} would be left; the files or the sizes are wrong as a whole")
            left = listed_sizes(Annotations(content))
            states[name] = {file: _with_file_size(states[name][file]) for file in left if file in states[name]}
        if len(contents) == 2:
            contents["train"], contents["val"], number_of = unite_categories(contents["train"], contents["val"])
            repairs["val"].done["categories_differ"] += number_of
        if sum(one.done.total() for one in repairs.values()) == before:
            break
    again = []
    for split in splits:
        repaired = Annotations(contents[split.name])
        again.append(
            check_split(repaired, states[split.name], split=split.name, folder=split.folder, num_queries=num_queries)
        )
    return contents, repairs, by_severity(all_findings(again))


def repair(
    annotations: Annotations, states: dict[str, FileState], repairs: Repairs, *, remove: Collection[str] = ()
) -> dict:
    """A repaired copy of the content of an annotation file; `repairs` count what was done.

    `states` describe the decoded image files by name; images in `remove` are removed as well. "removed_images" lists
    removed images (file name, reason), so that a later check does not report their files as unlisted.
    """
    done = repairs.done
    categories = _first_of(annotations.categories, "id", "name")
    done["category_entry"] += len(annotations.content["categories"]) - len(annotations.categories)
    done["duplicate_category_id"] += len(annotations.categories) - len(categories)
    images, new_id, removed, sizes = _images(annotations, states, remove, repairs)
    repaired = {
        **annotations.content,
        "images": images,
        "annotations": _annotations(annotations.with_sizes(sizes), new_id, repairs),
        "categories": categories,
    }
    if removed:
        repaired["removed_images"] = [*removed_images(annotations.content), *removed]
    return repaired


def _with_file_size(state: FileState) -> FileState:
    """The state once the annotation file has the size of the image file."""
    return replace(state, fault=None, reason="", size=state.file_size) if state.fault == "image_size" else state


def _number_text_ids(content: dict, done: Counter[str]) -> dict:
    """Numbers instead of texts as the ids of images and categories, and in the annotations that refer to them."""
    content = dict(content)
    for name, reference in (("images", "image_id"), ("categories", "category_id")):
        texts = dict.fromkeys(entry["id"] for entry in content[name] if has_text_id(entry))
        if not texts:
            continue
        used = [e["id"] for e in content[name] if isinstance(e, dict) and is_id(e.get("id"))]
        new = {text: place for place, text in enumerate(texts, max(used, default=0) + 1)}
        done["text_id"] += len(texts)
        for list_, key in ((name, "id"), ("annotations", reference)):
            content[list_] = [
                {**entry, key: new[entry[key]]}
                if isinstance(entry, dict) and isinstance(entry.get(key), str) and entry[key] in new
                else entry
                for entry in content[list_]
            ]
    return content


def _images(
    annotations: Annotations, states: dict[str, FileState], remove: Collection[str], repairs: Repairs
) -> tuple[list[dict], dict[int, int], list[dict], dict[str, Size]]:
    """Entries that are kept; a map from old to new image ids (images of one file are merged); removed entries; and the
    frames of boxes by file name."""
    valid, done = annotations.images, repairs.done
    distinct = _first_of(valid, "id", "file_name")
    done["image_entry"] += (invalid := len(annotations.content["images"]) - len(valid))
    repairs.images["image_entry"] += invalid
    done["duplicate_image_id"] += len(valid) - len(distinct)
    # Boxes of several images under one id cannot be distinguished: all of these images are removed.
    ambiguous = repeated(distinct, "id")
    extents = _extents(annotations)
    kept: dict[str, dict] = {}
    new_id: dict[int, int] = {}
    removed: list[dict] = []
    for entry in distinct:
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
            if state.file_size and (extents[annotations.row_of[identity]] <= np.add(state.file_size, ROUNDING)).all():
                entry = {**entry, "width": state.file_size[0], "height": state.file_size[1]}
            else:
                reason = "image_size"
        elif state.new_name:  # the next pass looks at the file
            done["image_name"] += 1
            entry = {**entry, "file_name": state.new_name}
        if reason:
            done[reason] += reason != "image_size"
            repairs.images[reason] += 1
            removed.append({"file_name": name, "reason": reason})
        elif entry["file_name"] in kept:
            done["duplicate_file_name"] += 1
            new_id[identity] = kept[entry["file_name"]]["id"]
        else:
            kept[entry["file_name"]] = entry
            new_id[identity] = identity
    frames = {name: state.file_size if state.fault == "image_size" else state.size for name, state in states.items()}
    known = {name: size for name, size in frames.items() if size}
    return list(kept.values()), new_id, [entry for entry in removed if entry["file_name"] not in kept], known


def _annotations(annotations: Annotations, new_id: dict[int, int], repairs: Repairs) -> list[dict]:
    done = repairs.done
    verdict = {row: kind for kind, rows in box_verdicts(annotations).items() for row in np.flatnonzero(rows).tolist()}
    done["annotation_entry"] += (invalid := len(annotations.content["annotations"]) - len(annotations.entries))
    repairs.objects["annotation_entry"] += invalid
    form = _form_of_fractions(annotations.boxes[[row for row, kind in verdict.items() if kind == "box_normalised"]])
    next_id = max((entry["id"] for entry in annotations.entries if is_id(entry.get("id"))), default=0) + 1
    seen: dict[int, list[dict]] = defaultdict(list)
    merged: dict[int, list] = {identity: [] for identity, count in Counter(new_id.values()).items() if count > 1}
    kept = []
    for row, entry in enumerate(annotations.entries):
        kind = verdict.get(row)
        if annotations.bad_crowd[row]:
            meaning = TRUTHS.get(str(entry["iscrowd"]).strip().lower()) if isinstance(entry["iscrowd"], str) else None
            entry = entry if meaning is None else {**entry, "iscrowd": meaning}
            done["iscrowd"] += meaning is not None
            kind = kind if meaning is not None else "iscrowd"
        if annotations.image[row] < 0:
            kind = "unknown_image"
        elif not annotations.known_category[row]:
            kind = "unknown_category"
        elif entry["image_id"] not in new_id:
            kind = "annotations of removed images"
        if kind:
            done[kind] += 1
            if kind in HOPELESS:
                repairs.objects[kind] += 1
                continue
            form_of_box = form if kind == "box_normalised" else kind
            entry = _new_box(entry, form_of_box, annotations.boxes[row], annotations.frames[row])

        identity = entry.get("id")
        if is_id(identity):
            if identity in seen:
                done["duplicate_annotation_id"] += 1
                if entry in seen[identity]:
                    continue
                entry, next_id = {**entry, "id": next_id}, next_id + 1
            seen[identity].append(entry)
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

    `kind` is the kind of fault or, for fractions, a key of FORMS.
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
        of_the_box = abs(area - old_area) <= 0.01 * old_area  # then it changes with the box
        if kind == "area" or of_the_box or not area_fits(np.array(area), *box[2:]):
            entry["area"] = values[2] * values[3]
    return entry


# Meanings of four numbers, and the conversion to left, top, width, height.
FORMS = {
    "xywh": lambda box: box,
    "cxcywh": lambda box: np.concatenate([box[..., :2] - box[..., 2:] / 2, box[..., 2:]], -1),
    "xyxy": lambda box: np.concatenate([box[..., :2], box[..., 2:] - box[..., :2]], -1),
}


def _form_of_fractions(boxes: np.ndarray) -> str:
    """The first of FORMS in which all boxes are in order and within the image."""
    for name, convert in FORMS.items():
        start, size = np.split(convert(boxes), 2, axis=1)
        if (start >= -0.02).all() and (size > 0).all() and (start + size <= 1.02).all():
            return name
    return "xywh"


def _extents(annotations: Annotations) -> np.ndarray:
    """The largest right and bottom of the boxes of each row of `images`, (rows, 2)."""
    extents = np.zeros((len(annotations.images), 2))
    ends = annotations.boxes[:, :2] + annotations.boxes[:, 2:]
    usable = np.isfinite(ends).all(1) & (annotations.image >= 0)
    np.maximum.at(extents, annotations.image[usable], ends[usable])
    return extents


def _first_of(entries: Sequence[dict], *keys: str) -> list[dict]:
    """Of entries with equal values under `keys`, the first."""
    found: dict[tuple, dict] = {}
    for entry in entries:
        found.setdefault(tuple(entry[key] for key in keys), entry)
    return list(found.values())
