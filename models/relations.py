"""How boxes lie to each other, as a bias of self-attention.

Source: Relation-DETR (Hou et al., ECCV 2024), sections 4.1 and 4.2.

Legend: B batch, Q queries, N heads.
"""

import torch
from torch import Tensor, nn

from samdetr.models.position_encoding import sines

EPS = 1e-5  # added to widths and heights, as published
WIDTH = 16  # channels of the encoding of one number
SCALE = 100.0  # of the numbers in it


def relations(rows: Tensor, columns: Tensor) -> Tensor:
    """`rows` and `columns` (B, Q, 4) as cx, cy, w, h -> (B, Q, Q, 4), of each row's box (x, y, w, h) to each
    column's (x', y', w', h'): log(|x - x'| / w + 1), log(|y - y'| / h + 1), log(w / w'), log(h / h')."""
    row, column = rows[:, :, None], columns[:, None]
    sizes = row[..., 2:] + EPS
    distances = (row[..., :2] - column[..., :2]).abs()
    return torch.cat([(distances / sizes).log1p(), (sizes / (column[..., 2:] + EPS)).log()], -1)


class RelationBias(nn.Module):
    """For every head max(0, a linear function of the encoded relation). Boxes get no gradient."""

    def __init__(self, *, num_heads: int):
        super().__init__()
        self.weights = nn.Linear(4 * WIDTH, num_heads)

    def forward(self, rows: Tensor, columns: Tensor) -> Tensor:
        """What is added to the attention of each row's query to each column's: two layers' boxes (B, Q, 4) of the same
        queries -> (B, N, Q, Q)."""
        with torch.no_grad():
            encoded = sines(relations(rows, columns), width=WIDTH, scale=SCALE).to(self.weights.weight.dtype)
        # Fused attention on GPUs takes masks whose last axis is contiguous.
        return self.weights(encoded).relu().permute(0, 3, 1, 2).contiguous()
