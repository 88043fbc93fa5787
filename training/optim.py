"""Learning rates: groups of parameters, and schedules. The saved state of an optimiser."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from samdetr.util.checkpoint import TRAINING_ONLY
from samdetr.util.schema import brief, each, listed, number, record, tensor, text

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
    members: dict[str, list[str]] = {group: [] for group in learning_rates}
    for name in trainable:
        members["backbone" if name in backbone else "linear_proj" if name in projection else "main"].append(name)
    return [
        {
            "name": group,
            "params": [trainable[name] for name in names],
            "param_names": names,  # which a saved state keeps, so that it goes to these parameters or nowhere
            "lr": learning_rates[group],
        }
        for group, names in members.items()
        if names
    ]


def groups_of_run(model: nn.Module, settings: Mapping[str, Any]) -> list[dict] | None:
    """`parameter_groups` by the settings that a checkpoint holds; None if it holds none that fit this network."""
    names = ("lr", "lr_backbone", "lr_linear_proj_names", "lr_linear_proj_mult")
    try:
        return parameter_groups(model, **{name: settings[name] for name in names})
    except (KeyError, ValueError):
        return None


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


MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, one of each for a parameter
_GROUP_RULE = record(
    {"params": listed(number(least=0))},
    optional={name: number(least=0, whole=False) for name in ("lr", "weight_decay")},
)
OPTIMIZER_RULE = record(
    {
        "param_groups": listed(_GROUP_RULE),
        "state": each(record(dict.fromkeys(MOMENTS, tensor())), key=number(least=0)),
    },
    optional={"without_moments": listed(text)},
)


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """The optimiser's state dict, and the names of parameters that have no moments since they never had a gradient."""
    without = [
        name
        for group in optimizer.param_groups
        for name, parameter in zip(group.get("param_names", ()), group["params"])
        if parameter not in optimizer.state
    ]
    return {**optimizer.state_dict(), "without_moments": without}


def load_optimizer_state(
    optimizer: Optimizer, saved: Any, *, source: str, groups: Sequence[dict[str, Any]] | None = None
) -> None:
    """Give an AdamW the moments, step counts and weight decay of `optimizer_state`; nothing else is taken from it.

    Moments are compared with the parameters first: a fused optimiser writes through pointers, without looking.

    Args:
        source: the file, for messages.
        groups: `parameter_groups` of the run that made the file; of use where it does not hold the names itself.

    Raises:
        ValueError: another order of parameters, or moments that do not fit; nothing is loaded then.
    """
    try:
        OPTIMIZER_RULE(saved, "'optimizer'")
    except ValueError as error:
        raise ValueError(f"{source} cannot be resumed: {error}; resume from another checkpoint") from None
    saved = _with_or_without_denoising(optimizer, saved, groups)
    _check_groups(optimizer, saved, source=source, groups=groups)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = [name for group in optimizer.param_groups for name in group.get("param_names", group["params"])]
    without = saved.get("without_moments")
    state: dict[int, dict[str, Tensor]] = {}
    for index, (name, parameter) in enumerate(zip(names, parameters)):
        if index in saved["state"]:
            state[index] = _moments(saved["state"][index], parameter, name=name, source=source)
        elif without is not None and name not in without:
            raise ValueError(f"{source} has no moments of {name}; resume from another checkpoint")
    if unknown := saved["state"].keys() - state.keys():
        raise ValueError(f"{source} has moments of parameters {sorted(unknown)[:5]}, which no group has")
    own = optimizer.state_dict()["param_groups"]
    decays = [group.get("weight_decay", here["weight_decay"]) for group, here in zip(saved["param_groups"], own)]
    own = [{**here, "weight_decay": decay} for here, decay in zip(own, decays)]
    optimizer.load_state_dict({"state": state, "param_groups": own})


