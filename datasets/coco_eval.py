"""COCO's box figures from detections that several processes may have made."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, distributed

from datasets.categories import Categories

# In the order of COCOeval.stats. AP and AR average over IoU 0.50:0.95; 50 and 75 after AP are one IoU each, s, m, l the
# size of the object, numbers after AR the detections allowed in an image.
FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


class CocoEvaluator:
    """Collect detections with `update`, then call `summarize` once, in every process.

    The figures are over the images that were updated, in whichever process, each counted once.
    """

    def __init__(self, coco: COCO, categories: Categories) -> None:
        self.coco, self.categories = coco, categories
        self._detections: dict[int, np.ndarray] = {}  # image id -> (n, 6): category id, x, y, w, h, score
        self._table = ""

    def update(self, predictions: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Take image id -> {"scores" (n,), "labels" (n,), "boxes" (n, 4) xyxy in pixels of the original image}.

        Detections whose label is no category are dropped: the class head also has outputs for the gaps between ids.
        """
        for image_id, prediction in predictions.items():
            assert image_id in self.coco.imgs, f"image id {image_id} is not in the ground truth"
            scores, labels, boxes = (
                prediction[key].detach().to("cpu", torch.float64).numpy() for key in ("scores", "labels", "boxes")
            )
            known = np.isin(labels, list(self.categories.category_ids))
            ids = [self.categories.category_ids[int(label)] for label in labels[known]]
            boxes = boxes[known]
            self._detections[int(image_id)] = np.column_stack(
                [np.array(ids, dtype=np.float64), boxes[:, :2], boxes[:, 2:] - boxes[:, :2], scores[known]]
            )

    def synchronize(self) -> None:
        """Give every process the detections of all. An image that several saw keeps those of the lowest rank."""
        if not distributed.is_available() or not distributed.is_initialized():
            return
        parts: list[dict[int, np.ndarray]] = [{} for _ in range(distributed.get_world_size())]
        distributed.all_gather_object(parts, self._detections)
        self._detections = {}
        for part in parts:
            self._detections = {**part, **self._detections}

    @property
    def results(self) -> list[dict]:
        """The detections as COCO results, by image id."""
        return [
            {"image_id": image_id, "category_id": int(category), "bbox": [x, y, w, h], "score": score}
            for image_id, rows in sorted(self._detections.items())
            for category, x, y, w, h, score in rows.tolist()
        ]

    def summarize(self) -> dict[str, float]:
        """Synchronise and compute the twelve figures, named as in FIGURES; -1 where no object could give one."""
        self.synchronize()
        output = io.StringIO()
        with contextlib.redirect_stdout(output):  # pycocotools prints its progress
            evaluation = COCOeval(self.coco, self._indexed_results(), "bbox")
            evaluation.params.imgIds = sorted(self._detections)
            evaluation.evaluate()
            evaluation.accumulate()
            output.seek(0)
            output.truncate()
            evaluation.summarize()
        self._table = output.getvalue().rstrip("\n")
        return dict(zip(FIGURES, evaluation.stats.tolist()))

    def table(self) -> str:
        """What `summarize` found, as pycocotools' twelve lines."""
        return self._table

    def _indexed_results(self) -> COCO:
        """What COCO.loadRes makes of `results`; that fails where there is no detection at all."""
        annotations = [
            {**result, "id": number, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0}
            for number, result in enumerate(self.results, 1)
        ]
        detections = COCO()
        detections.dataset = {key: self.coco.dataset[key] for key in ("images", "categories")}
        detections.dataset["annotations"] = annotations
        detections.createIndex()
        return detections
