"""Attention by heads. Legend: B batch, N heads, L positions, Q queries, C channels, D channels of a head."""

from collections.abc import Callable, Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samdetr.models.feature_levels import FeatureLevel
from samdetr.models.layers import LayerSizes
from samdetr.models.ops.prior_attention import prior_attention
from samdetr.models.spatial_prior import SeparablePrior


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, L, N * D) -> (B, N, L, D)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, N, L, D) -> (B, L, N * D)."""
    return x.transpose(1, 2).flatten(2)


def masked(hidden: Tensor | None, bias: Tensor | None) -> Tensor:
    """`hidden` (Q, Q) and `bias` (B, N, Q, Q) in one mask: of bool, True where a query may attend, if there is no bias;
    else the bias, -inf where it may not."""
    if bias is None:
        assert hidden is not None
        return ~hidden
    return bias if hidden is None else bias.masked_fill(hidden, -torch.inf)


class SelfAttention(nn.Module):
    """Attention among the queries. Their content and each of their positions have separate projections.

    Args:
        positions: names of the positions; projections are called query_NAME and key_NAME.
    """

    value: nn.Linear
    output: nn.Linear

    def __init__(self, sizes: LayerSizes, *, positions: Sequence[str] = ("position",)):
        super().__init__()
        self.num_heads, self.dropout, self.parts = sizes.num_heads, sizes.dropout, ("content", *positions)
        projections = [f"{role}_{part}" for role in ("query", "key") for part in self.parts]
        for name in (*projections, "value", "output"):
            self.add_module(name, nn.Linear(sizes.hidden_dim, sizes.hidden_dim))

    def project(self, role: str, *parts: Tensor) -> Tensor:
        """The "query" or "key" of content and positions (B, Q, C) -> (B, N, Q, D)."""
        projected = [getattr(self, f"{role}_{name}")(part) for name, part in zip(self.parts, parts)]
        return split_heads(reduce(torch.add, projected), self.num_heads)

    def forward(
        self, content: Tensor, *positions: Tensor, hidden: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """`content` and each of `positions` (B, Q, C) -> (B, Q, C). `hidden` (Q, Q) of bool: which query, row, does not
        attend to which, column; None: each attends to all. `bias` (B, N, Q, Q) is added to the logits."""
        query, key = (self.project(role, content, *positions) for role in ("query", "key"))
        value = split_heads(self.value(content), self.num_heads)
        dropout = self.dropout if self.training else 0.0
        if hidden is None and bias is None:
            attended = prior_attention(query, key, value, dropout=dropout)
        else:
            mask = masked(hidden, None if bias is None else bias.to(query.dtype))
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
            # Its layout depends on the device; a traced graph would expect that of the tracing.
            attended = attended.clone(memory_format=torch.contiguous_format)
        return self.output(merge_heads(attended))


class LevelAttention(nn.Module):
    """Attention of queries to all cells of a feature level. Subclasses make queries and keys: `compare`, which takes
    what their `forward` does except for the prior."""

    value: nn.Linear
    output: nn.Linear
    compare: Callable[..., tuple[Tensor, Tensor]]

    def __init__(self, sizes: LayerSizes):
        super().__init__()
        self.num_heads, self.dropout = sizes.num_heads, sizes.dropout

    def attend(self, query: Tensor, key: Tensor, level: FeatureLevel, prior: SeparablePrior | None) -> Tensor:
        """`query` (B, N, Q, D), `key` (B, N or 1, L, D); `prior` rows (B, N or 1, Q, H), columns (B, N or 1, Q, W) ->
        (B, Q, C)."""
        value = split_heads(self.value(level.tokens), self.num_heads)
        dropout = self.dropout if self.training else 0.0
        attended = prior_attention(query, key, value, padding=level.token_padding, prior=prior, dropout=dropout)
        return self.output(merge_heads(attended))
