"""What an evaluation reports beside COCO's twelve metrics: each class, the best threshold, what is taken for what.

Everything comes from detections and annotations alone. docs/evaluation.md states the rules.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from samdetr.datasets.coco_eval import BoxMetrics, Detections
from samdetr.datasets.ground_truth import GroundTruth
from samdetr.util.class_pictures import draw_confusion, draw_precision_recall, drawable
from samdetr.util.files import whole_file
from samdetr.util.logger import printable, shorter

IOU = 0.5  # of a detection and the object that it finds
BACKGROUND = "background"
_LIMIT = 100  # detections of an image and class that count, those with the highest scores
_LARGEST_AREA = 1e10  # COCO ignores what is larger
_PAIRS = 1_000_000  # whose IoU is computed together
_ROWS = 100  # classes in the table of the console
_SHOWN = ("AP", "AP50", "AR100", "f1", "precision", "recall", "threshold")  # its columns


class BestF1(NamedTuple):
    """Where F1 is highest among all thresholds; NaN for what is undefined. A detection counts if its score is at least
    `threshold`."""

    f1: float = math.nan
    precision: float = math.nan
    recall: float = math.nan
    threshold: float = math.nan

    @classmethod
    def of(cls, scores: np.ndarray, hits: np.ndarray, num_objects: int) -> BestF1:
        """Of n detections, of which `hits` (n,) bool found an object. Of equal F1, the highest threshold."""
        if num_objects == 0:
            return cls()
        if not hits.any():
            return cls(f1=0.0, precision=0.0 if len(hits) else math.nan, recall=0.0)
        order = np.argsort(-scores, kind="stable")
        scores = scores[order]
        last = np.append(scores[1:] != scores[:-1], True)  # a threshold cannot part equal scores
        true, counted = np.cumsum(hits[order])[last], np.flatnonzero(last) + 1
        f1 = 2 * true / (counted + num_objects)
        best = int(f1.argmax())
        return cls(*map(float, (f1[best], true[best] / counted[best], true[best] / num_objects, scores[last][best])))


@dataclass(frozen=True)
class Report:
    """Metrics of all detections and of K classes, sorted by id.

    `total` and each row of `classes` hold the numbers of objects and detections, METRICS and the fields of `BestF1`;
    NaN is undefined. `confusion` (K + 1, K + 1) counts objects by their class (rows) and the class of what found them
    (columns): the last column counts those that nothing found, the last row detections that found none. Its detections
    are those from the threshold in `total` on, or all if that is undefined.
    """

    metrics: BoxMetrics
    total: dict[str, Any]
    classes: list[dict[str, Any]]
    confusion: np.ndarray

    @classmethod
    def of(cls, found: Detections, truth: GroundTruth, names: Mapping[int, str], metrics: BoxMetrics) -> Report:
        """`found` are sorted by image id, `metrics` are theirs, `names` those of categories by id."""
        identities = np.sort(truth.categories)
        objects, ignored, detected, scores, match, hits = _compare(found, truth)

        def row(which: np.ndarray | slice, number: int, values: Mapping[str, float]) -> dict[str, Any]:
            undefined = {name: value if value >= 0 else math.nan for name, value in values.items()}
            best = BestF1.of(scores[which], hits[which], number)
            return {"num_objects": number, "num_detections": len(scores[which]), **undefined, **best._asdict()}

        total = row(slice(None), int((~ignored).sum()), metrics.values)
        by_class = metrics.of_classes()
        numbers = np.bincount(objects.classes[~ignored], minlength=len(identities))
        classes = [
            {"id": identity, "name": names.get(identity, str(identity))}
            | row(detected.classes == k, int(numbers[k]), {name: float(v[k]) for name, v in by_class.items()})
            for k, identity in enumerate(identities.tolist())
        ]
        # Everything if nothing was found: then the figure shows why, exchanged ids for example.
        shown = scores >= (-math.inf if math.isnan(total["threshold"]) else total["threshold"])
        match = np.where(hits, match, -1)[shown]
        confusion = _confusion(detected.select(shown), scores[shown], match, objects, ignored, len(identities))
        return cls(metrics, total, classes, confusion)

    def to_json(self) -> dict[str, Any]:
        """Named metrics, for eval.json."""
        coco = {"coco_eval_bbox": list(self.metrics.values.values())}
        return {**coco, **_nested(self.total), "classes": [_nested(row) for row in self.classes]}

    def table(self) -> str:
        """Lines for the console: COCO's twelve, a row for all classes and one for each."""
        rows = [{"name": "all classes", **self.total}, *self.classes[:_ROWS]]
        width = min(24, max(len(printable(row["name"])) for row in rows))
        lines = [self.metrics.table, "", f"{'':{width}} {'objects':>9} " + " ".join(f"{name:>9}" for name in _SHOWN)]
        for row in rows:
            values = ("-" if math.isnan(row[name]) else f"{row[name]:.3f}" for name in _SHOWN)
            name = shorter(printable(row["name"]), width)
            lines.append(f"{name:{width}} {row['num_objects']:9,} " + " ".join(f"{value:>9}" for value in values))
        if len(self.classes) > _ROWS:
            lines.append(f"... and {len(self.classes) - _ROWS:,} more classes, which the files list")
        lines.append("f1, precision, recall: from the threshold with the best F1 on, at IoU 0.5")
        without = [row["name"] for row in self.classes if not row["num_objects"]]
        if without:
            few = ", ".join(map(printable, without[:5])) + (", ..." if len(without) > 5 else "")
            lines.append(f"{len(without)} of {len(self.classes)} classes have no objects here and no metrics: {few}")
        return "\n".join(lines)

    def write_tables(self, folder: Path) -> None:
        """per_class.csv and confusion_matrix.csv; what is undefined is blank."""
        empty = [[_blank(value) for value in row.values()] for row in self.classes]
        _write_csv(folder / "per_class.csv", [list(self.classes[0]), *empty])
        names = [*(row["name"] for row in self.classes), BACKGROUND]
        rows = [[name, *counts] for name, counts in zip(names, self.confusion.tolist())]
        _write_csv(folder / "confusion_matrix.csv", [["object \\ detected as", *names], *rows])

    def draw(self, folder: Path) -> None:
        """precision_recall.png and confusion_matrix.png."""
        labels, families = drawable(*zip(*((row["name"], row["id"]) for row in self.classes)))
        ap50 = [row["AP50"] for row in self.classes]
        draw_precision_recall(
            folder / "precision_recall.png",
            curves=self.metrics.precision[0, :, :, 0, -1].T,
            ap50=ap50,
            labels=labels,
            families=families,
        )
        threshold = self.total["threshold"]
        which = "all detections" if math.isnan(threshold) else f"scores from {threshold:.3f}"
        draw_confusion(
            folder / "confusion_matrix.png", counts=self.confusion, labels=[*labels, BACKGROUND], families=families,
            title=f"Confusion matrix, {which}, IoU {IOU}",
        )  # fmt: skip


