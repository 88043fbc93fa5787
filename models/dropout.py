"""Dropout that draws its random numbers faster on a CPU, and keeps nothing for backward there."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.ops import dropout as compiled
from models.ops import kernels


def dropout(x: Tensor, probability: float, *, training: bool) -> Tensor:
    """F.dropout."""
    if training and probability > 0 and kernels.takes(x):
        return compiled.Dropout.apply(x, probability)
    return F.dropout(x, probability, training)


class Dropout(nn.Dropout):
    """nn.Dropout with `dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, training=self.training)


def relu_dropout_(x: Tensor, probability: float, *, training: bool) -> Tensor:
    """dropout(relu(x)), in the place of x, which nothing else may need."""
    if training and probability > 0 and x.is_contiguous() and kernels.takes(x):
        return compiled.ReluDropout_.apply(x, probability)
    return F.dropout(x.relu_(), probability, training)
