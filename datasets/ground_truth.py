"""The annotations that detections are compared with, in a few arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class GroundTruth:
    """Images and categories of a COCO file by their ids, and its N annotations in the file's order, crowds included."""

    images: np.ndarray  # (images,) int64
    categories: np.ndarray  # (categories,) int64
    image_ids: np.ndarray  # (N,) int64
    category_ids: np.ndarray  # (N,) int64
    boxes: np.ndarray  # (N, 4) float64: left, top, width, height in pixels
    areas: np.ndarray  # (N,) float64, which decide whether an object is small, medium or large
    crowd: np.ndarray  # (N,) bool

    @classmethod
    def from_content(cls, content: dict) -> GroundTruth:
        """From a COCO file as JSON gives it, checked before. Areas that it leaves out are those of the boxes."""
        annotations = content["annotations"]
        boxes = np.array([a["bbox"] for a in annotations], np.float64).reshape(-1, 4)
        areas = [a["area"] if isinstance(a.get("area"), (int, float)) else np.nan for a in annotations]
        areas = np.array(areas, np.float64)
        return cls(
            images=np.array([image["id"] for image in content["images"]], np.int64),
            categories=np.array([category["id"] for category in content["categories"]], np.int64),
            image_ids=np.array([a["image_id"] for a in annotations], np.int64),
            category_ids=np.array([a["category_id"] for a in annotations], np.int64),
            boxes=boxes,
            areas=np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas),
            crowd=np.array([bool(a.get("iscrowd")) for a in annotations], bool),
        )
