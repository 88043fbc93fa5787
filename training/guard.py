"""Steps with a non-finite loss or gradient are skipped and counted; too many in a row stop the training.

The device decides whether a step is taken. The host reads the result one step later, when it has waited for the device
anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from samdetr.training.state import random_state
from samdetr.util.distributed import all_gather_object, any_process, get_world_size
from samdetr.util.logger import log

MOST = 6  # loss terms that are named


@dataclass
class StepRecord:
    """What is needed to report a step, and to repeat it. All tensors are on the device."""

    epoch: int
    iteration: int
    metrics: list[dict[str, Tensor]]  # of each part of the batch, by their names in the log
    image_ids: list[Tensor]
    num_boxes: Tensor  # the losses' divisor
    parts: list[tuple[Any, Any]] | None  # images and targets of each part; None: not kept
    random: dict[str, Tensor]  # `random_state` before the step
    scale: Tensor | None  # of the gradient scaler, if any

    def faults(self) -> list[str]:
        """Non-finite terms of this process, as "loss_ce = nan"; the loss itself if no single term is at fault."""
        found = {
            name: value.item()
            for metrics in self.metrics
            for name, value in metrics.items()
            if not torch.isfinite(value) and name.startswith("loss") and not name.endswith("_unscaled")
        }
        listed = [f"{n} = {value}" for n, value in found.items() if n != "loss" or len(found) == 1]
        return listed if len(listed) <= MOST else [*listed[:MOST], f"{len(listed) - MOST} more"]


class BadSteps(ValueError):
    """`max_bad_steps` steps in a row were bad, `step` the last of them; the network is as it was before it. `rank` is
    that of the first process whose loss was non-finite; None if gradients alone were."""

    def __init__(self, message: str, *, step: StepRecord, rank: int | None):
        super().__init__(message)
        self.step, self.rank = step, rank


class StepGuard:
    """One per training.

    A step is skipped if the loss of any process or the norm of the gradients is non-finite. A skipped step is bad,
    unless a gradient scaler caused it: gradients that overflow under a scale of at least 1 are what the scaler looks
    for, and answers with a smaller scale.

    A skipped step leaves as they were: weights, the optimiser's moments and step count, statistics of learned norms,
    and the gradients that the next step adds to. The schedule of the learning rate counts iterations and advances.
    Arguments as of `Update`; `limit` is its `max_bad_steps`.
    """

    def __init__(self, network: nn.Module, *, device: torch.device, limit: int = 10, keep_gradients: bool = False):
        self.network, self.device, self.limit, self.keep_gradients = network, device, limit, keep_gradients
        # Statistics that forward changes before anything is known of the loss.
        norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
        self._statistics = [buffer for norm in norms for buffer in norm.buffers()]
        self._saved: list[tuple[Tensor, Tensor]] = []
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        # Steps that were skipped, bad, and bad in a row.
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)
        copy = torch.zeros(3, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._on_host, self._read = copy, copy.numpy()
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._bad_before, self._in_a_row = 0, 0  # as of the last look
        self._last: StepRecord | None = None

    def begin(self) -> dict[str, Tensor]:
        """Before a step's forward. Returns the state of the random numbers that it will draw."""
        self._saved = [(tensor, tensor.clone()) for tensor in self._statistics]
        if self.keep_gradients:
            weights = [weight for weight in self.network.parameters() if weight.requires_grad]
            self._gradients = [(w, torch.zeros_like(w) if w.grad is None else w.grad.clone()) for w in weights]
        return random_state(self.device)

    @torch.no_grad()
    def judge(self, losses: Sequence[Tensor], norm: Tensor, *, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Whether to skip the step, and whether it is bad: 1.0 or 0.0, on the device, the same in all processes.

        `losses` are those of this process, one for each part of the batch; `norm` that of the shared gradients.
        """
        bad_loss = ~torch.isfinite(torch.stack(list(losses))).all()
        bad_norm = ~torch.isfinite(norm)
        blamed = bad_norm if scale is None else bad_norm & (scale < 1)
        # Gradients spread the fault of one process to all, but a term without gradient can be at fault, too.
        skip, bad = any_process(torch.stack([bad_loss | bad_norm, bad_loss | blamed]).float())
        skipped, total, row = self._counts
        self._counts = torch.stack([skipped + skip.long(), total + bad.long(), (row + bad.long()) * skip.long()])
        self._on_host.copy_(self._counts, non_blocking=True)
        if self._copied:
            self._copied.record()
        return skip, bad

    @torch.no_grad()
    def step(self, optimizer: Optimizer, skip: Tensor) -> None:
        """Let the optimiser take the step, or restore what forward and backward changed.

        Fused optimisers skip on the device, through the attribute that torch.amp.GradScaler sets. For others the host
        waits.
        """
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = skip  # type: ignore[attr-defined]
            try:
                optimizer.step()
            finally:
                del optimizer.found_inf  # type: ignore[attr-defined]
        elif not skip:
            optimizer.step()
        gradients = [(weight.grad, before) for weight, before in self._gradients if weight.grad is not None]
        for tensor, before in (*self._saved, *gradients):
            torch.where(skip.bool(), before, tensor, out=tensor)

    def end(self, step: StepRecord) -> None:
        """After a step. Its batch is kept only if it may be the last one allowed to be bad."""
        self._last = step
        if self._in_a_row + 1 < self.limit:
            step.parts = None

    def look(self) -> None:
        """Report the last step if it was bad. All processes must look at the same time: after the matching of a later
        step and before its backward, or between steps.

        Raises:
            BadSteps: this was one too many.
        """
        if self._copied:
            self._copied.synchronize()
        _, bad, self._in_a_row = map(int, self._read)
        if bad == self._bad_before or self._last is None:
            return
        self._bad_before, step, self._last = bad, self._last, None
        rank, text = _describe(step)
        if self._in_a_row < self.limit:
            log(f"step skipped, {self._in_a_row} in a row, {bad} in all: {text}")
            return
        with torch.no_grad():
            for tensor, before in self._saved:
                tensor.copy_(before)
        row = f"{self.limit} steps in a row were not finite, the last one"
        raise BadSteps(f"{row if self.limit > 1 else 'a step is not finite'} in {text}", step=step, rank=rank)

    def state_dict(self) -> dict[str, int]:
        """Call `look` first: it reports a bad step while its batch is still known."""
        return dict(zip(("skipped", "bad", "in_a_row"), self._counts.tolist()))

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._counts = torch.tensor([state[name] for name in ("skipped", "bad", "in_a_row")], device=self.device)
        self._on_host.copy_(self._counts)
        _, self._bad_before, self._in_a_row = map(int, self._read)


def _describe(step: StepRecord) -> tuple[int | None, str]:
    """The first process whose loss is at fault, and the place, terms and images. All processes must call this."""
    images = torch.stack(step.image_ids).tolist() if step.image_ids else []
    ranks = all_gather_object((step.faults(), images))
    where = f"epoch {step.epoch}, iteration {step.iteration}"
    for rank, (faults, images) in enumerate(ranks):
        if faults:
            process = f" of rank {rank}" if get_world_size() > 1 else ""
            return rank, f"{where}: {', '.join(faults)}; image ids {images}{process}"
    return None, f"{where}: the gradients, but no loss; image ids {[i for _, images in ranks for i in images]}"
