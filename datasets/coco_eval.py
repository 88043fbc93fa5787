"""COCO's box metrics of detections from one or more processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from torch import Tensor

from samdetr.datasets.categories import Categories
from samdetr.datasets.ground_truth import GroundTruth
from samdetr.util.distributed import all_gather_object

# In the order of COCOeval.stats. AP and AR average over IoU 0.50:0.95; AP50 and AP75 use one IoU. s, m, l select
# objects by size. The number after AR limits the detections of an image and class. Values: the places of IoU, size and
# limit in the arrays of `BoxMetrics`.
_PLACES: dict[str, tuple[int | slice, int, int]] = {
    "AP": (slice(None), 0, 2), "AP50": (0, 0, 2), "AP75": (5, 0, 2),
    "APs": (slice(None), 1, 2), "APm": (slice(None), 2, 2), "APl": (slice(None), 3, 2),
    "AR1": (slice(None), 0, 0), "AR10": (slice(None), 0, 1), "AR100": (slice(None), 0, 2),
    "ARs": (slice(None), 1, 2), "ARm": (slice(None), 2, 2), "ARl": (slice(None), 3, 2),
}  # fmt: skip
METRICS = tuple(_PLACES)


class Detections(NamedTuple):
    """Detections of some images, concatenated."""

    image_ids: np.ndarray  # (images,) int64, images without a detection included
    counts: np.ndarray  # (images,) int64, number of detections of each image
    category_ids: np.ndarray  # (n,) int64
    boxes: np.ndarray  # (n, 4) float64: left, top, width, height in pixels
    scores: np.ndarray  # (n,) float64

    def by_image(self) -> Detections:
        """Sorted by image id; for an image that occurs more than once, the first occurrence."""
        image_ids, chosen = np.unique(self.image_ids, return_index=True)
        counts = self.counts[chosen]
        begins = (np.cumsum(self.counts) - self.counts)[chosen]
        # Row k of an image is k after its beginning in the old order.
        row = np.arange(counts.sum()) + np.repeat(begins - (np.cumsum(counts) - counts), counts)
        return Detections(image_ids, counts, self.category_ids[row], self.boxes[row], self.scores[row])

    def columns(self) -> dict[str, np.ndarray]:
        """A row for each detection, under COCO's names."""
        image_ids = np.repeat(self.image_ids, self.counts)
        return {"image_id": image_ids, "category_id": self.category_ids, "bbox": self.boxes, "score": self.scores}


class BoxMetrics(NamedTuple):
    """METRICS over all classes, and what they are means of: -1 where there are no objects."""

    values: dict[str, float]  # by the names of METRICS
    table: str  # the twelve lines of pycocotools
    precision: np.ndarray  # (10 IoU, 101 recall, classes by id, 4 sizes, 3 limits)
    recall: np.ndarray  # (10 IoU, classes by id, 4 sizes, 3 limits)

    def of_classes(self) -> dict[str, np.ndarray]:
        """METRICS of each class (classes,)."""
        found = {}
        for name, (iou, size, limit) in _PLACES.items():
            values = (self.precision if name.startswith("AP") else self.recall)[iou, ..., size, limit]
            found[name] = values.reshape(-1, values.shape[-1]).mean(0)  # of a class, all are -1 or none is
        return found


def box_metrics(found: Detections, truth: GroundTruth) -> BoxMetrics:
    """COCO's metrics of detections on the images of `found`."""
    columns = {"image_id": truth.image_ids, "category_id": truth.category_ids, "bbox": truth.boxes}
    expected = _indexed(truth, **columns, area=truth.areas, iscrowd=truth.crowd.astype(np.int64))
    detected = _indexed(truth, area=found.boxes[:, 2] * found.boxes[:, 3], **found.columns())
    lines: list[str] = []
    evaluation = COCOeval_faster(expected, detected, "bbox", print_function=lines.append)
    evaluation.params.imgIds = found.image_ids.tolist()
    evaluation.evaluate()
    evaluation.accumulate()
    lines.clear()  # progress messages
    evaluation.summarize()
    values = dict(zip(METRICS, evaluation.stats.tolist()))
    table = "\n".join(lines[: len(METRICS)])  # the library adds metrics that are not COCO's
    return BoxMetrics(values, table, evaluation.eval["precision"], evaluation.eval["recall"])


