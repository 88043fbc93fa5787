"""What a detector found in one image."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import batched_nms, box_convert

from samdetr.datasets.categories import Categories
from samdetr.inference.sources import Source
from samdetr.util.drawing import draw_detections
from samdetr.util.files import whole_file
from samdetr.util.fonts import drawable
from samdetr.util.logger import printable


class Detection(NamedTuple):
    """One object: `box` is left, top, right, bottom in pixels."""

    box: tuple[float, float, float, float]
    score: float
    name: str
    category_id: int
    label: int
    query: int


@dataclass(frozen=True, eq=False, repr=False)
class Detections:
    """The objects in one image, best first; all tensors are on the CPU.

    Attributes:
        boxes: (n, 4) float32, left, top, right, bottom in pixels of the upright image; not clipped to it, as published.
        scores: (n,) float32, in [0, 1].
        labels: (n,) int64, outputs of the network's class head.
        queries: (n,) int64, the object query that each detection comes from.
        size: width and height of the upright image.
        categories: ids and names of the labels.
        source: the image.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    queries: Tensor
    size: tuple[int, int]
    categories: Categories
    source: Source

    @property
    def category_ids(self) -> Tensor:
        """(n,) int64, the data set's own ids."""
        return torch.tensor([self.categories.category_ids[k] for k in self.labels.tolist()], dtype=torch.int64)

    @property
    def names(self) -> list[str]:
        """The n class names."""
        return [self.categories.names[label] for label in self.labels.tolist()]

    @property
    def image(self) -> Image.Image:
        """The upright image in RGB; a file is read again. Raises ValueError if it cannot be read any more."""
        return self.source.read()

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Detection]:
        numbers = (self.category_ids.tolist(), self.labels.tolist(), self.queries.tolist())
        for box, *values in zip(self.boxes.tolist(), self.scores.tolist(), self.names, *numbers):
            yield Detection(tuple(box), *values)

    def __repr__(self) -> str:
        counts = ", ".join(f"{number} {name}" for name, number in Counter(self.names).items())
        return f"<Detections in {self.source.name}, {self.size[0]} x {self.size[1]}: {counts or 'none'}>"

    def above(self, threshold: float) -> Detections:
        """Those with a score of at least `threshold`. Raises ValueError for a threshold outside [0, 1]."""
        return self.select(self.scores >= check_threshold(threshold))

    def without_duplicates(self, iou: float) -> Detections:
        """Of boxes of one class that overlap by more than `iou`, only the best (non-maximum suppression). Raises
        ValueError for an `iou` outside [0, 1]."""
        check_threshold(iou, name="iou")
        # It keeps classes apart by moving them, for which boxes must not begin left of or above 0.
        boxes = self.boxes.double() - min(0.0, self.boxes.amin().item() if len(self) else 0.0)
        return self.select(batched_nms(boxes, self.scores.double(), self.labels, iou))

    def select(self, which: Tensor | slice) -> Detections:
        """Those that `which` chooses, a mask (n,), indices or a slice."""
        chosen = {name: getattr(self, name)[which] for name in ("boxes", "scores", "labels", "queries")}
        return replace(self, **chosen)

    @property
    def drawn_names(self) -> dict[int, str]:
        """What is drawn for each label: the class name, or the class's id if no font here has its letters."""
        return drawable(self.categories.names, self.categories.category_ids)

    def draw(self) -> Image.Image:
        """The image with boxes, class names and scores; a small one is enlarged by a whole factor."""
        return draw_detections(
            self.image, boxes=self.boxes, labels=self.labels, scores=self.scores, class_names=self.drawn_names
        )

    def summary(self) -> str:
        """The classes with their scores, the best first: "2 raccoon (0.45, 0.37), 1 fox (0.41)"; "" if there are none.
        Of more than ten scores the first nine and the last are shown."""
        scores: dict[str, list[str]] = {}
        for name, score in zip(self.names, self.scores.tolist()):
            scores.setdefault(name, []).append(f"{score:.2f}")
        parts = []
        for name, values in scores.items():
            shown = values if len(values) <= 10 else [*values[:9], "...", values[-1]]
            parts.append(f"{len(values)} {printable(name)} ({', '.join(shown)})")
        return ", ".join(parts)

    def save(self, path: str | os.PathLike) -> Path:
        """Draw the detections into a file, and return its path; see `save_picture`."""
        return save_picture(self.draw(), path)

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """COCO results: a dict of image_id, category_id, bbox (left, top, width, height) and score for each object."""
        boxes = box_convert(self.boxes.double(), "xyxy", "xywh")
        rows = zip(self.category_ids.tolist(), boxes.tolist(), self.scores.double().tolist())
        return [{"image_id": image_id, "category_id": c, "bbox": box, "score": score} for c, box, score in rows]

    def to_supervision(self) -> Any:
        """A `supervision.Detections`, class ids being category ids. Raises ImportError without that package."""
        try:
            import supervision
        except ImportError:
            raise ImportError("to_supervision() needs the package supervision: pip install supervision") from None
        import numpy as np

        return supervision.Detections(
            xyxy=self.boxes.numpy(),
            confidence=self.scores.numpy(),
            class_id=self.category_ids.numpy(),
            data={"class_name": np.array(self.names, dtype=str)},
        )


def check_threshold(threshold: float, *, name: str = "threshold") -> float:
    """The threshold itself. Raises ValueError if it is not in [0, 1]."""
    if not 0 <= threshold <= 1:
        raise ValueError(f"`{name}` {threshold} is not between 0 and 1; pass 0.5, say")
    return threshold


def save_picture(picture: Image.Image, path: str | os.PathLike) -> Path:
    """Write a picture in the format of its suffix, whole or not at all, and return the path of the file.

    If no format that can be written has this suffix, ".png" is appended. Raises OSError.
    """
    path = picture_path(path)
    options: dict[str, Any] = {"quality": 92} if path.suffix.lower() in (".jpg", ".jpeg") else {}
    with whole_file(path) as temporary:
        picture.save(temporary, **options)
    return path


def picture_path(path: str | os.PathLike) -> Path:
    """The name under which `save_picture` writes."""
    path = Path(path)
    known = Image.registered_extensions().get(path.suffix.lower()) in Image.SAVE
    return path if known else path.with_name(f"{path.name}.png")
