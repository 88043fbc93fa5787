"""A feed-forward branch with its residual and normalisation by a compiled CPU kernel, without gradients
(csrc/feed_forward_cpu.cpp)."""

import ctypes

import torch
from torch import Tensor, nn

from samdetr.models.ops import kernels

LEAST_ROWS = 256  # for fewer, to lay out the weights anew takes longer than is won


def runs_compiled(x: Tensor, linear1: nn.Linear, linear2: nn.Linear, norm: nn.LayerNorm) -> bool:
    """Whether there is a kernel for this, and no gradient is asked for."""
    tensors = (x, *(parameter for part in (linear1, linear2, norm) for parameter in part.parameters()))
    channels, units = x.shape[-1], linear1.out_features
    shapes = [(units, channels), (units,), (channels, units), (channels,), (channels,), (channels,)]
    if [tensor.shape for tensor in tensors[1:]] != shapes:
        return False  # for PyTorch to refuse, or without a bias
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    return x.numel() >= LEAST_ROWS * x.shape[-1] > 0 and kernels.takes(*tensors)


def compiled_feed_forward(x: Tensor, linear1: nn.Linear, linear2: nn.Linear, norm: nn.LayerNorm) -> Tensor:
    """norm(x + linear2(relu(linear1(x)))), all of these with biases: (..., C) -> (..., C)."""
    x = x.contiguous()
    output = torch.empty_like(x)
    sizes = [x.numel() // x.shape[-1], x.shape[-1], linear1.out_features]
    parts = (linear1.weight, linear1.bias, linear2.weight, linear2.bias, norm.weight, norm.bias)
    tensors = (x, *(part.contiguous() for part in parts), output)
    settings = (kernels.integers(sizes), torch.get_num_threads(), ctypes.c_double(norm.eps))
    kernels.call("feed_forward", x.dtype, *settings, *map(kernels.pointer, tensors))
    return output
