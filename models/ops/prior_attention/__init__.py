"""Attention whose heads may share wide keys, with padding and a separable prior."""

from __future__ import annotations

from torch import Tensor

from samdetr.models.ops.prior_attention.binding import KERNELS


def prior_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    padding: Tensor | None = None,
    prior: tuple[Tensor, Tensor] | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax(query key^T / sqrt(D) + prior) value -> (B, N, Q, E).

    SAM-DETR's keys are as wide as the model for every head, and one key serves all heads (Zhang et al., CVPR 2022,
    section 3.4); SMCA adds a Gaussian prior to the logits (Gao et al., ICCV 2021). By a compiled kernel on CPUs, else
    by F.scaled_dot_product_attention.

    Args:
        query: (B, N, Q, D).
        key: (B, N, L, D), or (B, 1, L, D) where all heads share one key. A kernel never expands a shared key.
        value: (B, N, L, E).
        padding: (B, L) of bool, True at positions that no query may attend. Where all are, the output is 0.
        prior: added to the scaled logits, L being H * W: its rows (B, N or 1, Q, H), its columns (B, N or 1, Q, W).
        dropout: probability that an attention weight is dropped.
    Raises:
        ValueError: shapes that do not fit.
    """
    rows, columns = prior or (None, None)
    _check(query, key, value, padding, rows, columns)
    run = KERNELS.compiled if KERNELS.take(query, key, value, rows, columns) else KERNELS.plain
    return run(query, key, value, padding, rows, columns, dropout)


def _check(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, rows: Tensor | None, columns: Tensor | None
) -> None:
    if query.ndim != 4 or key.ndim != 4:
        raise ValueError(f"query and key: expected 4 axes each, got {tuple(query.shape)} and {tuple(key.shape)}")
    batch, heads, number, depth = query.shape
    length = key.shape[2]

    def expect(name: str, tensor: Tensor, *shapes: tuple) -> None:
        if tuple(tensor.shape) not in shapes:
            raise ValueError(f"{name}: expected {' or '.join(map(str, shapes))}, got {tuple(tensor.shape)}")

    expect("key", key, (batch, heads, length, depth), (batch, 1, length, depth))
    expect("value", value, (batch, heads, length, value.shape[-1]))
    if padding is not None:
        expect("padding", padding, (batch, length))
    if rows is not None and columns is not None:
        height, width = rows.shape[-1], columns.shape[-1]
        if height * width != length:
            raise ValueError(f"prior: {height} rows and {width} columns, but {length} keys")
        expect("prior's rows", rows, (batch, heads, number, height), (batch, 1, number, height))
        expect("prior's columns", columns, (*rows.shape[:3], width))
