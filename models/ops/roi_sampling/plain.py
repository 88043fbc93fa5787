"""RoIAlign and bilinear sampling as matrices: what weight each row and each column of a map has in a sample.

RoIAlign is linear in the map, and its weights separate: the weight of cell (y, x) in bin (p, q) is
Wy[p, y] * Wx[q, x]. A point between bins is again a product of one row vector and one column vector.
"""

from __future__ import annotations

import torch
from torch import Tensor

from samdetr.models.ops.exporting import exporting

# Numbers between the two products of roi_align: 16 MiB of float32. With 64 MiB the first took twice as long on a CPU.
AT_ONCE = 2**22
# A point is a weighted sum over the map. With more points times cells than this (8 points on C3 of a large image),
# pooling the boxes first takes less memory and time; on smaller maps it takes more.
POOL_FIRST = 2**15


def plain_roi_sampling(cells: Tensor, boxes: Tensor, positions: Tensor | None, bins: int) -> Tensor:
    """Arguments as of roi_sampling, but `positions` are in bins, 0 at the centre of the first."""
    height, width = cells.shape[1:3]
    with torch.no_grad():
        rows = roi_align_weights(boxes[..., 1], boxes[..., 3], length=height, num_bins=bins)  # (B, Q, bins, H)
        columns = roi_align_weights(boxes[..., 0], boxes[..., 2], length=width, num_bins=bins)  # (B, Q, bins, W)
    if positions is None:
        return roi_align(cells, rows, columns)
    x, y = bilinear_weights(positions, bins).unbind(-2)  # (B, Q, P, bins) each
    if not exporting() and positions.shape[2] * height * width > POOL_FIRST:
        return products(y, x) @ roi_align(cells, rows, columns).flatten(2, 3)
    return sample(cells, y @ rows, x @ columns)


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
    bin_length = (high - low) / num_bins
    count = bin_length.ceil()[..., None, None]  # samples in a bin
    bins = torch.arange(num_bins, dtype=low.dtype, device=low.device)[:, None]
    # One more than a box as long as the map needs where num_bins divides it: its length may be rounded up.
    # Two more in an export: 1, on a small map, would mean broadcasting there, and an exported size decides nothing.
    samples = torch.arange(length // num_bins + (2 if exporting() else 1), dtype=low.dtype, device=low.device)
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


def products(rows: Tensor, columns: Tensor) -> Tensor:
    """Weight of every cell: (..., H), (..., W) -> (..., H * W)."""
    return (rows[..., :, None] * columns[..., None, :]).flatten(-2)
