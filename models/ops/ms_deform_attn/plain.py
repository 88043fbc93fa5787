"""Multi-scale deformable attention in plain PyTorch (Zhu et al., Deformable DETR, ICLR 2021, eq. 3).

Runs on every device, gives the gradients through autograd, and is what the compiled kernels are tested against.
Legend: B batch, Q queries, N heads, C channels of a head, L positions of all levels together.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from samdetr.models.ops.exporting import exporting


def coordinate_dtype(value: Tensor) -> torch.dtype:
    """Locations and weights are never narrower than this: at 8 bits a location misses its cell on a 134-wide map."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def grids_of(locations: Tensor) -> Tensor:
    """(B, Q, N, levels, points, 2) -> (B * N, levels, points, Q, 2), as grid_sample counts: -1 to 1.

    What is infinite or no number is outside, where it gives 0 and gets no gradient, as in the official kernels.
    """
    grids = (2 * locations - 1).permute(0, 2, 3, 4, 1, 5).flatten(0, 1)
    if exporting():  # engines need a tenth of their time for what follows
        return grids.clamp(-1e4, 1e4)
    return grids.nan_to_num(nan=1e4, posinf=1e4, neginf=-1e4)


def plain_ms_deform_attn(value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Sum over levels and points of weight * value interpolated at the location.

    Args:
        value: (B, L, N, C). 16-bit values are widened to float32 first, and the result rounded once.
        sizes: height and width of each level, one after the other.
        locations: (B, Q, N, levels, points, 2), x, y as fractions of the level's width and height.
        weights: (B, Q, N, levels, points).
    Returns:
        (B, Q, N * C) in the type of value.
    """
    dtype = coordinate_dtype(value)
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    levels = value.to(dtype).split([h * w for h, w in zip(sizes[::2], sizes[1::2])], dim=1)
    grids = grids_of(locations.to(dtype))
    weights = weights.to(dtype).permute(0, 2, 3, 4, 1).flatten(0, 1)  # (B * N, levels, points, Q)

    output = weights.new_zeros(())
    for level, features in enumerate(levels):
        height, width = sizes[2 * level], sizes[2 * level + 1]
        maps = features.permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        # (B * N, C, points, Q): sums over neighbouring numbers would take half as long again.
        sampled = F.grid_sample(maps, grids[:, level], padding_mode="zeros", align_corners=False)
        output = output + (sampled * weights[:, None, level]).sum(2)  # (B * N, C, Q)
    output = output.reshape(batch, heads * channels, queries).transpose(1, 2)
    return output.contiguous().to(value.dtype)
