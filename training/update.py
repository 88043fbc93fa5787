"""One training step: backward, loss scale, clipping, whether it is taken, the optimiser, averages, the schedule.

with update.step(parts, epoch=epoch, iteration=iteration, num_boxes=num_boxes) as step:
    loss, metrics = ...
    step.backward(loss, metrics)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from samdetr.training.ema import WeightAverage
from samdetr.training.guard import StepGuard, StepRecord
from samdetr.training.profiler import StepProfiler
from samdetr.util.logger import log
from samdetr.util.sections import section


@dataclass
class Update:
    """Makes the steps of a training. Only `Step.backward` and `check` wait for the device, and only if the caller has
    not just waited for it."""

    network: nn.Module  # without DDP's wrapper
    optimizer: Optimizer
    scheduler: LRScheduler  # steps after every step, taken or skipped
    _: KW_ONLY
    clip_max_norm: float  # of all gradients together; 0: no clipping
    max_bad_steps: int = 10  # consecutive steps with a non-finite loss or gradient at which training stops
    keep_gradients: bool = False  # each step adds to the clipped gradients of the last one
    scaler: GradScaler | None = None
    average: WeightAverage | None = None
    profiler: StepProfiler | None = None

    def __post_init__(self) -> None:
        self.weights = [weight for weight in self.network.parameters() if weight.requires_grad]
        self.device = self.weights[0].device
        self.guard = StepGuard(
            self.network, device=self.device, limit=self.max_bad_steps, keep_gradients=self.keep_gradients
        )

    @contextmanager
    def step(
        self, parts: list[tuple[Any, list[dict[str, Tensor]]]], *, epoch: int, iteration: int, num_boxes: Tensor
    ) -> Iterator[Step]:
        """A step for the body to call `backward` on, once for each part of the batch; it is made when the body ends.

        `parts` (images and targets) and `num_boxes`, the losses' divisor, repeat the step if it is the last bad one.
        Raises BadSteps, a ValueError: too many steps in a row were bad; names terms, epoch, iteration and images.
        """
        random = self.guard.begin()
        if not self.keep_gradients:
            self.optimizer.zero_grad(set_to_none=True)
        step = Step(self)
        yield step
        step.lr = self.optimizer.param_groups[0]["lr"]
        terms, scale = step.metrics, None
        if self.scaler:  # what it makes of 1 is its scale, on the device
            scale = self.scaler.scale(torch.ones((), device=self.device))
        with section("optimiser"):
            bad = self._take(step.losses, scale)
        ids = [target["image_id"] for _, targets in parts for target in targets]
        self.guard.end(StepRecord(epoch, iteration, terms, ids, num_boxes, parts, random, scale))
        step.metrics = [*(_zero_if(bad, metrics) for metrics in terms), {"lr": step.lr, "good": 1 - bad}]
        if self.profiler and (table := self.profiler.step()):
            log(table)

    def check(self) -> None:
        """Report the last step if it was bad; waits for the device. All processes must call this together.

        Raises BadSteps if it was one too many.
        """
        self.guard.look()

    def _take(self, losses: list[Tensor], scale: Tensor | None) -> Tensor:
        """Let the optimiser take the step, unless the device finds it bad. Returns 1.0 there if it is, else 0.0."""
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        gradients = [weight.grad for weight in self.weights if weight.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        skip, bad = self.guard.judge(losses, norm, scale=scale)
        if self.clip_max_norm > 0:
            nn.utils.clip_grads_with_norm_(self.weights, self.clip_max_norm, norm)
        self.guard.step(self.optimizer, skip)
        if self.average:
            self.average.update(skip)
        if self.scaler:
            self.scaler.update()
        self.scheduler.step()
        return bad


class Step:
    """A step that is open."""

    def __init__(self, update: Update) -> None:
        self._update = update
        self.lr = 0.0  # of the first group, once the step is made
        self.losses: list[Tensor] = []
        # For each part what `backward` was given; once the step is made, 0 if it is bad, and last `lr` and `good`.
        self.metrics: list[dict[str, Any]] = []

    def backward(self, loss: Tensor, metrics: dict[str, Tensor]) -> None:
        """Backward of one part of the batch. The matching must just have waited for the device."""
        update = self._update
        if not self.losses:
            update.guard.look()  # the device has finished the step before, so reading its flags costs nothing
        with section("backward"):
            (update.scaler.scale(loss) if update.scaler else loss).backward()
        self.losses.append(loss.detach())
        self.metrics.append(metrics)


def _zero_if(bad: Tensor, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """The metrics in float64, 0 in a bad step: non-finite values would spoil the averages of an epoch."""
    values = torch.stack([value.to(torch.float64) for value in metrics.values()])
    return dict(zip(metrics, torch.where(bad.bool(), 0, values)))
