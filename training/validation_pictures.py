"""Pictures of validation images, with their detections and objects."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from samdetr.datasets.coco import CocoDetection
from samdetr.datasets.coco_eval import Detections
from samdetr.datasets.image_list import spread
from samdetr.util.drawing import draw_detections, shrunk

IMAGES = 4
THRESHOLD = 0.3
LONGEST = 640  # pixels


def validation_pictures(images: CocoDetection, found: Detections) -> dict[str, Image.Image]:
    """Detections on the same images every time, from everywhere in the set; those that cannot be read are left out."""
    pictures = {}
    for index in spread(IMAGES, len(images)):
        try:
            image = images.read_image(index)
        except ValueError:
            continue
        picture = draw_found(images, found, index, image, threshold=THRESHOLD)
        pictures[f"detections/{images.images[index].file_name}"] = picture
    return pictures


def draw_found(
    images: CocoDetection, found: Detections, index: int, image: Image.Image, *, threshold: float
) -> Image.Image:
    """Image `index`, read already, with its detections from a score on."""
    labels = {identity: label for label, identity in images.categories.category_ids.items()}
    columns = found.columns()
    image, factor = shrunk(image, LONGEST)
    chosen = np.flatnonzero((columns["image_id"] == images.images[index].id) & (columns["score"] >= threshold))
    boxes = torch.from_numpy(columns["bbox"][chosen]) * factor  # left, top, width, height
    return draw_detections(
        image,
        boxes=torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1),
        labels=torch.tensor([labels[i] for i in columns["category_id"][chosen].tolist()], dtype=torch.int64),
        scores=torch.from_numpy(columns["score"][chosen]),
        class_names=images.categories.names,
    )


def draw_objects(images: CocoDetection, index: int, image: Image.Image) -> Image.Image:
    """Image `index`, read already, with its objects."""
    boxes, labels = images.objects(index, image.size)
    image, factor = shrunk(image, LONGEST)
    return draw_detections(image, boxes=boxes * factor, labels=labels, scores=None, class_names=images.categories.names)
