"""Dropout by compiled CPU kernels (csrc/dropout_cpu.cpp), alone and after a ReLU.

PyTorch draws on a CPU one number after another on a single thread, and keeps a float for every value. Here a random
number is a hash of a seed and its place: all threads draw, backward draws the same again, and nothing is kept.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from samdetr.models.ops import kernels


def draw_seed() -> Tensor:
    """(1,), from PyTorch's generator, so that a run whose state is restored drops the same."""
    return torch.empty(1, dtype=torch.int64).random_(-(2**63), None)


class Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float) -> Tensor:
        seed = draw_seed()
        ctx.probability = probability
        ctx.save_for_backward(seed)
        return _dropped(x, probability, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _dropped(gradient, ctx.probability, *ctx.saved_tensors), None


class ReluDropout_(torch.autograd.Function):
    """In the place of x, of which nothing else may need what was there. Keeps the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float) -> Tensor:
        assert x.is_contiguous(), f"strides {x.stride()} of {tuple(x.shape)}"
        ctx.mark_dirty(x)
        _call("relu_dropout", x, probability, draw_seed(), x)
        ctx.probability = probability
        ctx.save_for_backward(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (result,) = ctx.saved_tensors
        of_x = torch.empty_like(result)
        _call("relu_dropout_backward", result, ctx.probability, result, gradient.contiguous(), of_x)
        return of_x, None


def _dropped(x: Tensor, probability: float, seed: Tensor) -> Tensor:
    x = x.contiguous()
    result = torch.empty_like(x)
    _call("dropout", x, probability, seed, x, result)
    return result


def _call(name: str, like: Tensor, probability: float, *tensors: Tensor) -> None:
    settings = (ctypes.c_int64(like.numel()), torch.get_num_threads(), ctypes.c_double(probability))
    kernels.call(name, like.dtype, *settings, *map(kernels.pointer, tensors))
