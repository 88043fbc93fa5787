"""1x1 convolutions on the CPU with what follows them in a residual block, in one pass over the map, with gradients.

The kernel is csrc/pointwise_cpu.cpp. applies() says where it is worth calling.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from samdetr.models.ops import kernels

LAST = torch.channels_last


def applies(x: Tensor, convolution: nn.Conv2d) -> bool:
    c = convolution
    return (
        c.kernel_size == (1, 1)
        and c.stride[0] == c.stride[1]
        and c.padding == (0, 0)
        and c.groups == 1
        and c.in_channels % 16 == c.out_channels % 16 == 0
        and x.ndim == 4
        and x.shape[1] == c.in_channels
        and x.numel() > 0
        and kernels.takes(x, c.weight)
    )


def pointwise(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    stride: int = 1,
    relu: bool,
    residual: Tensor | None = None,
) -> Tensor:
    """relu(conv2d(x, weight * scale, stride = stride) + shift + residual), or that without relu or residual.

    Args:
        x: (B, C, H, W), of any memory format; channels_last is not copied.
        weight: (O, C, 1, 1); C and O are multiples of 16.
        scale, shift: (O,), constants: gradients are of x, weight and residual.
        residual: (B, O, H, W). Where no gradient is asked for, nor was for it, it is overwritten with the result, if
            it is channels_last.
    Returns:
        (B, O, H, W), channels_last.
    """
    if stride > 1:
        x = x[:, :, ::stride, ::stride]
    leaves = (x, weight) if residual is None else (x, weight, residual)
    if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves):
        return Pointwise.apply(x, weight, scale, shift, relu, residual)
    into = None
    if residual is not None:
        residual = residual.contiguous(memory_format=LAST)
        into = None if residual.requires_grad else residual  # a part of another graph, under no_grad
    if into is not None and not into.is_inference():
        torch.autograd.graph.increment_version(into)  # so that who kept it for backward learns of it
    return _product(x.contiguous(memory_format=LAST), weight, scale, shift, relu, residual, into)


class Pointwise(torch.autograd.Function):
    """Keeps the map and, with relu, the output for backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, relu: bool, residual: Tensor | None
    ) -> Tensor:
        x = x.contiguous(memory_format=LAST)
        if residual is not None:
            residual = residual.contiguous(memory_format=LAST)
        output = _product(x, weight, scale, shift, relu, residual)
        ctx.save_for_backward(x, weight, scale, output if relu else None)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, output = ctx.saved_tensors
        if output is not None:
            gradient = torch.ops.aten.threshold_backward(gradient, output, 0)
        gradient = gradient.contiguous(memory_format=LAST)
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            channels = x.shape[1]
            turned = (weight * scale[:, None, None, None]).transpose(0, 1)
            of_x = _product(gradient, turned, scale.new_ones(channels), scale.new_zeros(channels), False, None)
        if ctx.needs_input_grad[1]:
            in_rows, of_rows = (m.permute(0, 2, 3, 1).flatten(0, 2) for m in (x, gradient))  # (B H W, C), (B H W, O)
            of_weight = torch.empty_like(weight)
            torch.mul(of_rows.mT @ in_rows, scale[:, None], out=of_weight[:, :, 0, 0])
        return of_x, of_weight, None, None, None, gradient if ctx.needs_input_grad[5] else None


def _product(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    relu: bool,
    residual: Tensor | None,
    into: Tensor | None = None,
) -> Tensor:
    batch, channels, height, width = x.shape
    outputs = len(weight)
    if into is None:
        into = torch.empty(batch, outputs, height, width, dtype=x.dtype, memory_format=LAST)
    shape = [batch * height * width, channels, outputs, int(relu), *weight.stride()[:2]]
    pointers = map(kernels.pointer, (weight, x, scale, shift, residual, into))
    kernels.call("pointwise", x.dtype, kernels.integers(shape), torch.get_num_threads(), *pointers)
    return into
