"""Dropout that draws its random numbers faster on a CPU, and keeps less for backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def dropout(x: Tensor, probability: float, *, training: bool) -> Tensor:
    """F.dropout, drawn otherwise on a CPU.

    PyTorch draws there one number after another on a single thread, and keeps a float for every value. Here 64 random
    bits serve four values, of 16 bits each, so the probability is rounded to a multiple of 2 ** -16 (0.1 to 0.100006,
    by which the kept values are scaled, too), and a byte is kept. With attention among 2160 positions the draws alone
    took a sixth of a training step.
    """
    if not training or probability == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not can_draw(probability):
        return F.dropout(x, probability)
    return _Dropout.apply(x, probability)


def can_draw(probability: float) -> bool:
    """Whether 16 bits tell this probability from 0 and 1."""
    return 0 < _threshold(probability) < 2**16


def draw_kept(shape: Sequence[int], probability: float) -> Tensor:
    """1 for values to keep and 0 for others, int8, on the CPU."""
    number = torch.Size(shape).numel()
    bits = torch.empty(-(-number // 4), dtype=torch.int64).random_(-(2**63), None)
    least = _threshold(probability) - 2**15
    # Not a comparison: what makes or takes bool is not vectorised, and takes five times as long.
    return bits.view(torch.int16)[:number].clamp_(least - 1, least).sub_(least - 1).to(torch.int8).view(shape)


def kept_scale(probability: float) -> float:
    """What `draw_kept` leaves is multiplied by this."""
    return 2**16 / (2**16 - _threshold(probability))


def _threshold(probability: float) -> int:
    return round(probability * 2**16)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float) -> Tensor:
        kept, ctx.scale = draw_kept(x.shape, probability), kept_scale(probability)
        ctx.save_for_backward(kept)
        return kept.to(x.dtype).mul_(ctx.scale).mul_(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return kept.to(gradient.dtype).mul_(ctx.scale).mul_(gradient), None


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
    return _ReluDropout.apply(x, probability)


class _ReluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float) -> Tensor:
        ctx.mark_dirty(x)
        x.relu_()
        if x.device.type == "cpu" and can_draw(probability):
            ctx.scale = kept_scale(probability)
            x.mul_(draw_kept(x.shape, probability).to(x.dtype)).mul_(ctx.scale)
        else:
            ctx.scale = 1 / (1 - probability) if probability < 1 else 0.0
            F.dropout(x, probability, inplace=True)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (result,) = ctx.saved_tensors
        return result.sign().mul_(ctx.scale).mul_(gradient), None
