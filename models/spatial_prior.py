"""Gaussian prior on the positions that a head attends (SMCA, Gao et al., ICCV 2021, in SAM-DETR's form)."""

from typing import NamedTuple

import torch
from torch import Tensor


class SeparablePrior(NamedTuple):
    """Logarithm of a prior at the cells of a map, as the sum of `rows` (..., H) and `columns` (..., W)."""

    rows: Tensor
    columns: Tensor

    def dense(self) -> Tensor:
        """(..., H * W)."""
        return (self.rows[..., :, None] + self.columns[..., None, :]).flatten(-2)

    def transpose(self, first: int, second: int) -> "SeparablePrior":
        return SeparablePrior(self.rows.transpose(first, second), self.columns.transpose(first, second))


def gaussian_log_prior(points: Tensor, scales: Tensor, *, height: int, width: int) -> SeparablePrior:
    """Logarithm of a Gaussian around each point, at the centres of the cells of a map.

    Args:
        points: (..., 2), x, y in cells of the map (0 is the left or top edge of the first cell).
        scales: (..., 2), inverse widths along x and y.
    Returns:
        -(scale^2 * distance^2) / 8 along y (..., height), and along x (..., width).
    """

    def along(axis: int, size: int) -> Tensor:
        centres = torch.arange(size, dtype=points.dtype, device=points.device) + 0.5
        distance = centres - points[..., axis, None]  # (..., size)
        return -(scales[..., axis, None] * distance).square() / 8

    return SeparablePrior(along(1, height), along(0, width))
