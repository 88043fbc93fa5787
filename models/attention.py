"""Multi-head attention on queries, keys and values that are already projected.

Kept apart from the projections because the decoders of this family differ in nothing else: SAM-DETR's keys are as
wide as the model for every head (and one key serves all heads), its values are not; SMCA adds a prior to the logits.
Legend: B batch, N heads, Q queries, L positions attended, D width of a query and key, E width of a value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from samdetr.models.dropout import dropout as dropped
from samdetr.models.ops.attention import compiled_attention, runs_compiled
from samdetr.models.spatial_prior import SeparablePrior


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, L, N * D) -> (B, N, L, D)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, N, L, D) -> (B, L, N * D)."""
    return x.transpose(1, 2).flatten(2)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    padding: Tensor | None = None,
    prior: SeparablePrior | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax(query key^T / sqrt(D) + prior) value -> (B, N, Q, E).

    Args:
        query: (B, N, Q, D).
        key: (B, N, L, D), or (B, 1, L, D) where all heads share one key. A shared key is never expanded: the heads
            join the queries in one matrix product.
        value: (B, N, L, E).
        padding: (B, L), True at positions that no query may attend.
        prior: added to the scaled logits, L being H * W; its rows (B, N or 1, Q, H), its columns (B, N or 1, Q, W).
        dropout: probability that an attention weight is dropped.
    """
    rows, columns = prior or (None, None)
    if runs_compiled(query, key, value, padding=padding, rows=rows, columns=columns):
        mask = None if padding is None else query.new_zeros(padding.shape).masked_fill_(padding, -torch.inf)
        return compiled_attention(query, key, value, mask=mask, rows=rows, columns=columns, dropout=dropout)
    query = query * query.shape[-1] ** -0.5
    if key.shape[1] == 1:
        logits = (query.flatten(1, 2) @ key[:, 0].mT).unflatten(1, query.shape[1:3])  # (B, N, Q, L)
    else:
        logits = query @ key.mT
    if prior is not None:
        logits = logits + prior.dense()
    if padding is not None:
        logits = logits.masked_fill(padding[:, None, None, :], -torch.inf)
    weights = dropped(logits.softmax(-1), dropout, training=True)  # of 0 is nothing
    return weights @ value
