"""Can this run learn at all? Train and evaluate on the same few images, without augmentation: `overfit`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from samdetr.datasets.annotations import Annotations
from samdetr.datasets.coco import CocoDetection
from samdetr.datasets.image_list import spread
from samdetr.datasets.transforms import EvalTransforms
from samdetr.training.settings import RunSettings
from samdetr.util.distributed import from_main, get_world_size

ENOUGH = 0.9  # AP50
STEPS = 100  # at least, from one evaluation to the next: an epoch shows every image as often as that needs
# For flags that the user did not type. The network learns by heart: no dropout, and an average would lag behind.
USUAL = {"epochs": 15, "lr_drop": 12, "warmup_iters": 0, "eval_every_epoch": 1, "patience": 0, "dropout": 0.0, "ema": 0}


def applied(settings: RunSettings, given: Mapping[str, Any]) -> RunSettings:
    """The settings for few images. `given`: values of the flags that the user typed."""
    settings = settings.with_resolved_norm()  # by the epochs of the run that is tried out
    return settings.replace(**{name: value for name, value in USUAL.items() if name not in given})


def repeats(settings: RunSettings, images: int) -> int:
    """How often an epoch shows each of so many images."""
    how = settings.optimisation
    return math.ceil(STEPS * how.batch_size * how.accumulate * get_world_size() / images)


def data_sets(
    settings: RunSettings, whole: CocoDetection, annotations: Annotations
) -> tuple[CocoDetection, CocoDetection]:
    """A few images of the training set, to train and to evaluate on. Every process must call this. Raises ValueError:
    there are fewer."""
    few = subset(annotations, settings.run.overfit, without=from_main(lambda: sorted(whole.known_faults)))
    data = settings.data
    train, val = (
        CocoDetection(
            image_folder=whole.image_folder,
            annotation_file=whole.annotation_file,
            transforms=EvalTransforms(short_side=data.eval_size, max_size=data.max_size, normalize=False),
            train=train,
            categories=whole.categories,
            seed=settings.run.seed,
            annotations=few,
            allow_outside=data.allow_outside,
        )
        for train in (True, False)
    )
    return train, val


def subset(annotations: Annotations, number: int, *, without: Sequence[int] = ()) -> Annotations:
    """`number` images with usable objects, from everywhere in the file, except for some rows. Raises ValueError."""
    usable = np.bincount(annotations.image[annotations.usable()], minlength=len(annotations.images))
    rows = sorted(set(np.flatnonzero(usable).tolist()) - set(without))
    if len(rows) < number:
        raise ValueError(
            f"`overfit` {number}: only {len(rows)} images of {annotations.file} can be read and have objects; pass at "
            f"most {len(rows)}"
        )
    images = [annotations.images[rows[i]] for i in spread(number, len(rows))]
    ids = {entry["id"] for entry in images}
    entries = [entry for entry in annotations.entries if entry["image_id"] in ids]
    return Annotations({**annotations.content, "images": images, "annotations": entries}, file=annotations.file)


def is_enough(metrics: Sequence[float] | None) -> bool:
    """`metrics` are the 12 of COCO."""
    return bool(metrics) and metrics[1] >= ENOUGH  # type: ignore[index]


def verdict(settings: RunSettings, metrics: Sequence[float] | None, steps: int) -> str:
    """A line about what the last evaluation shows."""
    count, ap50 = settings.run.overfit, f"{metrics[1]:.3f}" if metrics else "unknown"
    found = f"overfit: AP50 {ap50} on the {count} image(s) it was trained on, after {steps:,} steps"
    if is_enough(metrics):
        return f"{found}: this run can learn"
    return (
        f"{found}: less than {ENOUGH}, it does not learn them. python -m datasets.check {settings.data.coco_path} "
        "--draw FOLDER shows the boxes; if they are right, try another `lr`, a larger `eval_size`, or more `epochs`"
    )
