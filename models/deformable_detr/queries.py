"""Queries of Deformable DETR (ICLR 2021): learned, or (two-stage) the best of the boxes that the encoder's positions
propose."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from samdetr.models.feature_levels import FeatureLevel, cell_centres, join_levels
from samdetr.models.position_encoding import sine_encoding

FINEST_SIDE = 0.05  # of the boxes that positions of the finest level start from; twice as long on every next level
BORDER = 0.01  # an initial box with a coordinate nearer than this to 0 or 1 is not used


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


class ProposedQueries(nn.Module):
    """The `num_queries` proposals with the largest logit of class 0, which means "any object" here; all if there are
    fewer.

    Queries follow from the detached boxes alone: position and content are projected from their sine encoding. The
    layers that make proposals learn from the loss on the proposals alone.

    Args:
        class_head, box_head: of the proposals, (B, L, hidden_dim) -> (B, L, classes) and (B, L, 4).
    """

    def __init__(self, *, num_queries: int, hidden_dim: int, class_head: nn.Module, box_head: nn.Module):
        super().__init__()
        self.num_queries = num_queries
        self.memory_projection = nn.Linear(hidden_dim, hidden_dim)
        self.memory_norm = nn.LayerNorm(hidden_dim)
        self.class_head, self.box_head = class_head, box_head
        self.box_projection = nn.Linear(2 * hidden_dim, 2 * hidden_dim)
        self.box_norm = nn.LayerNorm(2 * hidden_dim)
        for linear in (self.memory_projection, self.box_projection):
            nn.init.xavier_uniform_(linear.weight)  # biases stay PyTorch's

    def forward(self, levels: list[FeatureLevel]) -> Queries:
        tokens = join_levels(levels).tokens
        initial, usable = initial_boxes(levels)
        memory = self.memory_norm(self.memory_projection(tokens.masked_fill(~usable[..., None], 0)))
        logits = self.class_head(memory)
        # Positions that are not usable stay candidates, as in the reference: with logits of infinity, whose sigmoid has
        # the gradient 0, they propose the box 1, 1, 1, 1.
        boxes = (self.box_head(memory) + initial.to(memory.dtype)).sigmoid()
        best = logits[..., 0].topk(min(self.num_queries, logits.shape[1]), dim=1).indices  # (B, Q)
        reference = boxes.gather(1, best[..., None].expand(-1, -1, 4)).detach()
        encoded = encode_boxes(reference, num_channels=memory.shape[-1]).to(memory.dtype)
        position, content = self.embed(encoded)
        return Queries(content, position, reference, proposals={"pred_logits": logits, "pred_boxes": boxes})

    def embed(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """Position and content (B, Q, C) of queries at boxes, `encode_boxes` (B, Q, 2 C)."""
        position, content = self.box_norm(self.box_projection(encoded)).chunk(2, -1)
        return position, content


def encode_boxes(boxes: Tensor, *, num_channels: int) -> Tensor:
    """(..., 4) -> (..., 2 C): cx, cy, w, h in this order, half the model's width for each."""
    pairs = boxes.unflatten(-1, (2, 2)).flip(-1)  # the encoding swaps the two numbers of a point
    return sine_encoding(pairs, num_channels=num_channels).flatten(-2)


def initial_boxes(levels: list[FeatureLevel]) -> tuple[Tensor, Tensor]:
    """The boxes of positions before the box head moves them: logits of cx, cy, w, h (B, L, 4), infinite if not usable,
    and whether they are usable (B, L). In float32, as published."""
    places, paddings = [], []
    for index, level in enumerate(levels):
        valid = ~level.padding
        cells = torch.stack([valid[:, 0].sum(1), valid[:, :, 0].sum(1)], -1)  # (B, 2), columns and rows of the image
        height, width = valid.shape[1:]
        centres = cell_centres(height, width, valid.device, torch.float32) / cells[:, None, None]
        sides = torch.full_like(centres, FINEST_SIDE * 2**index)
        places.append(torch.cat([centres, sides], -1).flatten(1, 2))
        paddings.append(level.token_padding)
    boxes, padding = torch.cat(places, 1), torch.cat(paddings, 1)
    usable = ~padding & ((boxes > BORDER) & (boxes < 1 - BORDER)).all(-1)
    logits = (boxes / (1 - boxes)).log()
    return logits.masked_fill(~usable[..., None], torch.inf), usable