def image_f1(found: Detections, truth: GroundTruth, *, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """F1 of the detections from a score on, and the number of objects, of each image of `found`; F1 is NaN for an image
    that has neither."""
    objects, ignored, detected, scores, _, hits = _compare(found, truth)
    shown = scores >= threshold
    number = len(found.image_ids)
    there = np.bincount(objects.images[~ignored], minlength=number)
    detections = np.bincount(detected.images[shown], minlength=number)
    correct = np.bincount(detected.images[shown & hits], minlength=number)
    with np.errstate(invalid="ignore"):
        return 2 * correct / (there + detections), there


class _Boxes(NamedTuple):
    images: np.ndarray  # (n,) place of the image
    classes: np.ndarray  # (n,) place of the class
    boxes: np.ndarray  # (n, 4): left, top, width, height

    def select(self, which: np.ndarray) -> _Boxes:
        return _Boxes(*(values[which] for values in self))


def _compare(
    found: Detections, truth: GroundTruth
) -> tuple[_Boxes, np.ndarray, _Boxes, np.ndarray, np.ndarray, np.ndarray]:
    """The objects of the images of `found` and which are ignored; the detections that count, their scores, the object
    that each finds, or -1, and whether that counts."""
    identities = np.sort(truth.categories)
    here = np.isin(truth.image_ids, found.image_ids)
    objects = _Boxes(
        np.searchsorted(found.image_ids, truth.image_ids[here]),
        np.searchsorted(identities, truth.category_ids[here]),
        truth.boxes[here],
    )
    crowd = truth.crowd[here]
    ignored = crowd | ~_measured(truth.areas[here])
    detected, scores = _detected(found, identities)
    keys, object_keys = (boxes.images * len(identities) + boxes.classes for boxes in (detected, objects))
    match = _match(keys, detected.boxes, object_keys, objects.boxes, crowd=crowd, ignored=ignored)
    hits = match >= 0
    hits[hits] = ~ignored[match[hits]]
    counts = hits | ((match < 0) & _measured(detected.boxes[:, 2] * detected.boxes[:, 3]))
    return objects, ignored, detected.select(counts), scores[counts], match[counts], hits[counts]


def _detected(found: Detections, identities: np.ndarray) -> tuple[_Boxes, np.ndarray]:
    """Detections of these categories and their scores: of each image and class at most _LIMIT, the best first."""
    known = np.isin(found.category_ids, identities)
    images = np.repeat(np.arange(len(found.image_ids)), found.counts)[known]
    classes, scores = np.searchsorted(identities, found.category_ids[known]), found.scores[known]
    order = np.lexsort((-scores, classes, images))  # stable, as pycocotools sorts
    images, classes = images[order], classes[order]
    new = np.append(True, (images[1:] != images[:-1]) | (classes[1:] != classes[:-1]))[: len(order)]
    rank = np.arange(len(order)) - np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
    kept = rank < _LIMIT
    return _Boxes(images, classes, found.boxes[known][order]).select(kept), scores[order][kept]


def _match(
    keys: np.ndarray,
    boxes: np.ndarray,
    object_keys: np.ndarray,
    object_boxes: np.ndarray,
    *,
    crowd: np.ndarray,
    ignored: np.ndarray,
) -> np.ndarray:
    """The object that each detection finds, or -1: among those with its key, by COCO's rules.

    Detections choose in their order. Each takes the free object with the highest IoU, of equal ones the last. Ignored
    objects are its second choice; a crowd is never taken.
    """
    order = np.argsort(object_keys, kind="stable")
    begin, end = (np.searchsorted(object_keys[order], keys, side) for side in ("left", "right"))
    count = end - begin
    near: list[tuple[np.ndarray, ...]] = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    for part in np.array_split(np.arange(len(keys)), 1 + int(count.sum()) // _PAIRS):
        number = count[part]
        first = np.repeat(begin[part] - (np.cumsum(number) - number), number)
        one, other = np.repeat(part, number), order[first + np.arange(number.sum())]
        iou = _iou(boxes[one], object_boxes[other], crowd[other])
        near.append((one[iou >= IOU], other[iou >= IOU], iou[iou >= IOU]))
    one, other, iou = map(np.concatenate, zip(*near))
    preference = np.lexsort((-other, -iou, ignored[other], one))
    match, taken = [-1] * len(keys), set()
    crowds = set(np.flatnonzero(crowd).tolist())
    for detection, wanted in zip(one[preference].tolist(), other[preference].tolist()):
        if match[detection] < 0 and wanted not in taken:
            match[detection] = wanted
            if wanted not in crowds:
                taken.add(wanted)
    return np.array(match, np.int64)


def _iou(boxes: np.ndarray, others: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Of pairs (n, 4), in the order of pycocotools' operations; for a crowd, the share of the first box inside it."""
    low, high = np.maximum(boxes[:, :2], others[:, :2]), np.minimum(*(b[:, 2:] + b[:, :2] for b in (boxes, others)))
    sides = high - low
    inside = np.where((sides > 0).all(1), sides[:, 0] * sides[:, 1], 0)
    area, other = boxes[:, 2] * boxes[:, 3], others[:, 2] * others[:, 3]
    return inside / np.where(inside > 0, np.where(crowd, area, area + other - inside), 1)


def _measured(areas: np.ndarray) -> np.ndarray:
    return (areas >= 0) & (areas <= _LARGEST_AREA)


def _confusion(
    detected: _Boxes, scores: np.ndarray, match: np.ndarray, objects: _Boxes, ignored: np.ndarray, size: int
) -> np.ndarray:
    """As of `Report`. Detections that found no object of their class choose among those that are left in their image,
    by the same rules."""
    taken = np.zeros(len(ignored), bool)
    taken[match[match >= 0]] = True
    free = np.flatnonzero(~taken & ~ignored)
    rest = np.flatnonzero(match < 0)
    rest = rest[np.lexsort((-scores[rest], detected.images[rest]))]
    no = np.zeros(len(free), bool)
    second = _match(
        detected.images[rest], detected.boxes[rest], objects.images[free], objects.boxes[free], crowd=no, ignored=no
    )
    match = match.copy()
    match[rest[second >= 0]] = free[second[second >= 0]]
    confusion = np.zeros((size + 1, size + 1), np.int64)
    rows = np.where(match >= 0, np.append(objects.classes, size)[match], size)
    np.add.at(confusion, (rows, detected.classes), 1)
    missed = ~ignored
    missed[match[match >= 0]] = False
    np.add.at(confusion, (objects.classes[missed], size), 1)
    return confusion


def _nested(row: Mapping[str, Any]) -> dict[str, Any]:
    """With the best F1 as a part of its own."""
    best = {name: row[name] for name in BestF1._fields}
    return {**{name: value for name, value in row.items() if name not in best}, "best_f1": best}


def _blank(value: Any) -> Any:
    return "" if isinstance(value, float) and math.isnan(value) else value


def _write_csv(path: Path, rows: list[list[Any]]) -> None:
    with whole_file(path) as temporary:
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            csv.writer(file).writerows(rows)
