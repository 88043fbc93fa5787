"""Deformable attention by the package deformops (Triton, CUDA and PyTorch; MIT), where it is asked for.

Its sums have no fixed order, and it has no emulation here: what it computes is compared with plain PyTorch on first
use, as that of our kernels is.
"""

import functools
import importlib

import torch
from torch import Tensor

from samdetr.models.ops import kernels
from samdetr.models.ops.ms_deform_attn.binding import examples
from samdetr.models.ops.ms_deform_attn.plain import plain_ms_deform_attn


@functools.cache
def package() -> None:
    """Load it. Raises ValueError: it is not installed, or does not run here."""
    try:
        importlib.import_module("deformops.registry.msda")
    except Exception as error:  # what another version of Python or PyTorch makes of it
        reason = "is not installed" if isinstance(error, ModuleNotFoundError) else f"does not load ({error})"
        raise ValueError(
            f"`ops` deformops: the package {reason}; `pip install deformops` (Python 3.12 or 3.13, PyTorch 2.11 or "
            "newer), or leave `ops` out"
        ) from None


def tables(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Height and width of each level (levels, 2), and where each level starts (levels,)."""
    shapes = torch.tensor(sizes, dtype=torch.int64).view(-1, 2)
    cells = shapes.prod(1)
    return shapes.to(device), (cells.cumsum(0) - cells).to(device)


cached_tables = functools.lru_cache(64)(tables)


def by_deformops(value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Arguments as of plain_ms_deform_attn."""
    if torch.compiler.is_compiling():  # the package is loaded by then, for the comparison on first use
        shapes, starts = tables(tuple(sizes), value.device)
    else:
        package()
        shapes, starts = cached_tables(tuple(sizes), value.device)
    weights = weights.to(value.dtype).contiguous()
    return torch.ops.deformops.msda(value.contiguous(), shapes, starts, locations.contiguous(), weights)


FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DEFORMOPS = kernels.register(
    "ms_deform_attn of deformops",
    compiled=by_deformops,
    plain=plain_ms_deform_attn,
    examples=examples,
    dtypes={"cpu": FLOATS, "cuda": FLOATS},
    own=False,
)