class CocoEvaluator:
    """Collect detections with `update`, then call `summarize` once, in every process.

    The metrics cover the images passed to `update` in any process. Each image counts once, with its first detections in
    the process of the lowest rank.
    """

    def __init__(self, ground_truth: GroundTruth, categories: Categories) -> None:
        self.ground_truth, self.categories = ground_truth, categories
        table = np.array(sorted(categories.category_ids.items()), np.int64)  # never empty
        self._labels, self._category_ids = table.T
        empty = np.zeros(0, np.int64)
        self._batches = [Detections(empty, empty, empty, np.zeros((0, 4)), np.zeros(0))]
        self.metrics: BoxMetrics | None = None  # of `summarize`

    def update(self, predictions: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Add image id -> {"scores" (n,), "labels" (n,), "boxes" (n, 4) xyxy in pixels of the original image}.

        Detections whose label is not a category are dropped: the class head also has outputs for gaps between ids.
        Detections with a non-finite score or box are dropped because the evaluation library refuses them.
        """
        image_ids = np.array(list(predictions), np.int64)
        assert np.isin(image_ids, self.ground_truth.images).all(), f"not all of {image_ids} are in the ground truth"
        found = list(predictions.values())
        # float64 holds every label exactly. One transfer for all images, because each transfer waits for the GPU.
        labels, scores, boxes = (
            torch.cat([f[key].detach() for f in found]).to("cpu", torch.float64).numpy()
            for key in ("labels", "scores", "boxes")
        )
        place = np.searchsorted(self._labels, labels).clip(max=len(self._labels) - 1)
        known = (self._labels[place] == labels) & np.isfinite(scores) & np.isfinite(boxes).all(1)
        image = np.repeat(np.arange(len(found)), [len(f["scores"]) for f in found])
        boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
        counts = np.bincount(image[known], minlength=len(found))
        category_ids = self._category_ids[place[known]]
        self._batches.append(Detections(image_ids, counts, category_ids, boxes[known], scores[known]))

    @property
    def detections(self) -> Detections:
        """Detections of this process or, after `summarize`, of all processes; sorted by image id."""
        self._batches = [Detections(*map(np.concatenate, zip(*self._batches))).by_image()]
        return self._batches[0]

    @property
    def results(self) -> list[dict]:
        """The detections as COCO results, sorted by image id."""
        return _rows(**self.detections.columns())

    def summarize(self) -> dict[str, float]:
        """Gather the detections of all processes and compute METRICS; -1 for a metric without objects."""
        self._batches = all_gather_object(self.detections)
        self.metrics = box_metrics(self.detections, self.ground_truth)
        return self.metrics.values

    def table(self) -> str:
        """The twelve lines of pycocotools for the metrics of `summarize`."""
        return self.metrics.table if self.metrics else ""


def _indexed(truth: GroundTruth, **columns: np.ndarray) -> COCO:
    """Annotations or detections in the form that the evaluation library takes."""
    coco = COCO()
    coco.dataset = {
        "images": [{"id": identity} for identity in truth.images.tolist()],
        "categories": [{"id": identity} for identity in truth.categories.tolist()],
        # New ids: the library takes id 0 for unmatched and merges equal ids, and files contain both.
        "annotations": _rows(id=np.arange(1, len(columns["bbox"]) + 1), **columns),
    }
    coco.createIndex()
    return coco


def _rows(**columns: np.ndarray) -> list[dict]:
    """A dict of plain numbers and lists for each row of the columns."""
    return [dict(zip(columns, values)) for values in zip(*(column.tolist() for column in columns.values()))]
