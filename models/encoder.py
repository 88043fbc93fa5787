"""Encoders: dense self-attention over one feature level (DETR, Carion et al., ECCV 2020), and deformable attention over
any number of levels (Deformable DETR, Zhu et al., ICLR 2021)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samdetr.models.attention import merge_heads, split_heads
from samdetr.models.feature_levels import FeatureLevel, JoinedLevels, cell_centres, join_levels, valid_ratio
from samdetr.models.layers import FeedForward, LayerSizes, copies, xavier_matrices
from samdetr.models.mlp import MLP
from samdetr.models.ops.module import MSDeformAttn
from samdetr.models.ops.ms_deform_attn.plain import coordinate_dtype
from samdetr.models.ops.prior_attention import prior_attention
from samdetr.models.position_encoding import in_cells


class DenseEncoderLayer(nn.Module):
    """Self-attention, then a feed-forward branch; post-norm.

    Args:
        scale_position: whether the position encoding is multiplied by a function of the tokens (DAB-DETR, Liu et al.,
            ICLR 2022).
    """

    def __init__(self, sizes: LayerSizes, *, scale_position: bool = False):
        super().__init__()
        width = sizes.hidden_dim
        self.self_attention = nn.MultiheadAttention(width, sizes.num_heads, dropout=sizes.dropout, batch_first=True)
        self.norm1 = nn.LayerNorm(width)
        self.feed_forward = FeedForward(sizes)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(sizes.dropout)
        self.position_scale = MLP(width, width, width) if scale_position else None

    def forward(self, tokens: Tensor, position: Tensor, padding: Tensor) -> Tensor:
        """`tokens`, `position` (B, L, C); `padding` (B, L) -> (B, L, C)."""
        if self.position_scale is not None:
            position = position * self.position_scale(tokens)
        where = tokens + position
        tokens = self.norm1(tokens + self.dropout(self._attend(where, tokens, padding)))
        return self.feed_forward.added_to(tokens, norm=self.norm2, dropout=self.dropout)

    def _attend(self, where: Tensor, tokens: Tensor, padding: Tensor) -> Tensor:
        """nn.MultiheadAttention's forward by the operator, which does not store the weights of all pairs."""
        attention = self.self_attention
        weight, bias, width = attention.in_proj_weight, attention.in_proj_bias, attention.embed_dim
        query, key = F.linear(where, weight[: 2 * width], bias[: 2 * width]).chunk(2, -1)
        parts = query, key, F.linear(tokens, weight[2 * width :], bias[2 * width :])
        query, key, value = (split_heads(part, attention.num_heads) for part in parts)
        dropout = attention.dropout if self.training else 0.0
        attended = prior_attention(query, key, value, padding=padding, dropout=dropout)
        return attention.out_proj(merge_heads(attended))


class DenseEncoder(nn.Module):
    """A stack of dense layers over one level. Without layers (`num_layers=0`) it returns the projected features."""

    def __init__(self, sizes: LayerSizes, *, num_layers: int, scale_position: bool = False):
        super().__init__()
        self.layers = copies(DenseEncoderLayer(sizes, scale_position=scale_position), num_layers)
        xavier_matrices(self.layers)  # attention biases are 0 by PyTorch's default, the others keep theirs

    def forward(self, levels: list[FeatureLevel]) -> list[FeatureLevel]:
        assert len(levels) == 1, f"a dense encoder takes one level, not {len(levels)}"
        level = levels[0]
        tokens, position, padding = level.tokens, level.position_tokens, level.token_padding
        for layer in self.layers:
            tokens = layer(tokens, position, padding)
        return [level.with_tokens(tokens)]


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention over all levels, then a feed-forward branch; post-norm."""

    def __init__(self, sizes: LayerSizes, *, num_levels: int, num_points: int):
        super().__init__()
        self.self_attention = MSDeformAttn(
            hidden_dim=sizes.hidden_dim, num_levels=num_levels, num_heads=sizes.num_heads, num_points=num_points
        )
        self.norm1 = nn.LayerNorm(sizes.hidden_dim)
        self.feed_forward = FeedForward(sizes)
        self.norm2 = nn.LayerNorm(sizes.hidden_dim)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(self, joined: JoinedLevels, tokens: Tensor, position: Tensor, reference: Tensor) -> Tensor:
        """`tokens`, those of `joined` after the layers before, and `position` (B, L, C); `reference` (B, L, levels, 2)
        -> (B, L, C)."""
        attended = self.self_attention(tokens + position, reference, tokens, joined.shapes, joined.padding)
        tokens = self.norm1(tokens + self.dropout(attended))
        return self.feed_forward.added_to(tokens, norm=self.norm2, dropout=self.dropout)


class DeformableEncoder(nn.Module):
    """A stack of deformable layers over several levels. Each position samples around its own place in every level."""

    def __init__(self, sizes: LayerSizes, *, num_layers: int, num_levels: int, num_points: int = 4):
        super().__init__()
        layer = DeformableEncoderLayer(sizes, num_levels=num_levels, num_points=num_points)
        self.layers = copies(layer, num_layers)
        for each in self.layers:  # as published, matrices are drawn for each layer anew, biases start as copies
            xavier_matrices(each.feed_forward)
            each.self_attention.reset_parameters()

    def forward(self, levels: list[FeatureLevel]) -> list[FeatureLevel]:
        joined = join_levels(levels)
        position = torch.cat([level.position_tokens for level in levels], 1)  # (B, L, C)
        reference = reference_points(levels)
        tokens = joined.tokens
        for layer in self.layers:
            tokens = layer(joined, tokens, position, reference)
        parts = tokens.split([height * width for height, width in joined.shapes], 1)
        return [level.with_tokens(part) for level, part in zip(levels, parts)]


def reference_points(levels: list[FeatureLevel]) -> Tensor:
    """The place of each position of each level in every level's padded map: (B, L, levels, 2), x and y in [0, 1]."""
    ratios = torch.stack([valid_ratio(level.padding) for level in levels], 1)  # (B, levels, 2), float32 as published
    points = []
    for ratio, level in zip(ratios.unbind(1), levels):
        height, width = level.features.shape[2:]
        valid = in_cells(ratio, height=height, width=width)[:, None, None]  # (B, 1, 1, 2)
        points.append((cell_centres(height, width, valid.device) / valid).flatten(1, 2))  # (B, H * W, 2)
    return (torch.cat(points, 1)[:, :, None] * ratios[:, None]).to(coordinate_dtype(levels[0].features))
