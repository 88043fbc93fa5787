"""Multi-scale deformable attention, without its projections."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from samdetr.models.ops import kernels
from samdetr.models.ops.ms_deform_attn.binding import KERNELS
from samdetr.models.ops.ms_deform_attn.by_deformops import DEFORMOPS
from samdetr.models.ops.ms_deform_attn.launch import MAX_LEVELS

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def ms_deform_attn(
    value: Tensor, level_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Multi-scale deformable attention (Zhu et al., Deformable DETR, ICLR 2021, eq. 3), without its projections.

    Compiled where a compiler is found (CPU, CUDA), else plain PyTorch; see models/ops/doctor.py. Differentiable once.
    `--ops` asks for another path.

    Args:
        value: (B, L, heads, channels), the levels' cells in rows, one level after the other. Sums are in float32
            (float64 for float64) whatever its type; under autocast it takes the autocast dtype.
        level_shapes: height and width of each level, as Python ints: nothing here waits for a GPU.
        locations: (B, Q, heads, levels, points, 2), x, y with 0 and 1 at the borders of the level's map. Outside it,
            the map continues with zeros. float32 is kept also where value has 16 bits.
        weights: (B, Q, heads, levels, points), usually summing to 1 over levels and points.
    Returns:
        (B, Q, heads * channels), in the type of value.
    Raises:
        ValueError: where shapes, types or devices do not fit.
    """
    check(value, level_shapes, locations, weights)
    sizes = [size for shape in level_shapes for size in shape]
    device_type = value.device.type
    autocast = device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type)
    if autocast and value.dtype != torch.float64:
        value = value.to(torch.get_autocast_dtype(device_type))
    if kernels.wanted() == "deformops" and DEFORMOPS.take(value):
        return DEFORMOPS.compiled(value, sizes, locations, weights)
    if KERNELS.take(value) and len(level_shapes) <= MAX_LEVELS:
        return KERNELS.compiled(value, sizes, locations, weights)
    if not torch.is_grad_enabled():
        return KERNELS.plain(value, sizes, locations, weights)
    # Samples are a dozen times as large as the value: sampled again in backward instead of kept.
    return checkpoint(KERNELS.plain, value, sizes, locations, weights, use_reentrant=False, preserve_rng_state=False)


def check(value: Tensor, level_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> None:
    if value.ndim != 4 or 0 in value.shape[2:]:
        raise ValueError(f"value: expected (B, L, heads, channels), got {tuple(value.shape)}")
    check_level_shapes(level_shapes, value.shape[1])
    if locations.ndim != 6 or locations.shape[4] < 1:
        raise ValueError(f"locations: expected (B, Q, heads, levels, points, 2), got {tuple(locations.shape)}")
    batch, _, heads, _ = value.shape
    expected = (batch, locations.shape[1], heads, len(level_shapes), locations.shape[4])
    if tuple(locations.shape) != (*expected, 2):
        raise ValueError(f"locations: expected {(*expected, 2)} to go with value, got {tuple(locations.shape)}")
    if tuple(weights.shape) != expected:
        raise ValueError(f"weights: expected {expected} to go with locations, got {tuple(weights.shape)}")
    for name, tensor in (("value", value), ("locations", locations), ("weights", weights)):
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name}: {tensor.dtype} is none of {', '.join(map(str, FLOATS))}")
        if tensor.device != value.device:
            raise ValueError(f"{name} is on {tensor.device}, value on {value.device}")


def check_level_shapes(level_shapes: Sequence[tuple[int, int]], length: int) -> None:
    """Raises ValueError unless the levels have cells, `length` of them together."""
    if isinstance(level_shapes, Tensor):
        raise ValueError("level_shapes: a tensor; pass Python ints, reading them from a GPU would stop it")
    try:
        fine = len(level_shapes) > 0 and all(
            not isinstance(size, (float, Tensor)) and size >= 1
            for height, width in level_shapes
            for size in (height, width)
        )
    except (TypeError, ValueError):  # no pairs, or not of numbers
        fine = False
    if not fine:
        raise ValueError(f"level_shapes: expected one (height, width) of at least 1 each level, got {level_shapes}")
    cells = sum(height * width for height, width in level_shapes)
    if cells != length:
        raise ValueError(f"level_shapes: {level_shapes} has {cells} cells, value {length}")
