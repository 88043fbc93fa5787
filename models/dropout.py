"""Dropout that keeps little for backward, and draws its random numbers faster on a CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from samdetr.models.ops import dropout as compiled
from samdetr.models.ops import kernels


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
    """dropout(relu(x)), in the place of x, which nothing else may need.

    Backward needs the result alone: what was negative and what was dropped are both 0 in it.
    """
    if not training or probability == 0 or torch.compiler.is_compiling():
        return dropout(x.relu_(), probability, training=training)
    if x.is_contiguous() and kernels.takes(x):
        return compiled.ReluDropout_.apply(x, probability)
    return _ReluDropout_.apply(x, probability)


class _ReluDropout_(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float) -> Tensor:
        ctx.mark_dirty(x)
        F.dropout(x.relu_(), probability, inplace=True)
        ctx.scale = 1 / (1 - probability) if probability < 1 else 0.0
        ctx.save_for_backward(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (result,) = ctx.saved_tensors
        return result.sign().mul_(ctx.scale).mul_(gradient), None
