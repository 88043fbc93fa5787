"""Multi-head attention on queries, keys and values that are already projected.

Kept apart from the projections because the decoders of this family differ in nothing else: SAM-DETR's keys are as
wide as the model for every head (and one key serves all heads), its values are not; SMCA adds a prior to the logits.
Legend: B batch, N heads, Q queries, L positions attended, D width of a query and key, E width of a value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.dropout import can_draw, draw_kept, kept_scale
from models.dropout import dropout as dropped
from models.spatial_prior import SeparablePrior

# Logits that a CPU works on at once, 4 MiB of float32: they stay in its caches from the product with the keys to the
# product with the values. 300 queries, 8 heads and a map of 80 x 108 have 20 times as many, and took 3.5 times as long
# in one piece.
TILE = 2**20


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
    query = query * query.shape[-1] ** -0.5
    large = query.shape[:3].numel() * key.shape[2] > TILE
    if large and in_full_precision_on_cpu(query, key, value) and (dropout == 0 or can_draw(dropout)):
        rows, columns = prior if prior is not None else (None, None)
        return TiledAttention.apply(query, key, value, padding, rows, columns, dropout)
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


def in_full_precision_on_cpu(*tensors: Tensor) -> bool:
    """Where work in tiles pays. What is compiled is left in one piece, since tiles differ with the size of the map."""
    if tensors[0].device.type != "cpu" or torch.compiler.is_compiling():
        return False
    dtypes = {x.dtype for x in tensors}
    return len(dtypes) == 1 and dtypes <= {torch.float32, torch.float64} and not torch.is_autocast_enabled("cpu")


class TiledAttention(torch.autograd.Function):
    """The same, some queries of one head at a time, their logits computed anew in backward (FlashAttention, Dao et al.,
    NeurIPS 2022, without its running softmax: a tile has all positions).

    For each logit a byte is kept, where weights are dropped, else nothing; the plain formula keeps three numbers.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Tensor | None,
        rows: Tensor | None,
        columns: Tensor | None,
        dropout: float,
    ) -> Tensor:
        batch, heads, number = query.shape[:3]
        output = query.new_empty(batch, heads, number, value.shape[3])
        kept = torch.empty(batch, heads, number, key.shape[2], dtype=torch.int8) if dropout else None
        masked = _masked(padding, query)
        for one in _tiles(query, key):
            weights = _weights(query, key, masked, rows, columns, one)  # (q, L)
            if kept is not None:
                kept[one] = draw_kept(weights.shape, dropout)
                weights.mul_(kept[one].to(weights.dtype))
            torch.mm(weights, value[one[:2]], out=output[one])
        if kept is not None:
            output *= kept_scale(dropout)
        ctx.save_for_backward(query, key, value, masked, rows, columns, kept)
        ctx.dropout = dropout
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, masked, rows, columns, kept = ctx.saved_tensors
        if kept is not None:
            gradient = gradient * kept_scale(ctx.dropout)
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        of_rows = of_columns = None
        if rows is not None:
            of_rows, of_columns = torch.zeros_like(rows), torch.zeros_like(columns)
        for one in _tiles(query, key):
            image_head, shared = one[:2], _within(one, key)[:2]
            weights = used = _weights(query, key, masked, rows, columns, one)  # (q, L)
            of_weights = gradient[one] @ value[image_head].mT
            if kept is not None:
                kept_here = kept[one].to(weights.dtype)
                of_weights.mul_(kept_here)
                used = kept_here.mul_(weights)
            of_value[image_head].addmm_(used.mT, gradient[one])
            of_logits = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            of_query[one] = of_logits @ key[shared]
            of_key[shared].addmm_(of_logits.mT, query[one])
            if rows is not None:
                on_map = of_logits.unflatten(1, (rows.shape[3], -1))  # (q, H, W)
                of_rows[_within(one, rows)] += on_map.sum(2)
                of_columns[_within(one, columns)] += on_map.sum(1)
        return of_query, of_key, of_value, None, of_rows, of_columns, None


Tile = tuple[int, int, slice]  # an image, a head, some queries


def _tiles(query: Tensor, key: Tensor) -> list[Tile]:
    batch, heads, number = query.shape[:3]
    size = max(1, TILE // key.shape[2])
    starts = range(0, number, size)
    return [(b, n, slice(q, q + size)) for b in range(batch) for n in range(heads) for q in starts]


def _within(tile: Tile, x: Tensor) -> Tile:
    """The tile in a tensor that all heads may share."""
    image, head, queries = tile
    return image, head if x.shape[1] > 1 else 0, queries


def _masked(padding: Tensor | None, like: Tensor) -> Tensor | None:
    """-inf where padded, else 0: (B, L). To add that is six times as fast as to fill where a mask is True."""
    if padding is None:
        return None
    return like.new_zeros(padding.shape).masked_fill_(padding, -torch.inf)


def _weights(
    query: Tensor, key: Tensor, masked: Tensor | None, rows: Tensor | None, columns: Tensor | None, tile: Tile
) -> Tensor:
    """Softmax of a tile's logits, (q, L)."""
    keys = key[_within(tile, key)[:2]].mT  # (D, L)
    if rows is None:
        logits = query[tile] @ keys
    else:
        logits = SeparablePrior(rows[_within(tile, rows)], columns[_within(tile, columns)]).dense()
        logits.addmm_(query[tile], keys)
    if masked is not None:
        logits += masked[tile[0]]
    return logits.softmax(-1)
