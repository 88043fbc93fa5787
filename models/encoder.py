"""Encoder of one feature level: dense self-attention over all positions (DETR, Carion et al., ECCV 2020)."""

from __future__ import annotations

from torch import Tensor, nn

from models.layers import FeatureLevel, FeedForward, copies, xavier_matrices


class DenseEncoderLayer(nn.Module):
    """Self-attention, then a feed-forward branch, each normalised after it joined the residual stream."""

    def __init__(self, *, hidden_dim: int, num_heads: int, feedforward_dim: int, dropout: float):
        super().__init__()
        self.self_attention = nn.MultiheadAttention(hidden_dim, num_heads, dropout=dropout, batch_first=True)
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.feed_forward = FeedForward(hidden_dim=hidden_dim, feedforward_dim=feedforward_dim, dropout=dropout)
        self.norm2 = nn.LayerNorm(hidden_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, position: Tensor, padding: Tensor) -> Tensor:
        """`tokens`, `position` (B, L, C); `padding` (B, L) -> (B, L, C)."""
        where = tokens + position
        attended, _ = self.self_attention(where, where, tokens, key_padding_mask=padding, need_weights=False)
        tokens = self.norm1(tokens + self.dropout(attended))
        return self.norm2(tokens + self.dropout(self.feed_forward(tokens)))


class DenseEncoder(nn.Module):
    """A stack of dense layers over one level. No layer (`num_layers=0`) hands the projected features on."""

    def __init__(self, *, num_layers: int, hidden_dim: int, num_heads: int, feedforward_dim: int, dropout: float):
        super().__init__()
        layer = DenseEncoderLayer(
            hidden_dim=hidden_dim, num_heads=num_heads, feedforward_dim=feedforward_dim, dropout=dropout
        )
        self.layers = copies(layer, num_layers)
        xavier_matrices(self.layers)  # attention biases are 0 by PyTorch's default, the others keep theirs

    def forward(self, levels: list[FeatureLevel]) -> list[FeatureLevel]:
        assert len(levels) == 1, f"a dense encoder takes one level, not {len(levels)}"
        level = levels[0]
        tokens, position, padding = level.tokens, level.position_tokens, level.token_padding
        for layer in self.layers:
            tokens = layer(tokens, position, padding)
        return [level.with_tokens(tokens)]
