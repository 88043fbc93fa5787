"""The Semantics Aligner (SAM-DETR, CVPR 2022): new queries, resampled from the features they will be matched with.

It precedes the cross-attention of any DETR-like decoder layer. For each query it pools the encoded features inside the
query's reference box, predicts salient points there, and returns the features and the sine positions at these points as
the query's new content and position, re-weighted by gates computed from the old query.
Legend: B batch, Q queries, P points (one for each head, or one for all), N heads, C channels, H x W the map.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from samdetr.models.mlp import MLP
from samdetr.models.ops.roi_sampling import roi_sampling
from samdetr.models.ops.roi_sampling.plain import bilinear_weights, sample
from samdetr.models.position_encoding import in_cells, sine_encoding

ROI_SIZE = 7


@dataclass
class AlignedQueries:
    """`content` and `position` (B, Q, N, C), or (B, Q, 1, C) if all heads share them; `points` (B, Q, P, 2), x, y
    relative to the valid image; `scales` (B, Q, P, 2), inverse widths of the spatial prior, or None."""

    content: Tensor
    position: Tensor
    points: Tensor
    scales: Tensor | None


class SemanticsAligner(nn.Module):
    """Resample queries from encoded features.

    Its weights start at PyTorch's defaults; SAMDecoder applies the published xavier initialisation.

    Args:
        hidden_dim: C, width of queries and features.
        num_heads: N, heads of the cross-attention that follows.
        resample: "points" - salient points, the paper's choice; "average" or "maximum" over the box (its ablations).
        num_points: salient points per query: one for each head (default), or 1 for all.
        reweight: whether the old queries gate the new ones, per head.
        search_range: "box" confines salient points to the reference box; "image" lets them go anywhere.
        predict_scales: also predict the widths of the spatial prior (SMCA).

    Raises:
        ValueError: widths or options that do not go together.
    """

    def __init__(
        self,
        *,
        hidden_dim: int,
        num_heads: int,
        resample: str = "points",
        num_points: int | None = None,
        reweight: bool = True,
        search_range: str = "box",
        predict_scales: bool = False,
    ):
        super().__init__()
        num_points = num_heads if num_points is None else num_points
        if resample not in ("points", "average", "maximum"):
            raise ValueError(f"resample must be points, average or maximum, not {resample!r}")
        if search_range not in ("box", "image"):
            raise ValueError(f"search_range must be box or image, not {search_range!r}")
        if num_points not in (1, num_heads):
            raise ValueError(f"there must be 1 salient point, or one for each of {num_heads} heads, not {num_points}")
        if predict_scales and resample != "points":
            raise ValueError(f"the spatial prior needs salient points; with resample={resample!r} there are none")
        if hidden_dim % 4:
            raise ValueError(f"hidden_dim must be a multiple of 4, not {hidden_dim}")
        self.num_heads, self.num_points = num_heads, num_points
        self.resample, self.search_range = resample, search_range
        if resample == "points":
            narrow = hidden_dim // 4
            self.reduce = nn.Conv2d(hidden_dim, narrow, 1)
            outputs = num_points * (4 if predict_scales else 2)
            self.point_head = MLP(narrow * ROI_SIZE**2, hidden_dim, 2 * hidden_dim, 2 * hidden_dim, outputs)
            nn.init.zeros_([*self.point_head.parameters()][-1])  # its last bias
        if reweight:
            self.content_gate = nn.Linear(hidden_dim, num_heads * hidden_dim)
            self.position_gate = nn.Linear(hidden_dim, num_heads * hidden_dim)
        self.reweight = reweight

    def forward(
        self, queries: Tensor, boxes: Tensor, features: Tensor, valid_ratio: Tensor | None = None
    ) -> AlignedQueries:
        """
        Args:
            queries: (B, Q, C), the old queries.
            boxes: (B, Q, 4), their reference boxes as cx, cy, w, h in [0, 1] relative to the valid image.
            features: (B, C, H, W), encoded features.
            valid_ratio: (B, 2), share of the map's width and height that is image; None if nothing is padded.
        """
        height, width = features.shape[2:]
        if valid_ratio is None:
            valid_ratio = boxes.new_ones(boxes.shape[0], 2)
        centres, sizes = boxes[..., :2], boxes[..., 2:]
        extent = in_cells(valid_ratio[:, None], height=height, width=width)  # (B, 1, 2), of the image
        corners = torch.cat([centres - sizes / 2, centres + sizes / 2], -1) * extent.repeat(1, 1, 2)  # (B, Q, 4)
        cells = features.permute(0, 2, 3, 1)  # (B, H, W, C)
        scales = None
        if self.resample == "points":
            bins = roi_sampling(self._narrow(cells), corners, bins=ROI_SIZE)  # (B, Q, 7, 7, C / 4)
            offsets, scales = self._find_points(bins)  # (B, Q, P, 2) in [-1, 1]
            if self.search_range == "box":
                points = centres[:, :, None] + offsets * sizes[:, :, None] / 2
                content = roi_sampling(cells, corners, offsets, bins=ROI_SIZE)
            else:
                points = (offsets + 1) / 2
                in_map = points * extent[:, :, None] - 0.5
                columns = bilinear_weights(in_map[..., 0].clamp(0, width - 1), width)  # (B, Q, P, W)
                rows = bilinear_weights(in_map[..., 1].clamp(0, height - 1), height)  # (B, Q, P, H)
                content = sample(cells, rows, columns)
        else:
            points = centres[:, :, None]  # (B, Q, 1, 2)
            bins = roi_sampling(cells, corners, bins=ROI_SIZE).flatten(2, 3)  # (B, Q, 49, C)
            content = (bins.mean(2) if self.resample == "average" else bins.amax(2))[:, :, None]  # (B, Q, 1, C)

        # Without gradient, as in the reference: the point head learns through the sampled content (and the prior) only.
        position = sine_encoding(points.detach(), num_channels=content.shape[-1]).to(content.dtype)
        if self.reweight:
            content = content * self.content_gate(queries).unflatten(-1, (self.num_heads, -1)).sigmoid()
            position = position * self.position_gate(queries).unflatten(-1, (self.num_heads, -1)).sigmoid()
        return AlignedQueries(content, position, points, scales)

    def _narrow(self, x: Tensor) -> Tensor:
        """The 1 x 1 convolution, (..., C) -> (..., C / 4). Its bias is added after the pooling, because the
        weights of a bin across the border do not sum to 1."""
        return nn.functional.linear(x, self.reduce.weight.flatten(1))

    def _find_points(self, narrow: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pooled channels (B, Q, 7, 7, C / 4) -> offsets in [-1, 1] and any scales of the points, (B, Q, P, 2) each."""
        assert self.reduce.bias is not None
        narrow = (narrow + self.reduce.bias).relu().movedim(-1, 2)  # published weights take channels first
        found = self.point_head(narrow.flatten(2)).unflatten(-1, (-1, self.num_points, 2))
        offsets = found[:, :, 0].tanh()
        return offsets, found[:, :, 1] if found.shape[2] == 2 else None
