"""RoIAlign and bilinear sampling as matrices: what weight each row and each column of a map has in a sample.

RoIAlign (He et al., ICCV 2017, section 3) is linear in the map, and its weights separate: the weight of cell (y, x) in
bin (p, q) is Wy[p, y] * Wx[q, x]. So a 1 x 1 convolution can run before the pooling or after it, and a point sampled
inside the pooled grid is again a product of one row vector and one column vector. Equal to torchvision.ops.roi_align
(aligned, adaptive sampling) up to rounding, and deterministic in backward.

Matrix products spend most of their time on weights of 0. On CPUs, compiled kernels (models/ops/roi_sampling.py) visit
the others only; the tensor code here runs everywhere else, and is what they are compared with.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from samdetr.models.ops import kernels
from samdetr.models.ops import roi_sampling as compiled

# Numbers that roi_align holds between its two products: 16 MiB of float32. With 64 MiB the first product on C3 took
# twice as long on a CPU: new memory all the time, and none of it in a cache when the second product reads it.
AT_ONCE = 2**22
# A point is a weighted sum over the map. With more points times cells than this (8 points on C3 of a large image), to
# pool the boxes first and to weigh their bins takes less memory and a training step less time; on smaller maps it takes
# more.
POOL_FIRST = 2**15


class Regions:
    """The inside of boxes, as a grid of bins x bins to look at whole, or at points.

    Args:
        cells: (B, H, W, C), the map.
        rows, columns: (B, Q, bins, H) and (B, Q, bins, W), weights of the cells in the bins; without gradient.
        points: how many will be sampled in each box, 0 for none. Chooses the path, not the result.
    """

    def __init__(self, cells: Tensor, rows: Tensor, columns: Tensor, *, points: int):
        self.cells, self.rows, self.columns = cells, rows, columns
        large = points * cells.shape[1] * cells.shape[2] > POOL_FIRST
        pool_first = large and not _has_kernels(cells, constant=(rows, columns))
        self.bins = roi_align(cells, rows, columns) if pool_first else None

    def pooled(self, linear: Callable[[Tensor], Tensor]) -> Tensor:
        """`linear` maps channels, (..., C) -> (..., D), and has no bias, so that its place does not matter: on the map
        or on the bins. -> (B, Q, bins, bins, D), y before x."""
        if self.bins is not None:
            return linear(self.bins)
        return roi_align(linear(self.cells), self.rows, self.columns)

    def at(self, offsets: Tensor) -> Tensor:
        """Bilinear samples of the bins, (B, Q, P, 2) -> (B, Q, P, C). `offsets` are x, y; -1 and 1 are the edges of the
        box, beyond which lie zeros."""
        num_bins = self.rows.shape[2]
        positions = (offsets + 1) * (num_bins / 2) - 0.5  # in bins, 0 at the centre of the first
        if self.bins is None and _has_kernels(self.cells, positions, constant=(self.rows, self.columns)):
            return compiled.SampleBetweenBins.apply(self.cells, self.rows, self.columns, positions)
        x, y = bilinear_weights(positions, num_bins).unbind(-2)  # (B, Q, P, bins) each
        if self.bins is not None:
            return sample_bins(self.bins, y, x)
        return sample(self.cells, y @ self.rows, x @ self.columns)


def _has_kernels(*tensors: Tensor, constant: tuple[Tensor, ...]) -> bool:
    """Whether the kernels can take over. They have no gradient for what is `constant`."""
    if any(tensor.requires_grad for tensor in constant) and torch.is_grad_enabled():
        return False
    return kernels.takes(*tensors, *constant)


def bilinear_weights(positions: Tensor, length: int) -> Tensor:
    """Weights of linear interpolation between neighbours, zero outside.

    `positions` (...), in cells with 0 at the first cell's centre -> (..., length).
    """
    cells = torch.arange(length, dtype=positions.dtype, device=positions.device)
    return (1 - (positions[..., None] - cells).abs()).clamp(min=0)


def roi_align_weights(low: Tensor, high: Tensor, *, length: int, num_bins: int) -> Tensor:
    """One axis of RoIAlign: weight of every cell in every bin.

    Args:
        low, high: (...), edges of the boxes along this axis in cells, 0 at the first cell's edge. A box may reach out
            of the map but not be longer than it.
        length: number of cells.
    Returns:
        (..., num_bins, length). As in RoIAlign, ceil(box length / num_bins) samples share a bin; samples more than one
        cell outside the map count as zero, nearer ones take the border's value.
    """
    if _has_kernels(constant=(low, high)):
        return compiled.weigh(low, high, length=length, num_bins=num_bins)
    bin_length = (high - low) / num_bins
    count = bin_length.ceil()[..., None, None]  # samples in a bin
    bins = torch.arange(num_bins, dtype=low.dtype, device=low.device)[:, None]
    # One more than a box as long as the map needs where num_bins divides it: its length may be rounded up.
    samples = torch.arange(length // num_bins + 1, dtype=low.dtype, device=low.device)
    offset = bins + (samples + 0.5) / count.clamp(min=1)  # (..., bins, samples), in bins
    position = low[..., None, None] - 0.5 + offset * bin_length[..., None, None]
    counted = (samples < count) & (position >= -1) & (position <= length)
    weights = bilinear_weights(position.clamp(0, length - 1), length) * counted[..., None]
    return weights.sum(-2) / count.clamp(min=1)


def roi_align(cells: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pool the boxes whose bins have these weights, a few at a time.

    Without gradient for the weights, backward needs nothing of the size of the product with one of them alone, which is
    bins * W * C numbers a box: half a GiB for 600 boxes, 256 channels and a map of 100 x 134.

    Args:
        cells: (B, H, W, C).
        rows, columns: (B, Q, bins, H) and (B, Q, bins, W).
    Returns:
        (B, Q, bins, bins, C), y before x.
    """
    if _has_kernels(cells, constant=(rows, columns)):
        return compiled.RoIAlign.apply(cells, rows, columns)
    batch, _, width, channels = cells.shape
    lines = cells.flatten(2)  # (B, H, W * C)
    number = max(1, AT_ONCE // (batch * rows.shape[2] * width * channels))
    if torch.compiler.is_compiling():  # a loop whose length follows from the size would be compiled for every size
        number = rows.shape[1]
    pooled = []
    for along_y, along_x in zip(rows.split(number, 1), columns.split(number, 1)):
        by_row = (along_y.flatten(1, 2) @ lines).view(*along_y.shape[:3], width, channels)
        pooled.append(along_x[:, :, None] @ by_row)
    return torch.cat(pooled, 1)


def sample(cells: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Weighted sums over the map: (B, H, W, C), (B, Q, P, H), (B, Q, P, W) -> (B, Q, P, C)."""
    sampled = products(rows, columns).flatten(1, 2) @ cells.flatten(1, 2)
    return sampled.unflatten(1, rows.shape[1:3])


def sample_bins(pooled: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Weighted sums over the bins of each box: (B, Q, 7, 7, C), (B, Q, P, 7) twice -> (B, Q, P, C)."""
    return products(rows, columns) @ pooled.flatten(2, 3)


def products(rows: Tensor, columns: Tensor) -> Tensor:
    """Weight of every cell: (..., H), (..., W) -> (..., H * W)."""
    return (rows[..., :, None] * columns[..., None, :]).flatten(-2)
