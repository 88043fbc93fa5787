"""Pictures of validation images, with their detections and objects."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from samdetr.datasets.coco import CocoDetection
from samdetr.datasets.coco_eval import Detections
from samdetr.util.drawing import draw_detections

IMAGES = 4
THRESHOLD = 0.3
LONGEST = 640  # pixels


def validation_pictures(images: CocoDetection, found: Detections) -> dict[str, Image.Image]:
    """Detections on the same images every time, from everywhere in the set; those that cannot be read are left out."""
    pictures = {}
    for index in np.unique(np.linspace(0, len(images) - 1, IMAGES).round().astype(int)).tolist():
        try:
            picture = draw_found(images, found, index, threshold=THRESHOLD)
        except ValueError:
            continue
        pictures[f"detections/{images.images[index].file_name}"] = picture
    return pictures


def draw_found(images: CocoDetection, found: Detections, index: int, *, threshold: float) -> Image.Image:
    """Image `index` with its detections from a score on. Raises ValueError: it cannot be read."""
    labels = {identity: label for label, identity in images.categories.category_ids.items()}
    columns = found.columns()
    image, factor = _small(images, index)
    chosen = np.flatnonzero((columns["image_id"] == images.images[index].id) & (columns["score"] >= threshold))
    boxes = torch.from_numpy(columns["bbox"][chosen]) * factor  # left, top, width, height
    return draw_detections(
        image,
        boxes=torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1),
        labels=torch.tensor([labels[i] for i in columns["category_id"][chosen].tolist()], dtype=torch.int64),
        scores=torch.from_numpy(columns["score"][chosen]),
        class_names=images.categories.names,
    )


def draw_objects(images: CocoDetection, index: int) -> Image.Image:
    """Image `index` with its objects. Raises ValueError: it cannot be read."""
    image, factor = _small(images, index)
    boxes, labels = images.objects(index, images.read_image(index).size)
    return draw_detections(image, boxes=boxes * factor, labels=labels, scores=None, class_names=images.categories.names)


def _small(images: CocoDetection, index: int) -> tuple[Image.Image, float]:
    """An image that is LONGEST pixels long at most, and by how much it is reduced. Raises ValueError."""
    image = images.read_image(index)
    factor = min(LONGEST / max(image.size), 1)
    return image.resize((max(round(image.width * factor), 1), max(round(image.height * factor), 1))), factor
