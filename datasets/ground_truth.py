"""The annotations that detections are compared with, in a few arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from samdetr.datasets.annotations import Annotations


@dataclass(frozen=True)
class GroundTruth:
    """Image and category ids of a COCO file, and its N annotations in the file's order, crowds included."""

    images: np.ndarray  # (images,) int64
    categories: np.ndarray  # (categories,) int64
    image_ids: np.ndarray  # (N,) int64
    category_ids: np.ndarray  # (N,) int64
    boxes: np.ndarray  # (N, 4) float64: left, top, width, height in pixels
    areas: np.ndarray  # (N,) float64; they decide whether an object is small, medium or large
    crowd: np.ndarray  # (N,) bool

    @classmethod
    def from_annotations(cls, annotations: Annotations) -> GroundTruth:
        """From valid annotations. A missing area is that of the box."""
        images, categories = (
            np.array([entry["id"] for entry in entries], np.int64)
            for entries in (annotations.images, annotations.categories)
        )
        boxes = annotations.boxes
        areas = np.where(np.isnan(annotations.areas), boxes[:, 2] * boxes[:, 3], annotations.areas)
        image_ids = images[annotations.image]
        return cls(images, categories, image_ids, annotations.category_ids, boxes, areas, annotations.crowd)
