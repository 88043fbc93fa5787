"""Detections from a file of COCO results, whoever wrote it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from samdetr.datasets.annotations import LARGEST, Annotations, boxes_of, image_size, number, read_json
from samdetr.datasets.categories import Categories
from samdetr.datasets.coco_eval import Detections, box_metrics
from samdetr.datasets.coco_eval_report import Report
from samdetr.datasets.ground_truth import GroundTruth
from samdetr.datasets.values import convert, shown
from samdetr.util.logger import log

_FORM = "COCO results, a list of {'image_id', 'category_id', 'bbox', 'score'}"


def evaluate_files(detections: str | Path, annotations: str | Path) -> Report:
    """Compare a file of COCO results with a COCO annotation file. Raises ValueError for what cannot be compared."""
    read = Annotations.read(Path(annotations))
    Categories.from_annotations(read.content["categories"], file=shown(annotations))
    read.require_valid()
    found, truth = read_detections(Path(detections), read), GroundTruth.from_annotations(read)
    return Report.of(found, truth, read.names, box_metrics(found, truth))


def read_detections(file: Path, annotations: Annotations) -> Detections:
    """Detections on all images of valid annotations, sorted by image id.

    Numbers may be written as text or as 1.0, as in annotation files. Raises ValueError, with file, place, value and
    remedy, for the first entry that cannot be evaluated; it also says how many there are.
    """
    content = read_json(file, kind="detections file", expected=_FORM)
    if not isinstance(content, list):
        kind = "an object" if isinstance(content, dict) else f"{content!r:.40}"
        other = "; it looks like an annotation file" if isinstance(content, dict) and "annotations" in content else ""
        raise ValueError(f"{shown(file)} holds {kind} instead of a list{other}; pass {_FORM}")
    entries, _ = convert("detections", content)
    wrong = np.array([not isinstance(entry, dict) for entry in entries], bool)
    _refuse(file, wrong, lambda place: f"is {entries[place]!r:.80}, no object; pass {_FORM}")
    image_ids, category_ids = ([entry.get(key) for entry in entries] for key in ("image_id", "category_id"))
    row = np.array([annotations.row_of.get(i, -1) if type(i) is int else -1 for i in image_ids], np.int64)
    known = np.array([type(i) is int and i in annotations.names for i in category_ids], bool)
    boxes, is_box = boxes_of([entry.get("bbox") for entry in entries])
    with np.errstate(invalid="ignore"):
        usable = is_box & (np.abs(boxes) < LARGEST).all(1) & (boxes[:, 2:] >= 0).all(1)
    scores = np.array([number(entry.get("score")) for entry in entries], np.float64)

    def unknown(key: str, place: int) -> str:
        if key not in entries[place]:
            return f"has no '{key}'; pass {_FORM}"
        kind = "images" if key == "image_id" else "categories"
        return (
            f"has {key} {entries[place][key]!r:.80}, which '{kind}' of {shown(annotations.file)} does not list; pass "
            "the annotations that belong to the detections, or remove it"
        )

    def box_fault(place: int) -> str:
        entry = entries[place]
        if entry.get("bbox") not in (None, []):
            return (
                f"has bbox {entry['bbox']!r:.80}; it must be four finite numbers [left, top, width, height] without a "
                "negative size: correct or remove it"
            )
        what = "only a mask, no 'bbox'; boxes are compared" if "segmentation" in entry else "no 'bbox'"
        return f"has {what}: add [left, top, width, height] in pixels"

    def score_fault(place: int) -> str:
        value = f"score {entries[place]['score']!r:.80}" if "score" in entries[place] else "no 'score'"
        return f"has {value}; it must be a finite number: correct or remove it"

    _refuse(file, row < 0, lambda place: unknown("image_id", place))
    _refuse(file, ~known, lambda place: unknown("category_id", place))
    _refuse(file, ~usable, box_fault)
    _refuse(file, ~np.isfinite(scores), score_fault)
    sizes = np.array([image_size(entry) or (np.nan, np.nan) for entry in annotations.images], np.float64)
    _warn_of_form(file, boxes, sizes[row])
    identities = np.sort(np.array([entry["id"] for entry in annotations.images], np.int64))
    place = np.searchsorted(identities, np.array(image_ids, np.int64))
    order = np.argsort(place, kind="stable")  # equal scores keep the file's order
    counts = np.bincount(place, minlength=len(identities))
    return Detections(identities, counts, np.array(category_ids, np.int64)[order], boxes[order], scores[order])


def _refuse(file: Path, wrong: np.ndarray, fault: Callable[[int], str]) -> None:
    """Raise ValueError for the first entry that is wrong, if any."""
    if wrong.any():
        place, number = int(wrong.argmax()), int(wrong.sum())
        more = f" ({number:,} of {len(wrong):,} entries have this fault)" if number > 1 else ""
        raise ValueError(f"{shown(file)}: entry {place} {fault(place)}{more}")


def _warn_of_form(file: Path, boxes: np.ndarray, sizes: np.ndarray) -> None:
    """Boxes of another form are no error by themselves: all together they show it."""
    if len(boxes) < 10:
        return
    right_bottom = boxes[:, :2] + boxes[:, 2:]
    with np.errstate(invalid="ignore"):
        outside = (right_bottom > 1.1 * sizes).any(1).mean()
    if boxes.max() <= 2:
        log(f"warning: {shown(file)}: no box reaches beyond 2 pixels; are they fractions? bbox is in pixels")
    elif outside > 0.2:
        log(
            f"warning: {shown(file)}: {outside:.0%} of the boxes end far outside of their image; bbox is [left, top, "
            "width, height], not the corners"
        )
