"""A training step in a file, and its repetition: `--max_bad_steps` writes the file, `--replay` reads it.

The network runs without DDP's wrapper and uncompiled, so that every module can be watched.
"""

from __future__ import annotations

import copy
import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from samdetr.engine import compute_losses, predict
from samdetr.models.checkpoints import check_network
from samdetr.models.criterion import SetCriterion
from samdetr.training.checkpoints import REPLAY, CheckpointFolder
from samdetr.training.guard import BadSteps, StepRecord
from samdetr.training.optim import OPTIMIZER_RULE, load_optimizer_state, optimizer_state
from samdetr.training.run import AMP, build_network, build_optimizer
from samdetr.training.settings import RunSettings
from samdetr.training.state import RANDOM_RULE, TrainingState, set_random_state
from samdetr.util.checkpoint import load_weights, read_file, save_file
from samdetr.util.device import place, set_arithmetic
from samdetr.util.distributed import all_gather_object, barrier, get_rank
from samdetr.util.logger import log
from samdetr.util.padded_images import PaddedImages
from samdetr.util.schema import anything, each, listed, number, record, tensor

VERSION = 1
_TARGET_RULE = record(dict.fromkeys(("labels", "image_id"), tensor(dtype=torch.int64)) | {"boxes": tensor()})
RULES = record(
    {
        "epoch": number(least=0),
        "iteration": number(least=0),
        "parts": listed(
            record({"images": tensor(), "padding": tensor(dtype=torch.bool), "targets": listed(_TARGET_RULE, least=1)}),
            least=1,
        ),
        "num_boxes": tensor(),
        "random": RANDOM_RULE,
        "model": each(tensor()),
        "optimizer": OPTIMIZER_RULE,
        "gradients": each(tensor()),
        "settings": each(anything),
        "scale": anything,
    }
)


def keep(
    error: BadSteps,
    *,
    state: TrainingState,
    criterion: SetCriterion,
    device: torch.device,
    amp: torch.dtype | None,
    folder: CheckpointFolder | None,
) -> str:
    """Repeat the last bad step, write it into the folder, and return a report in one line.

    Every process must call this. The file holds the part of the first process in which the fault shows.
    """
    traceback.clear_frames(error.__traceback__)  # they hold the activations of a later step
    content = pack(error.step, state)
    # A copy, because DDP would exchange the gradients of the original.
    repeated = repeat(content, network=copy.deepcopy(state.model), criterion=criterion, device=device, amp=amp)
    ranks = all_gather_object((repeated.finite, repeated.first_fault()))
    faulty = [rank for rank, (finite, _) in enumerate(ranks) if not finite]
    rank = error.rank if error.rank is not None else faulty[0] if faulty else 0
    text = f"{error}; {ranks[rank][1]}" if rank in faulty else f"{error}; the same step alone is finite"
    text += ". Try a smaller `lr`, and look at these images and their boxes"
    if folder is None:
        return f"{text}; with `output_dir` the step would be saved, to be repeated"
    path = folder.path / REPLAY
    if get_rank() == rank:
        with folder.writing():
            save_file(content, path)
    barrier()
    return f"{text}; python main.py --replay {path} repeats the step"


def pack(step: StepRecord, state: TrainingState) -> dict[str, Any]:
    """The file's content, a plain dict on the CPU. The state must be that from before the step."""
    assert step.parts is not None
    network = state.model
    gradients = {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}
    content = {
        "replay": VERSION,
        "epoch": step.epoch,
        "iteration": step.iteration,
        "rank": get_rank(),
        "parts": [
            {"images": images.images, "padding": images.padding, "targets": targets} for images, targets in step.parts
        ],
        "num_boxes": step.num_boxes,
        "random": step.random,
        "model": network.state_dict(),
        "optimizer": optimizer_state(state.optimizer),
        "scale": 1.0 if step.scale is None else step.scale,
        "gradients": gradients if state.keep_gradients else {},
        "settings": state.facts["settings"],
    }
    return to_device(content, torch.device("cpu"))


def read(source: str) -> dict[str, Any]:
    """The content of a file that `keep` wrote. Raises ValueError."""
    content = read_file(source, name="replay")
    if content.get("replay") != VERSION:
        raise ValueError(f"`replay` {source} holds no step; pass the {REPLAY} that a run left when it stopped")
    try:
        RULES(content, "")
        for part in content["parts"]:
            images, padding, targets = part["images"], part["padding"], part["targets"]
            if images.ndim != 4 or images.shape[1] != 3 or padding.shape != (len(targets), *images.shape[2:]):
                raise ValueError(f"'images' {tuple(images.shape)}, 'padding' {tuple(padding.shape)} do not go together")
            for target in targets:
                number_of_boxes = len(target["labels"]) if target["labels"].ndim == 1 else -1
                if target["boxes"].shape != (number_of_boxes, 4) or target["image_id"].numel() != 1:
                    raise ValueError("'targets' has boxes without labels")
    except ValueError as error:
        raise ValueError(f"`replay` {source} holds no step that can be repeated: {error}") from None
    return content


