"""3x3 convolutions of stride 1 on the CPU by Winograd's F(4x4, 3x3): bias and ReLU in the same pass, with gradients.

The kernel and its source are in csrc/winograd_cpu.cpp. applies() says where it is worth calling.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from samdetr.models.ops import kernels

LAST = torch.channels_last
SMALLEST = 64  # cells of a map, at least: smaller ones are few tiles, and mostly border


def applies(x: Tensor, convolution: nn.Conv2d) -> bool:
    c = convolution
    return (
        c.kernel_size == (3, 3)
        and c.stride == (1, 1)
        and c.padding == c.dilation
        and c.dilation[0] == c.dilation[1]
        and c.groups == 1
        and c.padding_mode == "zeros"
        and all(channels >= 32 and channels % 16 == 0 for channels in (c.in_channels, c.out_channels))
        and x.ndim == 4
        and x.shape[1] == c.in_channels
        and len(x) > 0
        and x.shape[2] * x.shape[3] >= SMALLEST * c.dilation[0] ** 2
        and kernels.takes(x, c.weight)
    )


def winograd(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, *, dilation: int, relu: bool) -> Tensor:
    """relu(conv2d(x, weight * scale, padding = dilation) + shift), or that without relu.

    Args:
        x: (B, C, H, W), of any memory format; channels_last is not copied.
        weight: (O, C, 3, 3); C and O are multiples of 16.
        scale, shift: (O,), constants: gradients are of x and weight.
    Returns:
        (B, O, H, W), channels_last.
    """
    if weight.stride(2) != 3 * weight.stride(3):
        weight = weight.contiguous()
    return Winograd.apply(x, weight, scale, shift, dilation, relu)


class Winograd(torch.autograd.Function):
    """Keeps the map and, with relu, the output for backward; tiles are transformed anew."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, dilation: int, relu: bool) -> Tensor:
        x = x.contiguous(memory_format=LAST)
        output = _convolve(x, weight, scale, shift, dilation, relu=relu)
        ctx.dilation = dilation
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
            of_x = _convolve(gradient, weight, scale, None, ctx.dilation, turned=True)
        if ctx.needs_input_grad[1]:
            of_weight = torch.empty_like(weight)
            shape = _shape(x, of_weight, ctx.dilation)
            _call("weights", x.dtype, shape, x, gradient, scale, of_weight)
        return of_x, of_weight, None, None, None, None


def _convolve(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    dilation: int,
    *,
    relu: bool = False,
    turned: bool = False,
) -> Tensor:
    """`turned`: with the weights turned by half a turn and their O and C exchanged."""
    channels = weight.shape[1] if turned else weight.shape[0]
    batch, _, height, width = x.shape
    output = torch.empty(batch, channels, height, width, dtype=x.dtype, memory_format=LAST)
    shape = _shape(x, weight, dilation, relu=relu, turned=turned)
    _call("forward", x.dtype, shape, x, weight, scale, shift, output)
    return output


def _shape(x: Tensor, weight: Tensor, dilation: int, *, relu: bool = False, turned: bool = False) -> ctypes.Array:
    """As the C functions take it."""
    batch, _, height, width = x.shape
    output, channel, _, tap = weight.stride()
    assert weight.stride(2) == 3 * tap, "the taps of a weight lie evenly"
    if turned:
        sizes, strides, of_scale = weight.shape[:2], (8 * tap, channel, output, -tap), (0, 1)
    else:
        sizes, strides, of_scale = weight.shape[1::-1], (0, output, channel, tap), (1, 0)
    return kernels.integers([batch, height, width, *sizes, dilation, int(relu), *strides, *of_scale])


def _call(name: str, dtype: torch.dtype, shape: ctypes.Array, *tensors: Tensor | None) -> None:
    pointers = map(kernels.pointer, tensors)
    kernels.call(f"winograd_{name}", dtype, shape, torch.get_num_threads(), *pointers)
