"""The images on which an evaluation was best and worst, with their objects and detections."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from samdetr.datasets.coco import CocoDetection
from samdetr.datasets.coco_eval_file import read_detections
from samdetr.datasets.coco_eval_report import image_f1
from samdetr.datasets.ground_truth import GroundTruth
from samdetr.datasets.settings import Data
from samdetr.datasets.sources import require_split
from samdetr.datasets.transforms import EvalTransforms
from samdetr.training.runs import Run
from samdetr.training.validation_pictures import draw_found, draw_objects

_WIDEST = 1600  # pixels


def jpeg(picture: Image.Image) -> bytes:
    """As a file that is not too large."""
    picture, file = picture.convert("RGB"), io.BytesIO()
    if picture.width > _WIDEST:
        picture = picture.resize((_WIDEST, max(round(picture.height * _WIDEST / picture.width), 1)))
    picture.save(file, "JPEG", quality=85)
    return file.getvalue()


@dataclass(frozen=True)
class Pair:
    """An image twice, as JPEGs: with its objects, with its detections."""

    title: str
    path: Path
    objects: bytes
    detections: bytes


def best_and_worst(run: Run, number: int) -> tuple[list[Pair], list[Pair]]:
    """By F1 at IoU 0.5 of the detections from the evaluation's best threshold on; of equal ones with most objects.

    Raises ValueError: the data set is not where the evaluation found it, or its files do not belong together.
    """
    assert run.evaluation
    data = Data.pick(run.evaluation.settings)
    source = require_split(data.split, data)
    annotations = source.read()
    annotations.require_valid()
    found = read_detections(run.folder / "detections.json", annotations)
    images = CocoDetection(
        image_folder=source.folder,
        annotation_file=source.file,
        transforms=EvalTransforms(short_side=data.eval_size, max_size=data.max_size, normalize=False),
        train=False,
        annotations=annotations,
        allow_outside=data.allow_outside,
    )
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
            pairs.append(Pair(title, images.image_path(index), *map(jpeg, sides)))
        return pairs

    return draw(best), draw(worst)