@dataclass
class Repeated:
    """The result of a step.

    Args:
        same_numbers: whether the device drew the random numbers of the original.
        terms: `loss` and its weighted terms.
        norm: of the gradients, before clipping.
        nan, infinite: name of the first value with a NaN and with an infinity, in the order of computation, if any.
        gradient: name of the first parameter, in the order of backward, whose gradient is non-finite, if any.
    """

    same_numbers: bool
    terms: dict[str, float] = field(default_factory=dict)
    norm: float = 0.0
    nan: str | None = None
    infinite: str | None = None
    gradient: str | None = None

    def see(self, name: str, value: Any) -> None:
        """Examine the tensors in a value: nested dicts, lists and dataclasses."""
        for part in _tensors(value):
            if self.nan is None and part.isnan().any():
                self.nan = name
            if self.infinite is None and part.isinf().any():
                self.infinite = name

    def see_gradient(self, name: str, weight: Tensor) -> None:
        if self.gradient is None and weight.grad is not None and not torch.isfinite(weight.grad).all():
            self.gradient = name

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (*self.terms.values(), self.norm)))

    def _faults(self) -> dict[str, str | None]:
        # An infinity may be intended, such as that of positions that propose nothing; a NaN is not.
        return {"NaN": self.nan, "infinity": self.infinite, "gradient that is not finite": self.gradient}

    def first_fault(self) -> str:
        """Where it began."""
        return next((f"first {what}: {where}" for what, where in self._faults().items() if where), "the norm overflows")

    def lines(self) -> list[str]:
        """A report."""
        values = {**self.terms, "norm of the gradients": self.norm}
        width = max(map(len, values))
        lines = [f"{n:{width}}  {v:.7g}{'' if math.isfinite(v) else '   <- not finite'}" for n, v in values.items()]
        lines += [f"first {what}: {where or 'none'}" for what, where in self._faults().items()]
        if not self.same_numbers:
            lines.append("this device draws other random numbers (dropout) than that of the run")
        return lines


def repeat(
    content: dict[str, Any],
    *,
    network: nn.Module,
    criterion: SetCriterion,
    device: torch.device,
    amp: torch.dtype | None,
) -> Repeated:
    """Forward, losses and backward of a packed step. The network must already have its weights; it keeps the gradients,
    without the loss scale."""
    parts, num_boxes, scale, gradients = (
        to_device(content[name], device) for name in ("parts", "num_boxes", "scale", "gradients")
    )
    network.train()
    criterion.train()
    for name, weight in network.named_parameters():
        weight.grad = gradients.get(name)
    set_random_state(content["random"], device)
    repeated = Repeated(same_numbers=(device.type == "cuda") == ("cuda" in content["random"]))
    terms = repeated.terms
    with _watched(network, repeated):
        for number, part in enumerate(parts):
            name = f" of part {number}" if len(parts) > 1 else ""
            repeated.see(f"the images{name}", part["images"])
            repeated.see(f"the boxes{name}", [target["boxes"] for target in part["targets"]])
            noised = criterion.noised(part["targets"])
            outputs = predict(network, PaddedImages(part["images"], part["padding"]), amp, noised)
            repeated.see("the predictions", outputs)
            loss, values = compute_losses(criterion, outputs, part["targets"], num_boxes=num_boxes, parts=len(parts))
            values["loss"] = values.pop("loss")  # list the total last
            for term, value in values.items():
                if term.startswith("loss") and not term.endswith("_unscaled"):
                    repeated.see(term, value)
                    terms[term] = terms.get(term, 0.0) + value.item() / len(parts)
            (loss * scale).backward()
    gradients = [weight.grad for weight in network.parameters() if weight.grad is not None]
    for gradient in gradients:
        gradient /= scale
    repeated.norm = nn.utils.get_total_norm(gradients).item()
    return repeated


def run(source: str, *, device: torch.device) -> int:
    """Repeat the step of a file and report. Returns 0 if it is finite, otherwise 1. Raises ValueError."""
    content = read(source)
    try:
        settings = RunSettings.from_flat(content["settings"])
    except ValueError as error:
        raise ValueError(f"`replay` {source} has settings that no run has: {error}") from None
    check_network(settings.trunk, settings.family, content["model"], source=source)
    set_arithmetic(tf32=settings.speed.tf32, deterministic=settings.speed.deterministic)
    network, criterion, _ = build_network(settings)
    load_weights(network, content["model"], source=source)
    place(network, device, channels_last=settings.speed.channels_last)
    optimizer = build_optimizer(network, settings, device)
    load_optimizer_state(optimizer, content["optimizer"], source=source)
    for group, saved in zip(optimizer.param_groups, content["optimizer"]["param_groups"]):
        group["lr"] = saved.get("lr", group["lr"])  # of that step; in a training it follows from the position
    log(f"epoch {content['epoch']}, iteration {content['iteration']}, image ids {image_ids(content)}")
    repeated = repeat(content, network=network, criterion=criterion, device=device, amp=AMP[settings.speed.amp])
    for line in repeated.lines():
        log(line)
    if not repeated.finite:
        return 1
    if settings.optimisation.clip_max_norm > 0:
        nn.utils.clip_grad_norm_(network.parameters(), settings.optimisation.clip_max_norm)
    optimizer.step()
    bad = [name for name, weight in network.named_parameters() if not torch.isfinite(weight).all()]
    after = f"the optimiser makes {bad[0]} infinite" if bad else "after it all weights are finite, too"
    log(f"the step is finite; {after}")
    return 0


def image_ids(content: dict[str, Any]) -> list[int]:
    return [int(target["image_id"]) for part in content["parts"] for target in part["targets"]]


@contextmanager
def _watched(network: nn.Module, repeated: Repeated) -> Iterator[None]:
    """Show `repeated` the output of every module, inner ones first, and every gradient in the order of backward."""
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: repeated.see(f"output of {name}", output))
        for name, module in network.named_modules()
        if name
    ]
    hooks += [
        weight.register_post_accumulate_grad_hook(lambda weight, name=name: repeated.see_gradient(name, weight))
        for name, weight in network.named_parameters()
        if weight.requires_grad
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value.detach()
        return
    if is_dataclass(value):
        value = [getattr(value, each.name) for each in fields(value)]
    elif isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def to_device(value: Any, device: torch.device) -> Any:
    """Copies of all tensors in dicts and lists; plain values as they are."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_device(item, device) for item in value]
    return value
