"""Side-directed Gaussian (SAP-DETR): each head attends around a point between the salient point and the box's sides."""

import torch
from torch import Tensor, nn

from samdetr.models.mlp import MLP
from samdetr.models.position_encoding import in_cells
from samdetr.models.spatial_prior import SeparablePrior, gaussian_log_prior


class SideDirectedGaussian(nn.Module):
    """Predicts the centre and the widths of each head's Gaussian.

    `head` gives 4 numbers for each of N heads: first N x (x, y), shares of the way to a side - left and top if
    negative, right and bottom if positive - then N x (x, y) inverse widths, not squashed.
    """

    def __init__(self, *, hidden_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.head = MLP(hidden_dim, hidden_dim, hidden_dim, 4 * num_heads)

    def forward(self, queries: Tensor, points: Tensor, distances: Tensor, *, height: int, width: int) -> SeparablePrior:
        """
        Args:
            queries: (B, Q, C).
            points: (B, Q, 2), salient points.
            distances: (B, Q, 4), left, top, right, bottom.
            height, width: of the map. Points are relative to all of it, padding included, as published.
        Returns:
            To add to attention logits: rows (B, N, Q, height) and columns (B, N, Q, width).
        """
        shares, scales = self.head(queries).unflatten(-1, (2, self.num_heads, 2)).unbind(-3)  # (B, Q, N, 2) each
        shares = shares.tanh()
        to_side = torch.where(shares > 0, distances[..., None, 2:], distances[..., None, :2])
        centres = in_cells(points[..., None, :] + shares * to_side, height=height, width=width)  # (B, Q, N, 2)
        return gaussian_log_prior(centres, scales, height=height, width=width).transpose(1, 2)
