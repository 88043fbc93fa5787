"""Two-stage queries (Deformable DETR, ICLR 2021): every position of the encoder proposes a box, and the best become
queries."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from samdetr.models.deformable_detr.queries import Queries
from samdetr.models.layers import FeatureLevel, join_levels
from samdetr.models.position_encoding import sine_encoding

FINEST_SIDE = 0.05  # of the boxes that positions of the finest level start from; twice as long on every next level
BORDER = 0.01  # an initial box with a coordinate nearer than this to 0 or 1 is none


class ProposedQueries(nn.Module):
    """The `num_queries` proposals with the largest logit of class 0, which stands for "any object" here; all of them
    where there are fewer.

    Only boxes, cut from the graph, make queries: position and content follow from their sine encoding. What turns the
    encoder's output into proposals learns from the loss on the proposals alone.

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
        tokens, _, _ = join_levels(levels)
        initial, usable = initial_boxes(levels)
        memory = self.memory_norm(self.memory_projection(tokens.masked_fill(~usable[..., None], 0)))
        logits = self.class_head(memory)
        # Positions that are not usable stay candidates, as in the reference: with logits of infinity, whose sigmoid has
        # the gradient 0, they propose the box 1, 1, 1, 1.
        boxes = (self.box_head(memory) + initial.to(memory.dtype)).sigmoid()
        best = logits[..., 0].topk(min(self.num_queries, logits.shape[1]), dim=1).indices  # (B, Q)
        reference = boxes.gather(1, best[..., None].expand(-1, -1, 4)).detach()
        # cx, cy, w, h in this order, half the model's width for each; the encoding swaps the two numbers of a point.
        pairs = reference.unflatten(-1, (2, 2)).flip(-1)
        encoded = sine_encoding(pairs, num_channels=memory.shape[-1]).flatten(-2).to(memory.dtype)  # (B, Q, 2 C)
        position, content = self.box_norm(self.box_projection(encoded)).chunk(2, -1)
        return Queries(content, position, reference, proposals={"pred_logits": logits, "pred_boxes": boxes})


def initial_boxes(levels: list[FeatureLevel]) -> tuple[Tensor, Tensor]:
    """What positions propose before the box head moves it: logits of cx, cy, w, h (B, L, 4), infinite where not usable,
    and whether they are usable (B, L). In float32, as published."""
    places, paddings = [], []
    for index, level in enumerate(levels):
        valid = ~level.padding
        cells = torch.stack([valid[:, 0].sum(1), valid[:, :, 0].sum(1)], -1)  # (B, 2), columns and rows of the image
        height, width = valid.shape[1:]
        x, y = (torch.arange(n, dtype=torch.float32, device=valid.device) + 0.5 for n in (width, height))
        centres = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1) / cells[:, None, None]
        sides = torch.full_like(centres, FINEST_SIDE * 2**index)
        places.append(torch.cat([centres, sides], -1).flatten(1, 2))
        paddings.append(level.token_padding)
    boxes, padding = torch.cat(places, 1), torch.cat(paddings, 1)
    usable = ~padding & ((boxes > BORDER) & (boxes < 1 - BORDER)).all(-1)
    logits = (boxes / (1 - boxes)).log()
    return logits.masked_fill(~usable[..., None], torch.inf), usable
