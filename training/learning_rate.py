"""Whether the learning rate fits the images of a step, and the one that does."""

from __future__ import annotations

from samdetr.models.build import FAMILIES
from samdetr.training.presets import PRESETS
from samdetr.training.settings import Optimisation, RunSettings


def reference(settings: RunSettings) -> tuple[float, int | None]:
    """A learning rate that worked, and the images of a step there (None: unknown): of the preset if any, else as
    published."""
    family, preset = FAMILIES[settings.trunk.model], PRESETS[settings.run.preset]
    if preset:
        return preset["lr"], preset["batch_size"]
    return family.defaults.get("lr", Optimisation.lr), family.images_per_step(settings.trunk)


def scaled(settings: RunSettings, processes: int) -> RunSettings:
    """The settings with learning rates in proportion to the images of a step. Raises ValueError: to which is
    unknown."""
    images, how = reference(settings)[1], settings.optimisation
    if images is None:
        raise ValueError(
            f"`scale_lr`: `model` {settings.trunk.model} names no images a step to compare with; pass `lr` instead"
        )
    factor = how.batch_size * how.accumulate * processes / images
    return settings.replace(lr=how.lr * factor, lr_backbone=how.lr_backbone * factor)


def warning(settings: RunSettings, processes: int) -> str | None:
    """A line if the learning rate is that of another number of images a step. Any other learning rate was chosen for
    this run, and needs no advice."""
    rate, images = reference(settings)
    how = settings.optimisation
    here = how.batch_size * how.accumulate * processes
    if how.lr != rate or images is None or images == here:
        return None
    rates = scaled(settings, processes).optimisation
    backbone = f" and `lr_backbone` {rates.lr_backbone:g}" if rates.lr_backbone else ""
    whole, rest = divmod(images, how.batch_size * processes)
    accumulate = f", or `accumulate` {whole} for {images} images" if whole > 1 and not rest else ""
    where = f"in `preset` {settings.run.preset}" if settings.run.preset != "none" else "as published"
    return (
        f"warning: {here} images a step instead of {images} {where}, at the same `lr` {rate:g}: pass `lr` {rates.lr:g}"
        f"{backbone} (`scale_lr` does that){accumulate}"
    )
