"""Attention by the compiled CPU kernel (csrc/attention_cpu.cpp); models/attention.py has the formula.

Legend: B batch, N heads, Q queries, L positions attended (H * W of a map), D width of a query and key, E of a value.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from samdetr.models.ops import kernels
from samdetr.models.ops.dropout import draw_seed


def runs_compiled(
    query: Tensor, key: Tensor, value: Tensor, *, padding: Tensor | None, rows: Tensor | None, columns: Tensor | None
) -> bool:
    """Whether there is a kernel for tensors like these, of just the shapes below: other ones are for PyTorch to expand
    or to refuse."""
    batch, heads, number, depth = query.shape
    length = key.shape[2]
    shared = (1, heads)
    fit = key.shape[::3] == (batch, depth) and key.shape[1] in shared and value.shape[:3] == (batch, heads, length)
    fit = fit and (padding is None or padding.shape == (batch, length))
    tensors = [query, key, value]
    if rows is not None:
        fit = fit and rows.shape[:3] == columns.shape[:3] == (batch, rows.shape[1], number) and rows.shape[1] in shared
        fit = fit and rows.shape[3] * columns.shape[3] == length
        tensors += [rows, columns]
    return fit and kernels.takes(*tensors) and all(0 not in x.shape for x in tensors)


def compiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    dropout: float,
) -> Tensor:
    """Softmax(query key^T / sqrt(D) + prior + mask) value -> (B, N, Q, E), a view of (B, Q, N, E).

    For each query one number is kept for backward beside inputs and output; what is dropped is drawn again.

    Args:
        query: (B, N, Q, D).
        key: (B, N, L, D), or (B, 1, L, D) where all heads share one.
        value: (B, N, L, E).
        mask: (B, L), added to the logits; no gradient.
        rows, columns: the prior, (B, N or 1, Q, H) and (B, N or 1, Q, W).
        dropout: probability that a weight is dropped.
    """
    return _Attention.apply(query, key, value, mask, rows, columns, dropout)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        rows: Tensor | None,
        columns: Tensor | None,
        dropout: float,
    ) -> Tensor:
        query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
        rows, columns = (None if x is None else x.contiguous() for x in (rows, columns))
        batch, heads, number, _ = query.shape
        output = query.new_empty(batch, number, heads, value.shape[3])
        log_sums = query.new_empty(batch, heads, number)
        seed = draw_seed() if dropout else None
        inputs = (query, key, value, rows, columns, mask, seed)
        _call("forward", inputs, dropout, output, log_sums)
        ctx.save_for_backward(*inputs, output, log_sums)
        ctx.dropout = dropout
        return output.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, output, log_sums = ctx.saved_tensors
        query, key, value, rows, columns, _, _ = inputs
        of_query, of_key, of_value = (
            x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in (query, key, value)
        )
        of_rows, of_columns = (
            torch.empty_like(x) if x is not None and any(ctx.needs_input_grad[4:6]) else None for x in (rows, columns)
        )
        given = gradient.transpose(1, 2).contiguous()  # (B, Q, N, E)
        results = (of_query, of_key, of_value, of_rows, of_columns)
        _call("backward", inputs, ctx.dropout, output, log_sums, given, *results)
        return *(x.transpose(1, 2) for x in results[:3]), None, of_rows, of_columns, None


def _call(name: str, inputs: tuple[Tensor | None, ...], dropout: float, *others: Tensor | None) -> None:
    query, key, value, rows, columns, _, _ = inputs
    batch, heads, number, depth = query.shape
    prior = (rows.shape[3], columns.shape[3], rows.shape[1]) if rows is not None else (0, 0, 1)
    sizes = (batch, heads, number, key.shape[2], depth, value.shape[3], key.shape[1], *prior)
    strides = (stride for x in (query, key, value) for stride in x.stride()[:3])
    kernels.call(
        f"attention_{name}",
        query.dtype,
        kernels.integers([*sizes, *strides]),
        torch.get_num_threads(),
        ctypes.c_double(dropout),
        *map(kernels.pointer, (*inputs, *others)),
    )
