"""What a run shows: one block at the start, notes on flags without effect, a line per epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from samdetr.training.presets import PRESETS
from samdetr.training.resume import Resume, is_auto
from samdetr.training.run import Parts
from samdetr.training.settings import PARTS, RunSettings
from samdetr.util.distributed import get_world_size

_NAMES = 6  # classes that are named

# Flags that change nothing in an evaluation. Those of published recipes are not listed: their test scripts pass them.
_TRAINING = (
    "accumulate", "compare", "ema", "max_hours", "overwrite", "patience", "preset", "profile", "save_every_iterations",
    "save_every_minutes", "scale_lr", "start_epoch", "track",
)  # fmt: skip
_SAVING = ("keep", "overwrite", "save_every_epoch", "save_every_iterations", "save_every_minutes")

_AUGMENTATION = ("train_sizes", "crop_augmentation")


def notes(settings: RunSettings, given: Mapping[str, Any]) -> list[str]:
    """A line for each flag that has no effect in this combination. `given`: values of the flags that were typed."""
    run, why = settings.run, dict[str, str]()
    if run.eval:
        why |= dict.fromkeys(_TRAINING, "with `eval`")
    else:
        if not run.pretrained:
            why["raw_weights"] = "without `eval` or `pretrained`"
        if not run.output_dir:
            why |= dict.fromkeys(_SAVING, "without `output_dir`")
        if run.overfit:
            why |= dict.fromkeys((*_SAVING, *_AUGMENTATION, "compare", "output_dir", "track"), "with `overfit`")
    if settings.optimisation.lr_schedule != "step":
        why["lr_drop"] = f"with `lr_schedule` {settings.optimisation.lr_schedule}"
    if run.resume and not is_auto(run.resume):
        why["backbone_weights"] = "with `resume`, whose file has them"
    return [f"note: `{name}` has no effect {reason}" for name, reason in why.items() if name in given]


def start_block(parts: Parts, resume: Resume | None) -> str:
    """What is computed with what, a line each. `resume`: where training starts; None: the run evaluates."""
    settings, data = parts.settings, parts.data
    n_parameters = sum(weight.numel() for weight in parts.network.parameters() if weight.requires_grad)
    images = f"{len(data.val_images):,} images to evaluate on"
    if data.train:
        images = f"{len(data.train.images):,} images to train on, {images}"
    names = list(data.categories.names.values())
    more = ", ..." if len(names) > _NAMES else ""
    device = f"{get_world_size()} process(es) on {parts.device.type}"
    if parts.device.type == "cuda":
        device += f", {torch.cuda.get_device_name(parts.device)}"
    nowhere = "nowhere; `output_dir` FOLDER keeps detections and metrics"
    if resume:
        nowhere = "nowhere: nothing will be kept; pass `output_dir` FOLDER"
    rows = {
        "data": f"{settings.data.coco_path}: {images}",
        "classes": f"{len(names)}: {', '.join(names[:_NAMES])}{more}",
        "model": f"{settings.trunk.model}, {settings.trunk.backbone}, {settings.trunk.num_queries} queries, "
        f"{n_parameters:,} trainable parameters",
        "weights": parts.source.path or settings.run.pretrained or f"random; backbone: {settings.run.backbone_weights}",
        "output": str(parts.folder.path) if parts.folder else nowhere,
        "device": device,
    }
    if resume and data.train:
        batch, accumulate = settings.optimisation.batch_size, settings.optimisation.accumulate
        rows["epochs"] = (
            f"{resume.epoch} to {settings.optimisation.epochs - 1}, each of {data.train.sampler.steps:,} steps of "
            f"{data.train.sampler.batch} images ({get_world_size()} x {batch}{f' x {accumulate}' * (accumulate > 1)})"
        )
        how = settings.optimisation
        rows["rates"] = f"`lr` {how.lr:g}, `lr_backbone` {how.lr_backbone:g}{', by `scale_lr`' * how.scale_lr}"
        if settings.run.overfit:
            rows["output"] = "nowhere, with `overfit`"
        if settings.run.preset != "none":
            rows["preset"] = f"{settings.run.preset}: {in_use(settings)}"
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows.items())


def in_use(settings: RunSettings) -> str:
    """The values of the preset that the run has; others are the user's, or come from a checkpoint."""
    names = {name for part in (*PARTS, "family") for name in getattr(settings, part).__dataclass_fields__}
    found = settings.flat()
    chosen = {n: list(v) if isinstance(v, tuple) else v for n, v in PRESETS[settings.run.preset].items() if n in names}
    words = []
    for name, value in chosen.items():
        if found[name] == value:
            several = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            words.append(f"`{name}`" if isinstance(value, bool) else f"`{name}` {several}")
    return " ".join(words)


def epoch_line(
    line: Mapping[str, Any],
    *,
    epoch: int,
    metrics: Sequence[float] | None,
    best: tuple[int, float] | None,
    where: Path | None,
    seconds_left: float,
) -> str:
    """The epoch's mean losses, from its `line` of the log, its AP, the best so far, and how long the rest takes.

    `metrics` are the 12 of COCO, if the epoch was evaluated; `best` the epoch and AP of the best evaluation so far;
    `where` the file of that checkpoint, if it is saved.
    """
    prefix = "train_loss_"
    terms = {name.removeprefix(prefix): v for name, v in line.items() if name.startswith(prefix)}
    of_last_layer = [f"{n} {v:.4g}" for n, v in terms.items() if "_" not in n]
    parts = [f"loss {line['train_loss']:.4g} ({', '.join(of_last_layer)})"]
    if line["train_bad_steps"]:
        parts.append(f"{line['train_bad_steps']} steps skipped")
    if metrics and metrics[0] < 0:
        parts.append("AP undefined: no object to find")
    elif metrics:
        parts += [f"AP {metrics[0]:.4f}", f"AP50 {metrics[1]:.4f}"]
    if best:
        parts.append(f"best {best[1]:.4f} of epoch {best[0]}{f' in {where}' if where else ''}")
    if seconds_left:
        parts.append(f"about {timedelta(seconds=round(seconds_left))} left")
    return f"epoch {epoch}: {', '.join(parts)}"
