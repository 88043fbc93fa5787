"""RoIAlign and sampling between its bins by compiled CPU kernels, which visit the few cells of weight only.

For tensors that kernels.takes; models/sam_detr/roi_sampling.py has the same in tensor code.
Legend: B batch, Q boxes, P points of a box, C channels, H x W the map.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from samdetr.models.ops import kernels


def weigh(low: Tensor, high: Tensor, *, length: int, num_bins: int) -> Tensor:
    """Weight of every cell along one axis in every bin of boxes from `low` to `high`: (...) -> (..., bins, length)."""
    weights = low.new_empty(*low.shape, num_bins, length)
    _call("weigh", [low.numel(), length, num_bins], low.contiguous(), high.contiguous(), weights)
    return weights


class RoIAlign(torch.autograd.Function):
    """(B, H, W, C), (B, Q, bins, H), (B, Q, bins, W) -> (B, Q, bins, bins, C), y before x. No gradient for weights."""

    @staticmethod
    def forward(ctx: Any, cells: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        cells, rows, columns = _dense_images(cells), rows.contiguous(), columns.contiguous()
        pooled = cells.new_empty(*rows.shape[:3], columns.shape[2], cells.shape[3])
        ctx.sizes = _sizes(cells, rows, points=0)
        _call("pool", ctx.sizes, cells, rows, columns, pooled)
        ctx.save_for_backward(rows, columns)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        of_cells = gradient.new_empty(ctx.sizes[:4])
        _call("pool_backward", ctx.sizes, gradient.contiguous(), *ctx.saved_tensors, of_cells)
        return of_cells, None, None


class SampleBetweenBins(torch.autograd.Function):
    """(B, H, W, C), (B, Q, bins, H), (B, Q, bins, W), (B, Q, P, 2) -> (B, Q, P, C). No gradient for weights.

    Positions are x, y in bins, 0 at the centre of the first. Where a point lies at a centre, its gradient is that of a
    step to the right or down, as in grid_sample.
    """

    @staticmethod
    def forward(ctx: Any, cells: Tensor, rows: Tensor, columns: Tensor, positions: Tensor) -> Tensor:
        cells, rows, columns = _dense_images(cells), rows.contiguous(), columns.contiguous()
        positions = positions.contiguous()
        content = cells.new_empty(*positions.shape[:3], cells.shape[3])
        ctx.sizes = _sizes(cells, rows, points=positions.shape[2])
        _call("sample", ctx.sizes, cells, rows, columns, positions, content)
        ctx.save_for_backward(cells, rows, columns, positions)
        return content

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
        cells, *where = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_cells = of_positions = None
        if ctx.needs_input_grad[0]:
            of_cells = gradient.new_empty(cells.shape)
            _call("sample_backward_cells", ctx.sizes, gradient, *where, of_cells)
        if ctx.needs_input_grad[3]:
            of_positions = torch.empty_like(where[2])
            _call("sample_backward_positions", ctx.sizes, gradient, cells, *where, of_positions)
        return of_cells, None, None, of_positions


def _dense_images(cells: Tensor) -> Tensor:
    """Images that are contiguous, though perhaps apart from each other, as one level is in the tokens of several."""
    return cells if cells[:1].is_contiguous() else cells.contiguous()


def _sizes(cells: Tensor, rows: Tensor, *, points: int) -> list[int]:
    """B, H, W, C, from image to image, Q, bins, P, as the C functions take them."""
    return [*cells.shape, cells.stride(0), rows.shape[1], rows.shape[2], points]


def _call(name: str, sizes: list[int], *tensors: Tensor) -> None:
    pointers = map(kernels.pointer, tensors)
    kernels.call(f"roi_{name}", tensors[-1].dtype, kernels.integers(sizes), torch.get_num_threads(), *pointers)
