"""Gaussian prior on where a head looks (SMCA, Gao et al., ICCV 2021, in SAM-DETR's form)."""

import torch
from torch import Tensor


def gaussian_log_prior(points: Tensor, scales: Tensor, *, height: int, width: int) -> Tensor:
    """Logarithm of a Gaussian around each point, at the centres of the cells of a map.

    Args:
        points: (..., 2), x, y in cells of the map (0 is the left or top edge of the first cell).
        scales: (..., 2), inverse widths along x and y.
    Returns:
        (..., height, width): -(scale^2 * distance^2) summed over x and y, divided by 8.

    The sum has one term in x and one in y, so no tensor with both coordinates of every pair is needed.
    """

    def along(axis: int, size: int) -> Tensor:
        centres = torch.arange(size, dtype=points.dtype, device=points.device) + 0.5
        distance = centres - points[..., axis, None]  # (..., size)
        return -(scales[..., axis, None] * distance).square() / 8

    return along(1, height)[..., :, None] + along(0, width)[..., None, :]
