"""An exponential moving average of the weights, on their device: `--ema`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage:
    """average += (1 - d) (weights - average) after each step, d = min(decay, (1 + n) / (10 + n)) after n such steps.

    The smaller d of the start lets the average follow while the weights still change a lot: with 0.9998 from the first
    step, a tenth of the random start would remain after 11,500 steps. From step 45,000 on, d is the given decay.

    Only weights that training changes are averaged. Everything else, buffers too, is that of the network.

    Args:
        network: whose weights to follow. A weight that several modules share is averaged once.
        decay: in [0, 1).
    """

    def __init__(self, network: nn.Module, *, decay: float):
        self.network, self.decay = network, decay
        self._weights = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
        self._average = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self.updates = torch.zeros((), dtype=torch.int64, device=next(network.parameters()).device)

    @torch.no_grad()
    def update(self, skip: Tensor | None = None) -> None:
        """Follow the weights after a step. If `skip`, a scalar on the device, is 1 instead of 0, nothing changes."""
        taken = torch.ones_like(self.updates) if skip is None else 1 - skip.to(self.updates.dtype)
        share = (9 / (10 + self.updates)).clamp(min=1 - self.decay) * taken
        self.updates += taken
        average = list(self._average.values())
        change = list(torch._foreach_sub(list(self._weights.values()), average))  # type: ignore[arg-type]  # wrong stub
        torch._foreach_mul_(change, share)
        torch._foreach_add_(average, change)

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """Let the network compute with the averages while the body runs."""
        weights: list[Tensor] = list(self._weights.values())
        own = [weight.detach().clone() for weight in weights]
        torch._foreach_copy_(weights, list(self._average.values()))
        try:
            yield
        finally:
            torch._foreach_copy_(weights, own)

    def weights(self) -> dict[str, Tensor]:
        """The network's state_dict with averages in place of the weights that are averaged."""
        same = {id(weight): self._average[name] for name, weight in self._weights.items()}
        state = self.network.state_dict(keep_vars=True)
        return {name: same.get(id(value), value).detach() for name, value in state.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.weights(), "updates": int(self.updates), "decay": self.decay}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state_dict()`; the decay stays that of this run."""
        for name, average in self._average.items():
            if name in state["model"]:  # that of denoising starts with it
                average.copy_(state["model"][name])
        self.updates.fill_(state["updates"])
