"""Multi-scale deformable attention in plain PyTorch (Zhu et al., Deformable DETR, ICLR 2021, eq. 3).

Runs on every device, gives the gradients through autograd, and is what the compiled kernels are tested against.
Legend: B batch, Q queries, N heads, C channels of a head, L positions of all levels together.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def coordinate_dtype(value: Tensor) -> torch.dtype:
    """Locations and weights are never narrower than this: at 8 bits a location misses its cell on a 134-wide map."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def grids_of(locations: Tensor) -> Tensor:
    """(B, Q, N, levels, points, 2) -> (B * N, Q, levels, points, 2), as grid_sample counts: -1 to 1.

    What is infinite or no number is outside, where it gives 0 and gets no gradient, as in the official kernels.
    """
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)
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
    with torch.autocast(value.device.type, enabled=False):
        batch, _, heads, channels = value.shape
        queries = locations.shape[1]
        levels = value.to(dtype).split([h * w for h, w in zip(sizes[::2], sizes[1::2])], dim=1)
        grids = grids_of(locations.to(dtype))
        weights = weights.to(dtype).transpose(1, 2).flatten(0, 1)  # (B * N, Q, levels, points)

        output = 0
        for level, features in enumerate(levels):
            height, width = sizes[2 * level], sizes[2 * level + 1]
            maps = features.permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
            sampled = F.grid_sample(maps, grids[:, :, level], padding_mode="zeros", align_corners=False)
            output = output + (sampled * weights[:, None, :, level]).sum(-1)  # (B * N, C, Q)
        output = output.reshape(batch, heads * channels, queries).transpose(1, 2)
    return output.contiguous().to(value.dtype)


def plain_backward(
    grad_output: Tensor, value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights of plain_ms_deform_attn, given that of its output (B, Q, N * C).

    What autograd would do, but nothing of the size of the sampled values is kept from the forward: they are sampled
    again, level by level. For an image of 800 x 1066 pixels the peak is some 350 instead of 505 MiB an encoder layer.
    """
    dtype = coordinate_dtype(value)
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    levels = value.to(dtype).split([h * w for h, w in zip(sizes[::2], sizes[1::2])], dim=1)
    grids = grids_of(locations.to(dtype))
    wide_weights = weights.to(dtype).transpose(1, 2).flatten(0, 1)  # (B * N, Q, levels, points)
    grad = grad_output.to(dtype).transpose(1, 2).reshape(batch * heads, channels, queries, 1)

    grad_values, grad_grids, grad_weights = [], [], []
    for level, features in enumerate(levels):
        height, width = sizes[2 * level], sizes[2 * level + 1]
        maps = features.permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        grid = grids[:, :, level]
        sampled = F.grid_sample(maps, grid, padding_mode="zeros", align_corners=False)
        grad_weights.append((grad * sampled).sum(1))  # (B * N, Q, points)
        grad_sampled = grad * wide_weights[:, None, :, level]
        bilinear = zeros = 0
        grad_maps, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
            grad_sampled, maps, grid, bilinear, zeros, False, (True, True)
        )
        grad_values.append(grad_maps.reshape(batch, heads, channels, height * width).permute(0, 3, 1, 2))
        grad_grids.append(2 * grad_grid)

    grad_locations = torch.stack(grad_grids, 2).unflatten(0, (batch, heads)).transpose(1, 2)
    grad_weights = torch.stack(grad_weights, 2).unflatten(0, (batch, heads)).transpose(1, 2)
    gradients = (torch.cat(grad_values, 1), value), (grad_locations, locations), (grad_weights, weights)
    return tuple(gradient.to(like.dtype).contiguous() for gradient, like in gradients)
