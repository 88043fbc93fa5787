"""The kernels of RoIAlign and of sampling between its bins (cpu.cpp) as torch.ops.sam_detr.roi_sampling."""

from typing import Any

import torch
from torch import Tensor

from samdetr.models.ops import kernels
from samdetr.models.ops.roi_sampling.plain import plain_roi_sampling


@torch.library.custom_op("sam_detr::roi_sampling", mutates_args=(), device_types="cpu")
def forward(cells: Tensor, boxes: Tensor, positions: Tensor | None, bins: int) -> Tensor:
    output = cells.new_zeros(_output_shape(cells, boxes, positions, bins))
    if output.numel():
        _call("forward", _dense_images(cells), boxes, positions, bins, output)
    return output


@forward.register_fake
def _(cells, boxes, positions, bins):
    return cells.new_empty(_output_shape(cells, boxes, positions, bins))


@torch.library.custom_op("sam_detr::roi_sampling_backward", mutates_args=(), device_types="cpu")
def backward(
    gradient: Tensor,
    cells: Tensor,
    boxes: Tensor,
    positions: Tensor | None,
    bins: int,
    for_cells: bool,
    for_positions: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of cells and positions; empty where they are not asked for."""
    of_cells, of_positions = (cells.new_zeros(s) for s in _gradient_shapes(cells, positions, for_cells, for_positions))
    if gradient.numel() and cells.numel():
        results = (of_cells if for_cells else None, of_positions if for_positions else None)
        _call("backward", _dense_images(cells), boxes, positions, bins, *results, given=gradient.contiguous())
    return of_cells, of_positions


@backward.register_fake
def _(gradient, cells, boxes, positions, bins, for_cells, for_positions):
    shapes = _gradient_shapes(cells, positions, for_cells, for_positions)
    return tuple(cells.new_empty(shape) for shape in shapes)


def _output_shape(cells: Tensor, boxes: Tensor, positions: Tensor | None, bins: int) -> tuple[int, ...]:
    of_box = (bins, bins) if positions is None else (positions.shape[2],)
    return *boxes.shape[:2], *of_box, cells.shape[3]


def _gradient_shapes(
    cells: Tensor, positions: Tensor | None, for_cells: bool, for_positions: bool
) -> list[tuple[int, ...]]:
    of_positions = tuple(positions.shape) if positions is not None and for_positions else (0,)
    return [tuple(cells.shape) if for_cells else (0,), of_positions]


def _dense_images(cells: Tensor) -> Tensor:
    """Images that are contiguous, though perhaps apart from each other, as one level is in the tokens of several."""
    return cells if cells[:1].is_contiguous() else cells.contiguous()


def _call(
    name: str,
    cells: Tensor,
    boxes: Tensor,
    positions: Tensor | None,
    bins: int,
    *results: Tensor | None,
    given: Tensor | None = None,
) -> None:
    points = 0 if positions is None else positions.shape[2]
    sizes = kernels.integers([*cells.shape, cells.stride(0), boxes.shape[1], bins, points])
    inputs = [cells, boxes.contiguous(), None if positions is None else positions.contiguous()]
    tensors = [*([] if given is None else [given]), *inputs, *results]
    pointers = map(kernels.pointer, tensors)
    kernels.call(f"roi_sampling_{name}", cells.dtype, sizes, torch.get_num_threads(), *pointers)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    cells, boxes, positions, ctx.bins = inputs
    ctx.save_for_backward(cells, boxes, positions)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    cells, boxes, positions = ctx.saved_tensors
    wanted = (ctx.needs_input_grad[0], positions is not None and ctx.needs_input_grad[2])
    gradients = backward(gradient, cells, boxes, positions, ctx.bins, *wanted)
    of_cells, of_positions = (x if asked else None for x, asked in zip(gradients, wanted))
    return of_cells, None, of_positions, None


forward.register_autograd(_differentiate, setup_context=_setup_context)
kernels.first_derivatives_only(backward, "roi_sampling")


def _examples(dtype: torch.dtype) -> list[tuple]:
    """Boxes inside, over a border and narrower than a cell, on a map of 5 x 6 cells; points inside and outside."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.randn(1, 5, 6, 19, generator=generator, dtype=torch.float64)
    boxes = torch.tensor([[[0.3, 0.7, 5.1, 4.2], [-1.2, 2.1, 3.3, 5.9], [2.2, 1.3, 2.4, 1.9]]], dtype=torch.float64)
    positions = 9 * torch.rand(1, 3, 4, 2, generator=generator, dtype=torch.float64) - 1.5
    cells, boxes, positions = (x.to(dtype) for x in (cells, boxes, positions))
    return [(cells, boxes, None, 7), (cells, boxes, positions, 7)]


KERNELS = kernels.register(
    "roi_sampling",
    compiled=forward,
    plain=plain_roi_sampling,
    examples=_examples,
    dtypes={"cpu": tuple(kernels.CPU_NAMES)},
)
