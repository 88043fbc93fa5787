"""Detections on a few validation images, for trackers."""

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
    """The same images every time, from everywhere in the set; those that cannot be read are left out."""
    labels = {identity: label for label, identity in images.categories.category_ids.items()}
    columns, pictures = found.columns(), {}
    for index in np.unique(np.linspace(0, len(images) - 1, IMAGES).round().astype(int)).tolist():
        record = images.images[index]
        try:
            image = images.read_image(index)
        except ValueError:
            continue
        factor = min(LONGEST / max(image.size), 1)
        size = (max(round(image.width * factor), 1), max(round(image.height * factor), 1))
        chosen = np.flatnonzero((columns["image_id"] == record.id) & (columns["score"] >= THRESHOLD))
        boxes = torch.from_numpy(columns["bbox"][chosen]) * factor  # left, top, width, height
        pictures[f"detections/{record.file_name}"] = draw_detections(
            image.resize(size),
            boxes=torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1),
            labels=torch.tensor([labels[i] for i in columns["category_id"][chosen].tolist()], dtype=torch.int64),
            scores=torch.from_numpy(columns["score"][chosen]),
            class_names=images.categories.names,
        )
    return pictures
