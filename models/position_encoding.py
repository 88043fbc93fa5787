"""Sine position encoding: one formula, of a padding grid (keys) and of points (queries).

Attention Is All You Need, section 3.5, in DETR's two-dimensional form: the first half of the channels encodes y,
the second half x; within a half, sine and cosine of falling frequencies alternate.
"""

import math

import torch
from torch import Tensor


def sine_encoding(points: Tensor, *, num_channels: int, temperature: float = 10000.0) -> Tensor:
    """Encode points (..., 2), given as x, y in [0, 1] -> (..., num_channels)."""
    if num_channels % 4:
        raise ValueError(f"a sine position encoding needs a width that 4 divides, not `hidden_dim` {num_channels}")
    return sines(points.flip(-1), width=num_channels // 2, scale=2 * math.pi, temperature=temperature)  # y first


def sines(values: Tensor, *, width: int, scale: float, temperature: float = 10000.0) -> Tensor:
    """`width` channels a number: sine and cosine of falling frequencies in turns; (..., K) -> (..., K * width)."""
    # The periods are float32 for any type of values, as published.
    pair = torch.arange(width // 2, dtype=torch.float32, device=values.device)
    angles = scale * values[..., None] / temperature ** (2 * pair / width)  # (..., K, width / 2)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-3)


def in_cells(shares: Tensor, *, height: int, width: int) -> Tensor:
    """Shares (..., 2) of a map's width and height, x and y, in its cells. The sizes stay numbers: in a tensor,
    torch.export would fix them."""
    return torch.stack([shares[..., 0] * width, shares[..., 1] * height], -1)


def grid_points(padding: Tensor, *, centred: bool = True) -> Tensor:
    """Centres of the cells of a padded map, relative to its valid part; not `centred`, their far corners, as in DETR.

    `padding` (B, H, W), True where padded -> (B, H, W, 2), x, y in [0, 1] on valid cells, float32.
    """

    def relative(axis: int) -> Tensor:
        count = (~padding).cumsum(axis).float()  # summed as integers: of floats CUDA has no deterministic sum
        if not centred:
            return count / (count.narrow(axis, -1, 1) + 1e-6)
        centre = count - 0.5
        # The last centre + 0.5 is the number of valid cells. The order of the two additions matters in rows and columns
        # that are all padding: there the divisor is the rounding error of this sum alone. These cells are no keys, but
        # RoIAlign at the border of an image sees their encoded features.
        return centre / (centre.narrow(axis, -1, 1) + 1e-6 + 0.5)

    return torch.stack([relative(2), relative(1)], -1)
