"""Attention with a separable prior in plain PyTorch: F.scaled_dot_product_attention, fused on GPUs.

A fused kernel stores no logits, but it knows no prior: as a mask, the prior would be a tensor of the logits' size, with
a gradient of that size. Written as further channels it is an inner product: of the prior of all rows and columns, on
the query's side, with 1 at the key's row and column and 0 elsewhere, on the key's. This is exact in every dtype. (A
Gaussian alone would need four channels, but these have large terms that cancel: useless in 16 bits.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from samdetr.models.ops.exporting import exporting

# Before the content's logits are added. In 16 bits, numbers must stay finite: infinity times 0 is not a number.
LEAST_LOGIT = -1e4


def plain_prior_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    dropout: float,
) -> Tensor:
    """Arguments as of prior_attention, `rows` and `columns` being its prior."""
    heads = query.shape[1]
    query = query * query.shape[-1] ** -0.5
    if exporting():
        return _written_out(query, key, value, padding, rows, columns)
    if rows is not None and columns is not None:
        query, key = _with_prior(query, key, rows, columns)
    key = key.expand(-1, heads, -1, -1)
    mask = None if padding is None else ~padding[:, None, None]  # (B, 1, 1, L), True where attended
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=1.0)


def _written_out(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, rows: Tensor | None, columns: Tensor | None
) -> Tensor:
    """For engines, which write it out anyway: with the prior as a sum, and without copies of a shared key."""
    if key.shape[1] == 1:
        logits = (query.flatten(1, 2) @ key[:, 0].mT).unflatten(1, query.shape[1:3])
    else:
        logits = query @ key.mT  # (B, N, Q, L)
    if rows is not None and columns is not None:
        logits = logits + (rows[..., :, None] + columns[..., None, :]).flatten(-2)
    if padding is not None:
        logits = logits.masked_fill(padding[:, None, None], -torch.inf)
    return logits.softmax(-1) @ value


def _with_prior(query: Tensor, key: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The query with the channels [query, rows, columns], the key with [key, its row, its column]."""
    height, width = rows.shape[-1], columns.shape[-1]
    # What is the same for all keys does not count: with a largest value of 0 none that matters is rounded much.
    logits = [(x - x.detach().amax(-1, keepdim=True)).clamp(min=LEAST_LOGIT) for x in (rows, columns)]
    prior = torch.cat(logits, -1).to(query.dtype).expand(-1, query.shape[1], -1, -1)  # (B, N, Q, H + W)
    row = torch.eye(height, dtype=key.dtype, device=key.device)[:, None].expand(-1, width, -1)  # (H, W, H)
    column = torch.eye(width, dtype=key.dtype, device=key.device)[None].expand(height, -1, -1)  # (H, W, W)
    place = torch.cat([row, column], -1).flatten(0, 1).expand(*key.shape[:2], -1, -1)  # (B, N or 1, L, H + W)
    to_multiple = (0, -(query.shape[-1] + height + width) % 8)  # fused kernels want multiples of 8 channels
    return F.pad(torch.cat([query, prior], -1), to_multiple), F.pad(torch.cat([key, place], -1), to_multiple)
