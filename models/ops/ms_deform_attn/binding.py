"""The kernels of deformable attention (cpu.cpp, cuda.cu) as torch.ops.sam_detr.ms_deform_attn."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from samdetr.models.ops import kernels
from samdetr.models.ops.ms_deform_attn.launch import THREADS, VALUES, launches
from samdetr.models.ops.ms_deform_attn.plain import coordinate_dtype, plain_ms_deform_attn

# Written out, because PyTorch below 2.7 does not read them from `list[int]`.
FORWARD = "(Tensor value, SymInt[] sizes, Tensor locations, Tensor weights) -> Tensor"
BACKWARD = (
    "(Tensor gradient, Tensor value, SymInt[] sizes, Tensor locations, Tensor weights) -> (Tensor, Tensor, Tensor)"
)


@torch.library.custom_op("sam_detr::ms_deform_attn", mutates_args=(), device_types="cpu", schema=FORWARD)
def forward(value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Arguments as of plain_ms_deform_attn."""
    wide, locations, weights = _wide(value, locations, weights)  # once: less work than at every cell read
    output = wide.new_empty(_output_shape(value, locations))
    _call_cpu("forward", sizes, wide, locations, wide, locations, weights, output)
    return output.to(value.dtype)


@forward.register_kernel("cuda")
def _(value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    _, locations, weights = _wide(value, locations, weights)
    output = value.new_empty(_output_shape(value, locations))
    if value.numel() and output.numel():
        value = value.contiguous()
        _call_cuda("forward", sizes, value, value, locations, weights, output)
    return output


@forward.register_fake
def _(value, sizes, locations, weights):
    return value.new_empty(_output_shape(value, locations))


@torch.library.custom_op("sam_detr::ms_deform_attn_backward", mutates_args=(), device_types="cpu", schema=BACKWARD)
def backward(
    gradient: Tensor, value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    wide = _wide(value, locations, weights)
    gradients = (torch.zeros_like(wide[0]), torch.empty_like(wide[1]), torch.empty_like(wide[2]))
    gradient = gradient.to(wide[0].dtype).contiguous()
    _call_cpu("backward", sizes, *wide[:2], gradient, *wide, *gradients)
    of_value, of_locations, of_weights = _narrowed(gradients, value, locations, weights)
    return of_value, of_locations, of_weights


@backward.register_kernel("cuda")
def _(gradient: Tensor, value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor):
    _, *wide = _wide(value, locations, weights)
    # Summed in full width, rounded once.
    of_value = torch.zeros(value.shape, dtype=coordinate_dtype(value), device=value.device)
    gradients = (of_value, torch.empty_like(wide[0]), torch.empty_like(wide[1]))
    if value.numel():
        narrow, gradient = value.contiguous(), gradient.to(value.dtype).contiguous()
        _call_cuda("backward", sizes, narrow, gradient, narrow, *wide, *gradients)
    return _narrowed(gradients, value, locations, weights)


@backward.register_fake
def _(gradient, value, sizes, locations, weights):
    return tuple(x.new_empty(x.shape) for x in (value, locations, weights))


def _output_shape(value: Tensor, locations: Tensor) -> tuple[int, ...]:
    return value.shape[0], locations.shape[1], value.shape[2] * value.shape[3]


def _wide(*tensors: Tensor) -> list[Tensor]:
    """Contiguous, and as wide as the sums."""
    dtype = coordinate_dtype(tensors[0])
    return [x.to(dtype).contiguous() for x in tensors]


def _narrowed(gradients: tuple[Tensor, ...], *inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(gradient.to(x.dtype) for gradient, x in zip(gradients, inputs))


def dimensions(value: Tensor, locations: Tensor) -> ctypes.Array:
    """B, L, N, C, levels, Q, points, as the C functions take them."""
    _, queries, _, levels, points, _ = locations.shape
    return kernels.integers([*value.shape, levels, queries, points])


def _call_cpu(name: str, sizes: list[int], value: Tensor, locations: Tensor, *tensors: Tensor) -> None:
    settings = (kernels.integers(sizes), dimensions(value, locations), torch.get_num_threads())
    kernels.call(f"ms_deform_attn_{name}", value.dtype, *settings, *map(kernels.pointer, tensors))


def _call_cuda(name: str, sizes: list[int], value: Tensor, *tensors: Tensor) -> None:
    """On the current stream of the tensors' device, without waiting. Raises RuntimeError if the launch fails."""
    module = kernels.load_cuda(value.device.index, VALUES[value.dtype])
    stream = torch.cuda.current_stream(value.device).cuda_stream
    ordered = torch.are_deterministic_algorithms_enabled()
    for launch in launches(name, sizes, value, tensors, ordered=ordered):
        module.launch(launch.kernel, launch.blocks, THREADS, stream, launch.arguments)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    value, ctx.sizes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    value, locations, weights = ctx.saved_tensors
    of_value, of_locations, of_weights = backward(gradient, value, ctx.sizes, locations, weights)
    return of_value, None, of_locations, of_weights


forward.register_autograd(_differentiate, setup_context=_setup_context)
kernels.first_derivatives_only(backward, "ms_deform_attn")


def examples(dtype: torch.dtype) -> list[tuple]:
    """Three levels, one of a single cell; a third of the points lie outside."""
    generator = torch.Generator().manual_seed(0)
    locations = 0.5 + 0.4 * torch.randn(1, 6, 2, 3, 2, 2, generator=generator, dtype=torch.float64)
    weights = torch.rand(1, 6, 2, 3, 2, generator=generator, dtype=torch.float64)
    value = torch.randn(1, 20 + 6 + 1, 2, 40, generator=generator, dtype=torch.float64).to(dtype)
    wide = coordinate_dtype(value)
    return [(value, [4, 5, 2, 3, 1, 1], locations.to(wide), weights.to(wide))]


KERNELS = kernels.register(
    "ms_deform_attn",
    compiled=forward,
    plain=plain_ms_deform_attn,
    examples=examples,
    dtypes={"cpu": tuple(VALUES), "cuda": tuple(VALUES)},
)
