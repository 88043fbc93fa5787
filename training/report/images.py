"""The images on which an evaluation was best and worst, with their objects and detections."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from samdetr.datasets.annotations import Annotations
from samdetr.datasets.coco import CocoDetection
from samdetr.datasets.coco_eval_file import read_detections
from samdetr.datasets.coco_eval_report import image_f1
from samdetr.datasets.ground_truth import GroundTruth
from samdetr.datasets.image_list import spread
from samdetr.datasets.settings import Data
from samdetr.datasets.sources import require_split
from samdetr.datasets.transforms import EvalTransforms
from samdetr.training.runs import Run
from samdetr.training.validation_pictures import draw_found, draw_objects
from samdetr.util.drawing import shrunk

_LONGEST = 1600  # pixels


def jpeg(picture: Image.Image) -> bytes:
    """As a file that is not too large."""
    picture, file = shrunk(picture.convert("RGB"), _LONGEST)[0], io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return file.getvalue()


@dataclass(frozen=True)
class Pair:
    """An image twice, as JPEGs: with its objects, with its detections."""

    title: str
    objects: bytes
    detections: bytes


def read_images(settings: Mapping[str, Any]) -> tuple[CocoDetection, Annotations]:
    """The images that a run with these settings evaluates on. Raises ValueError: they are not where it found them."""
    data = Data.pick(dict(settings))
    source = require_split(data.split, data)
    annotations = source.read()
    annotations.require_valid()
    images = CocoDetection(
        image_folder=source.folder,
        annotation_file=source.file,
        transforms=EvalTransforms(short_side=data.eval_size, max_size=data.max_size, normalize=False),
        train=False,
        annotations=annotations,
        allow_outside=data.allow_outside,
    )
    return images, annotations


def some_images(run: Run, number: int) -> list[Path]:
    """Files of images that the run evaluates on, from everywhere in the set. Raises ValueError."""
    try:
        images, _ = read_images(run.settings)
    except ValueError as error:
        raise ValueError(f"the images that it evaluates on are not found from here: {error}") from None
    return [images.image_path(index) for index in spread(number, len(images))]


def best_and_worst(run: Run, number: int) -> tuple[list[Pair], list[Pair]]:
    """By F1 at IoU 0.5 of the detections from the evaluation's best threshold on; of equal ones with most objects.

    Raises ValueError: the data set is not where the evaluation found it, or its files do not belong together.
    """
    assert run.evaluation
    images, annotations = read_images(run.evaluation.settings)
    found = read_detections(run.folder / "detections.json", annotations)
    threshold = run.evaluation.threshold
    f1, objects = image_f1(found, GroundTruth.from_annotations(annotations), threshold=threshold)
    place = {record.id: index for index, record in enumerate(images.images)}
    known = [row for row in np.lexsort((-objects, f1)).tolist() if f1[row] >= 0]
    best = sorted(known, key=lambda row: (-f1[row], -objects[row]))[: min(number, (len(known) + 1) // 2)]
    worst = [row for row in known if row not in best][:number]

    def draw(rows: Sequence[int]) -> list[Pair]:
        pairs = []
        for row in rows:
            index = place[int(found.image_ids[row])]
            image = images.read_image(index)
            sides = draw_objects(images, index, image), draw_found(images, found, index, image, threshold=threshold)
            title = f"{images.images[index].file_name}: F1 {f1[row]:.2f}, scores from {threshold:.2f}"
            pairs.append(Pair(title, *map(jpeg, sides)))
        return pairs

    return draw(best), draw(worst)