def _with_or_without_denoising(
    optimizer: Optimizer, saved: dict[str, Any], groups: Sequence[dict[str, Any]] | None
) -> dict[str, Any]:
    """The saved state for this optimiser, if they differ in the parameters of denoising alone: a run may go on with
    them or without. Else as it is."""
    ours = [group.get("param_names", []) for group in optimizer.param_groups]
    known = [group["param_names"] for group in groups or ()]  # by this network: files without names have no denoising
    theirs = [
        group.get("param_names") or _plain(known[index] if index < len(known) else [])
        for index, group in enumerate(saved["param_groups"])
    ]
    if theirs == ours or list(map(_plain, theirs)) != list(map(_plain, ours)):
        return saved
    there = {name: index for index, name in enumerate(chain(*theirs))}
    numbers = list(chain.from_iterable(group["params"] for group in saved["param_groups"]))
    if numbers != list(range(len(there))) or not saved["state"].keys() <= set(numbers):
        return saved  # what is wrong is found below
    here = {name: index for index, name in enumerate(chain(*ours))}
    state = {here[n]: saved["state"][i] for n, i in there.items() if n in here and i in saved["state"]}
    starts = accumulate(map(len, ours), initial=0)
    if saved.get("without_moments") is not None:
        new = [name for name in here if name not in there]
        saved = {**saved, "without_moments": [*saved["without_moments"], *new]}
    return {
        **saved,
        "state": state,
        "param_groups": [
            {**group, "param_names": names, "params": list(range(start, start + len(names)))}
            for group, names, start in zip(saved["param_groups"], ours, starts)
        ],
    }


def _plain(names: Any) -> list[Any]:
    """Names without those of denoising."""
    names = names if isinstance(names, list) else []
    return [name for name in names if not str(name).startswith(TRAINING_ONLY)]


def _check_groups(
    optimizer: Optimizer, saved: dict[str, Any], *, source: str, groups: Sequence[dict[str, Any]] | None
) -> None:
    """Require the parameters of the saved groups to be those of the optimiser, in the same order."""
    here, theirs = optimizer.param_groups, saved["param_groups"]
    wrong = "" if len(here) == len(theirs) else f"{len(theirs)} groups, here {len(here)}"
    first = 0
    for index, (ours, group) in enumerate(zip(here, theirs)):
        count = len(ours["params"])
        names = group.get("param_names") or (groups[index]["param_names"] if groups and index < len(groups) else None)
        if len(group["params"]) != count:
            wrong = wrong or f"{len(group['params'])} parameters in group {index}, here {count}"
        elif list(group["params"]) != list(range(first, first + count)):
            raise ValueError(f"{source}: the parameters of group {index} are not in order; use another checkpoint")
        elif "param_names" in ours and names is not None and names != ours["param_names"]:
            pairs = zip(names, ours["param_names"]) if isinstance(names, list) else ()
            wrong = wrong or next(
                (f"{brief(one)} where this run has {two}" for one, two in pairs if one != two), "names"
            )
        first += count
    if wrong:
        raise ValueError(
            f"{source} was trained with other groups of parameters ({wrong}); pass the `lr_backbone` (0 or not) and "
            "`lr_linear_proj_names` that it was trained with"
        )


def _moments(saved: dict[str, Any], parameter: nn.Parameter, *, name: str, source: str) -> dict[str, Tensor]:
    """The state of one parameter, in its layout in memory."""
    if unknown := saved.keys() - {"step", *MOMENTS}:
        raise ValueError(
            f"{source}: the state of {name} holds {brief(sorted(map(str, unknown))[0])}, which is not AdamW's"
        )
    step = saved.get("step")
    step = step.item() if isinstance(step, Tensor) and step.numel() == 1 and not step.is_complex() else step
    if isinstance(step, bool) or not isinstance(step, (int, float)) or not 0 <= step < 2**53 or step % 1:
        raise ValueError(f"{source}: the step count of {name} is {brief(step)}, not a number of steps")
    moments = {}
    for kind in MOMENTS:
        moment = saved[kind]
        if moment.shape != parameter.shape or not moment.is_floating_point():
            raise ValueError(
                f"{source}: {kind} of {name} is {brief(moment)}, the parameter has the shape {tuple(parameter.shape)}; "
                "resume from another checkpoint"
            )
        if not moment.isfinite().all() or (kind == "exp_avg_sq" and (moment < 0).any()):
            raise ValueError(f"{source}: {kind} of {name} is not finite or negative; resume from an earlier checkpoint")
        moments[kind] = torch.empty_like(parameter).copy_(moment)
    return {"step": torch.tensor(float(step), dtype=torch.float32), **moments}
