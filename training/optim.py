"""Learning rates: groups of parameters, and schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

SCHEDULES = ("step", "cosine", "onecycle")
OPTIONAL_LINEAR_PROJ_NAMES = ("reference_points", "sampling_offsets")  # of deformable models; others have none


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    lr_backbone: float,
    lr_linear_proj_names: Sequence[str],
    lr_linear_proj_mult: float,
    optional_names: Sequence[str] = OPTIONAL_LINEAR_PROJ_NAMES,
) -> list[dict]:
    """Optimizer groups "main", "backbone" and "linear_proj" of the parameters that need gradients; none is empty.

    Names that start with "backbone." learn at `lr_backbone`, other names that contain one of `lr_linear_proj_names` at
    `lr * lr_linear_proj_mult`, the rest at `lr`.

    Raises:
        ValueError: a pattern that matches no parameter and is not in `optional_names`: it may be misspelt.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    backbone = {name for name in trainable if name.startswith("backbone.")}
    projection = set()
    for pattern in lr_linear_proj_names:
        matched = {name for name in trainable if pattern in name} - backbone
        if not matched and pattern not in optional_names:
            raise ValueError(f"`lr_linear_proj_names` {pattern}: no trainable parameter outside the backbone has it")
        projection |= matched

    # The order of the official code, on which the numbering in a saved optimizer state depends.
    learning_rates = {"main": lr, "backbone": lr_backbone, "linear_proj": lr * lr_linear_proj_mult}
    members: dict[str, list[nn.Parameter]] = {group: [] for group in learning_rates}
    for name, parameter in trainable.items():
        group = "backbone" if name in backbone else "linear_proj" if name in projection else "main"
        members[group].append(parameter)
    return [
        {"name": group, "params": parameters, "lr": learning_rates[group]}
        for group, parameters in members.items()
        if parameters
    ]


def learning_rate_factor(step: int, *, schedule: str, total_steps: int, drop_step: int, warmup_steps: int) -> float:
    """The factor of every group's learning rate at iteration `step`, counted from 0. All arguments are in iterations.

    step: a tenth after every `drop_step` iterations, counted from the first iteration on; with a warm-up, after the
        first `drop_step` alone, as SAP-DETR's published schedule, the one that has a warm-up.
    cosine: half a cosine from 1 at the end of the warm-up to 0 at `total_steps`.
    onecycle: cosine, with a warm-up over a tenth of `total_steps` unless `warmup_steps` is given (not 0).

    The warm-up rises linearly from 0.001 and reaches 1 at `warmup_steps`.
    """
    if schedule == "onecycle":
        warmup_steps = warmup_steps or round(total_steps / 10)
    rise = 0.001 + 0.999 * step / warmup_steps if step < warmup_steps else 1.0
    if schedule == "step":
        drops = step // drop_step
        return rise * 0.1 ** (min(drops, 1) if warmup_steps else drops)
    if schedule in ("cosine", "onecycle"):
        done = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
        return rise * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0))) / 2
    raise ValueError(f"schedule {schedule!r} is none of {', '.join(SCHEDULES)}")


def build_scheduler(
    optimizer: Optimizer, *, schedule: str, total_steps: int, drop_step: int, warmup_steps: int = 0, first_step: int = 0
) -> LambdaLR:
    """A scheduler that counts iterations, not epochs, and starts as if `first_step` steps had been made."""

    def factor(step: int) -> float:
        return learning_rate_factor(
            step, schedule=schedule, total_steps=total_steps, drop_step=drop_step, warmup_steps=warmup_steps
        )

    scheduler = LambdaLR(optimizer, factor)
    if first_step:
        for group, base in zip(optimizer.param_groups, scheduler.base_lrs):
            group["lr"] = base * factor(first_step)
        rates = [group["lr"] for group in optimizer.param_groups]
        place = {"last_epoch": first_step, "_step_count": first_step + 1, "_last_lr": rates}
        scheduler.load_state_dict({**scheduler.state_dict(), **place})
    return scheduler
