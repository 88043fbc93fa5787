"""Where Deformable DETR's queries come from: learned, or (two-stage) made of the encoder's best proposals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from samdetr.models.layers import FeatureLevel


@dataclass
class Queries:
    """What the decoder starts from: `content` and `position` (B, Q, C); `reference` (B, Q, 2 or 4), x, y, or cx, cy, w,
    h, relative to the valid image; `proposals`, the predictions that the queries were chosen from, if they were."""

    content: Tensor
    position: Tensor
    reference: Tensor
    proposals: dict[str, Tensor] | None = None


class LearnedQueries(nn.Module):
    """The same queries for every image; a query's reference point follows from its position embedding.

    Starts with embeddings of N(0, 1) and the reference points' matrix xavier uniform, bias 0, as published.
    """

    def __init__(self, *, num_queries: int, hidden_dim: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(num_queries, 2 * hidden_dim))  # position, then content
        self.reference_points = nn.Linear(hidden_dim, 2)
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)

    def forward(self, levels: list[FeatureLevel]) -> Queries:
        batch = levels[0].features.shape[0]
        position, content = self.embedding.expand(batch, -1, -1).chunk(2, -1)
        # Not detached: every layer's boxes train the position embeddings.
        return Queries(content, position, self.reference_points(position).sigmoid())
