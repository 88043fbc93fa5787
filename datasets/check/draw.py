"""Pictures of a few images with their boxes: as read, and as training sees them after its transforms."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from samdetr.datasets.build import build_dataset
from samdetr.datasets.coco import CocoDetection
from samdetr.datasets.image_list import spread
from samdetr.datasets.settings import Data
from samdetr.util.box_ops import cxcywh_to_xyxy
from samdetr.util.drawing import contact_sheet, draw_detections, shrunk
from samdetr.util.files import whole_folder
from samdetr.util.fonts import drawable

EPOCHS = 2  # whose draws of the random transforms are shown
_LONGEST = 1333  # pixels of an image as read; larger ones are drawn smaller


def require_new(folder: Path) -> None:
    """Raise ValueError unless `folder` can be made, or is there and empty: nothing is overwritten."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--draw {folder} is a file; name a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"--draw {folder} is not empty, and nothing is overwritten; name a new folder")
    existing = next(path for path in folder.absolute().parents if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"--draw {folder} cannot be made in {existing}; name a folder that can be written to")


def draw(data: Data, folder: Path, *, split: str, number: int) -> list[Path]:
    """Write a sheet for each of `number` images of a split, from everywhere in it, into a new `folder`: the image as it
    is read, then as the first epochs of a run with the default seed see it (in validation: as an evaluation does).

    Images that cannot be read are left out. Returns the files. Raises ValueError.
    """
    dataset = build_dataset(split, data)
    readable = sorted(set(range(len(dataset))) - dataset.known_faults.keys())
    folder = folder.resolve()
    try:
        with whole_folder(folder) as partial:
            for index in (readable[i] for i in spread(number, len(readable))):
                if dataset.fault(index) is None:
                    name = Path(dataset.images[index].file_name).stem[:100]
                    sheet = _sheet(dataset, index, epochs=EPOCHS if split == "train" else 1)
                    sheet.save(partial / f"{split}_{dataset.images[index].id}_{name}.png")
    except OSError as error:
        raise ValueError(f"--draw {folder} cannot be written: {error}") from None
    return sorted(folder.iterdir())


def _sheet(dataset: CocoDetection, index: int, *, epochs: int) -> Image.Image:
    image = dataset.read_image(index)
    boxes, labels = dataset.objects(index, image.size)
    small, factor = shrunk(image, _LONGEST)
    pictures = [_drawn(dataset, small, boxes * factor, labels)]
    captions = [f"{dataset.images[index].file_name}, as read: {image.width} x {image.height}, {len(boxes)} boxes"]
    for epoch in range(epochs):
        dataset.set_epoch(epoch)
        pixels, target = dataset[index]
        height, width = pixels.shape[-2:]
        seen = cxcywh_to_xyxy(target["boxes"]) * torch.tensor([width, height] * 2)
        pictures.append(_drawn(dataset, Image.fromarray(pixels.permute(1, 2, 0).numpy()), seen, target["labels"]))
        when = f"in epoch {epoch}" if epochs > 1 else "in evaluation"
        captions.append(f"{when}: {width} x {height}, {len(seen)} boxes")
    return contact_sheet([pictures], [captions])


def _drawn(dataset: CocoDetection, image: Image.Image, boxes: Tensor, labels: Tensor) -> Image.Image:
    names = drawable(dataset.categories.names, dataset.categories.category_ids)
    return draw_detections(image, boxes=boxes, labels=labels, scores=None, class_names=names)
