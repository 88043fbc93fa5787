"""Heads of attention: (B, L, N * D) to (B, N, L, D) and back. B batch, N heads, L positions, D width of a head."""

from __future__ import annotations

from torch import Tensor


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, L, N * D) -> (B, N, L, D)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, N, L, D) -> (B, L, N * D)."""
    return x.transpose(1, 2).flatten(2)
