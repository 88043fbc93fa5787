"""Which kernels of cuda.cu a call of deformable attention launches, on how many blocks, and with what."""

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

THREADS = 256  # of a block; this and the next two as in cuda.cu
MAX_LEVELS = 32  # they travel as a kernel argument
BAND = 4  # rows of a map that one warp owns in the ordered backward
VALUES = {torch.float32: "float", torch.float64: "double", torch.float16: "Half", torch.bfloat16: "BFloat"}


class Problem(ctypes.Structure):
    """The struct of this name in cuda.cu."""

    _fields_ = [
        *((name, ctypes.c_longlong) for name in ("batch", "length")),
        *((name, ctypes.c_int) for name in ("queries", "rows", "heads", "channels", "levels", "points")),
        *((name, ctypes.c_int * MAX_LEVELS) for name in ("height", "width", "start")),
    ]


@dataclass(frozen=True)
class Launch:
    kernel: str
    blocks: int
    arguments: list[Any]


@functools.lru_cache(256)
def problem(sizes: tuple[int, ...], dimensions: tuple[int, ...]) -> Problem:
    """From height and width of every level, and B, L, N, C, levels, Q, points. Raises ValueError: too large."""
    batch, length, heads, channels, levels, queries, points = dimensions
    rows, most = batch * queries * heads, 2**31 - 1 - THREADS
    if levels > MAX_LEVELS or length > most or rows > most:
        raise ValueError(
            f"deformable attention on CUDA takes {MAX_LEVELS} levels, {most} cells and {most} rows (images x queries x "
            f"heads), got {levels}, {length} and {rows}; plain_path() takes more"
        )
    heights, widths = sizes[::2], sizes[1::2]
    starts = [sum(h * w for h, w in zip(heights[:level], widths[:level])) for level in range(levels)]
    arrays = [(ctypes.c_int * MAX_LEVELS)(*numbers) for numbers in (heights, widths, starts)]
    return Problem(batch, length, queries, rows, heads, channels, levels, points, *arrays)


def variant(value: Tensor, vectors: tuple[Tensor, ...]) -> tuple[str, int]:
    """The end of the kernels' names, and lanes of a row: 16 bytes at a time where channels and addresses allow, with as
    few lanes as hold a row."""
    lanes, rest = divmod(value.shape[-1], 16 // value.element_size())
    if rest or any(x.data_ptr() % 16 for x in vectors):
        return "single", 32
    few = next((number for number in (4, 8, 16) if lanes <= number), 32)
    return str(few), few


def launches(name: str, sizes: list[int], value: Tensor, tensors: tuple[Tensor, ...], *, ordered: bool) -> list[Launch]:
    """For "forward" (value, locations, weights, output) or "backward" (gradient of the output, value, locations,
    weights, and their gradients: the value's is added to, the others are overwritten), all contiguous. `ordered`: the
    sums of the value's gradient have one fixed order.
    """
    place, vectors = VALUES[value.dtype], tensors[: 4 if name == "forward" else 5]
    locations = tensors[1 if name == "forward" else 2]
    _, queries, _, levels, points, _ = locations.shape
    task = problem(tuple(sizes), (*value.shape, levels, queries, points))
    if not task.rows:
        return []
    end, lanes = variant(value, vectors)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in tensors]
    blocks = -(-task.rows // (THREADS // lanes))
    if name == "forward" or not ordered:
        return [Launch(f"{name}_{place}_{end}", blocks, [task, *pointers])]
    gradient, _, *coordinates = pointers[:4]
    bands = sum(-(-height // BAND) for height in sizes[::2])
    warps = task.batch * task.heads * bands
    first = [task, *pointers[:4], ctypes.c_void_p(), *pointers[5:]]  # leaves the value's gradient to the second
    second = [task, ctypes.c_int(bands), gradient, *coordinates, pointers[4]]
    return [
        Launch(f"backward_{place}_{end}", blocks, first),
        Launch(f"ordered_{place}", -(-warps // (THREADS // 32)), second),
    ]
