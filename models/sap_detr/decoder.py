"""SAP-DETR's decoder (Liu et al., CVPR 2023): a query is a salient point with its distances to the sides of a box.

Legend: B batch, Q queries, N heads, C channels, L positions of the level, H x W its size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samdetr.models.attention import LevelAttention, SelfAttention, split_heads
from samdetr.models.feature_levels import FeatureLevel
from samdetr.models.layers import FeedForward, GroupNorm, LayerSizes, copies, start_heads, xavier_matrices
from samdetr.models.mlp import MLP
from samdetr.models.position_encoding import sine_encoding
from samdetr.models.sap_detr.points import (
    PUBLISHED_QUERIES,
    boxes_around,
    corners_around,
    grid_cell,
    grid_logits,
    move_points,
    move_sides,
)
from samdetr.models.sap_detr.side_directed_gaussian import SideDirectedGaussian
from samdetr.models.spatial_prior import SeparablePrior

TEMPERATURE = 20.0  # of every position encoding


@dataclass
class QueryPositions:
    """Positions of the queries, in every form that a layer needs.

    `points` (B, Q, 2) and `distances` (B, Q, 4), relative to the map with its padding. Sine encodings of the point,
    `point_sine` (B, Q, C), and of the box's corners, `box_sine` (B, Q, 2 C), to compare with those of the map. An MLP
    each maps the encodings to `point` and `box` (B, Q, C), to add to the content.
    """

    points: Tensor
    distances: Tensor
    point_sine: Tensor
    box_sine: Tensor
    point: Tensor
    box: Tensor


class CrossAttention(LevelAttention):
    """Attention of queries to the level. Each head compares three parts: content with content, the query's point with
    the cell's position, and the query's box with it.

    `content_positions` also adds point and box to the content, in the first layer alone, whose queries are still equal.
    """

    def __init__(self, sizes: LayerSizes):
        super().__init__(sizes)
        width = sizes.hidden_dim
        self.query_content = nn.Linear(width, width)
        self.content_positions: nn.ModuleDict | None = nn.ModuleDict(
            {"point": nn.Linear(width, width), "box": nn.Linear(width, width)}
        )
        self.query_point = nn.Linear(width, width)
        self.query_box = nn.Linear(2 * width, width)
        self.key_content = nn.Linear(width, width)
        self.key_position = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, queries: Tensor, at: QueryPositions, level: FeatureLevel, prior: SeparablePrior | None) -> Tensor:
        """`queries` (B, Q, C); `prior` rows (B, N, Q, H) and columns (B, N, Q, W) -> (B, Q, C)."""
        return self.attend(*self.compare(queries, at, level), level, prior)

    def compare(self, queries: Tensor, at: QueryPositions, level: FeatureLevel) -> tuple[Tensor, Tensor]:
        query, key = self.query_content(queries), self.key_content(level.tokens)
        position = self.key_position(level.position_tokens)
        if self.content_positions is not None:
            known = self.content_positions["point"](at.point) + self.content_positions["box"](at.box)
            query, key = query + known, key + position

        def heads(*parts: Tensor) -> Tensor:  # (B, N, Q or L, D), a head's parts concatenated
            return torch.cat([split_heads(part, self.num_heads) for part in parts], -1)

        query = heads(query, self.query_point(at.point_sine), self.query_box(at.box_sine))
        return query, heads(key, position, position)


class SAPDecoderLayer(nn.Module):
    """Self-attention, cross-attention, feed-forward; post-norm.

    Args:
        gaussian: whether cross-attention has the side-directed Gaussian prior.
    """

    def __init__(self, sizes: LayerSizes, *, gaussian: bool = True):
        super().__init__()
        self.hidden_dim = width = sizes.hidden_dim
        self.self_attention = SelfAttention(sizes, positions=("point", "box"))
        self.norm1 = nn.LayerNorm(width)
        self.gaussian = SideDirectedGaussian(hidden_dim=width, num_heads=sizes.num_heads) if gaussian else None
        self.cross_attention = CrossAttention(sizes)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = FeedForward(sizes)
        self.norm3 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(self, queries: Tensor, at: QueryPositions, level: FeatureLevel) -> Tensor:
        """`queries` (B, Q, C) -> (B, Q, C)."""
        queries = self.norm1(queries + self.dropout(self.self_attention(queries, at.point, at.box)))
        prior = None
        if self.gaussian is not None:
            height, width = level.features.shape[2:]
            prior = self.gaussian(queries, at.points, at.distances, height=height, width=width)
        queries = self.norm2(queries + self.dropout(self.cross_attention(queries, at, level, prior)))
        return self.feed_forward.added_to(queries, norm=self.norm3, dropout=self.dropout)


class SAPDecoder(nn.Module):
    """Decoder layers, and the points and side distances that they refine.

    The published form is the default; if it looks like a mistake, a keyword has the corrected form. One has no keyword:
    points and boxes are learned relative to the image, as targets are, but address the map with its padding, so a
    prediction depends on the padding. A batch of images of one size has none.

    Args:
        layer: the first layer; the others start as copies of it.
        num_layers: number of layers.
        num_queries: Q; 306 or a square number.
        num_classes: outputs of the class heads.
        content_from_points: whether queries start as the features at their points, after three convolutions; else as
            zeros.
        share_box_heads: whether all layers share one head for distances and one for points.
        point_reference: what the heads of a layer move: "late", the previous layer's input points, or "current", its
            output points, as for the distances.
        head_cell: how far the heads can move a point: "published", 1/20 of the image for all Q except 306, or "grid",
            the cell of the grid, which the decoder itself uses.

    Raises:
        ValueError: a number of queries that makes no grid, or a width without 32 groups.
    """

    def __init__(
        self,
        *,
        layer: SAPDecoderLayer,
        num_layers: int,
        num_queries: int,
        num_classes: int,
        content_from_points: bool = True,
        share_box_heads: bool = False,
        point_reference: str = "late",
        head_cell: str = "published",
    ):
        super().__init__()
        assert point_reference in ("late", "current"), point_reference
        assert head_cell in ("published", "grid"), head_cell
        width = layer.hidden_dim
        if content_from_points and width % 32:
            raise ValueError(
                f"`newconvinit` normalises in 32 groups, which do not divide `hidden_dim` {width}; change one of them"
            )
        self.hidden_dim, self.late = width, point_reference == "late"
        self.cell = self.head_cell = grid_cell(num_queries)
        if head_cell == "published" and num_queries != PUBLISHED_QUERIES:
            self.head_cell = (1 / 20, 1 / 20)
        self.points = nn.Parameter(grid_logits(num_queries), requires_grad=False)  # (Q, 2), logits
        self.distances = nn.Parameter(torch.empty(num_queries, 4))  # logits
        self.initial_content = _convolutions(width) if content_from_points else None
        self.point_position = MLP(width, width, width)
        self.box_position = MLP(2 * width, width, width)
        self.position_scale = MLP(width, width, width)
        self.layers = copies(layer, num_layers)
        for later in self.layers[1:]:
            later.cross_attention.content_positions = None
        self.norm = nn.LayerNorm(width)

        self.class_heads = copies(MLP(width, width, width, num_classes), min(num_layers, 2))
        self.class_heads.extend(self.class_heads[1] for _ in range(2, num_layers))  # all but the first are one
        self.object_head = nn.Linear(width, 1)
        number, times = (1, num_layers) if share_box_heads else (num_layers, 1)
        self.distance_heads = nn.ModuleList([*copies(MLP(width, width, width, 4), number)] * times)
        self.point_heads = nn.ModuleList([*copies(MLP(width, width, width, 2), number)] * times)
        self._init_weights()

    def _init_weights(self) -> None:
        """Every parameter of the decoder, as the reference leaves it:

        matrices of the layers and of `position_scale`: xavier uniform; attention outputs: bias 0; convolutions:
        N(0, 0.01), bias 0; heads: see `start_heads` (the first prediction is the reference); the rest of the heads,
        `point_position`, `box_position` and all other biases: PyTorch's default; distances: N(0, 1).
        """
        xavier_matrices(self.layers)
        xavier_matrices(self.position_scale)
        for layer in self.layers:
            nn.init.zeros_(layer.self_attention.output.bias)
            nn.init.zeros_(layer.cross_attention.output.bias)
        for convolution in self.initial_content or []:
            if isinstance(convolution, nn.Conv2d):
                nn.init.normal_(convolution.weight, std=0.01)
                nn.init.zeros_(convolution.get_parameter("bias"))
        last = [head.layers[-1] for head in self.class_heads]
        start_heads([*last, self.object_head], [*self.distance_heads, *self.point_heads])
        nn.init.normal_(self.distances)
        self.position_scale.requires_grad_(len(self.layers) > 1)  # the first layer does not use it

    def forward(self, levels: list[FeatureLevel]) -> list[dict[str, Tensor]]:
        """One prediction for each layer, the last one final: `pred_logits` (B, Q, classes); `pred_objs` (B, Q, 1),
        logits of being an object; `pred_points` (B, Q, 2), x, y; `pred_boxes` (B, Q, 4), cx, cy, w, h, which may leave
        [0, 1]."""
        assert len(levels) == 1, f"SAP-DETR attends one level, not {len(levels)}"
        level = levels[0]
        batch = level.features.shape[0]
        start = self.points.sigmoid().expand(batch, -1, -1)  # (B, Q, 2)
        distances = self.distances.sigmoid().expand(batch, -1, -1)  # (B, Q, 4)
        queries = self._start(level, start)
        # Filled on the device: a copy from the host would wait there, and a CUDA graph could not repeat it.
        cell, head_cell = (torch.stack([start.new_full((), side) for side in c]) for c in (self.cell, self.head_cell))

        points, head_points, head_distances = start, start, distances
        predictions = []
        for index, layer in enumerate(self.layers):
            queries = layer(queries, self._positions(points, distances, queries if index else None), level)
            normed = self.norm(queries)
            pred_points = move_points(self.point_heads[index](normed), head_points, start, head_cell)
            pred_distances = move_sides(self.distance_heads[index](normed), head_distances)
            prediction = {"pred_logits": self.class_heads[index](normed), "pred_objs": self.object_head(normed)}
            boxes = boxes_around(pred_points, pred_distances)
            predictions.append(prediction | {"pred_boxes": boxes, "pred_points": pred_points})
            # The same heads refine the references, from the queries before the norm. The next layer's heads build on
            # the distances before they are detached, so a gradient crosses one layer.
            head_distances = move_sides(self.distance_heads[index](queries), distances)
            new_points = move_points(self.point_heads[index](queries), points, start, cell)
            head_points = points if self.late else new_points
            points, distances = new_points.detach(), head_distances.detach()
        return predictions

    def _start(self, level: FeatureLevel, points: Tensor) -> Tensor:
        """Content (B, Q, C) of the queries before the first layer."""
        if self.initial_content is None:
            return points.new_zeros(*points.shape[:2], level.features.shape[1])
        grid = (2 * points - 1)[:, None]  # (B, 1, Q, 2)
        features = self.initial_content(level.features)
        return F.grid_sample(features, grid, align_corners=False)[:, :, 0].mT  # between cell centres, 0 outside

    def _positions(self, points: Tensor, distances: Tensor, queries: Tensor | None) -> QueryPositions:
        """`queries` (B, Q, C) scale the encodings that are compared with the map's; None in the first layer."""

        def encode(places: Tensor) -> Tensor:
            # x before y, unlike the map's encoding; the layers' projections make up for it.
            encoding = sine_encoding(places.flip(-1), num_channels=self.hidden_dim, temperature=TEMPERATURE)
            return encoding.to(points.dtype)

        point = encode(points)  # (B, Q, C)
        box = encode(corners_around(points, distances).unflatten(-1, (2, 2))).flatten(-2)  # (B, Q, 2 C)
        sines = point, box
        if queries is not None:
            scale = self.position_scale(queries)
            sines = point * scale, box * scale.repeat(1, 1, 2)
        return QueryPositions(points, distances, *sines, self.point_position(point), self.box_position(box))


def _convolutions(width: int) -> nn.Sequential:
    """Three of 3 x 3, each with a GroupNorm of 32 groups and ReLU."""
    parts = [(nn.Conv2d(width, width, 3, padding=1), GroupNorm(32, width), nn.ReLU()) for _ in range(3)]
    return nn.Sequential(*(module for part in parts for module in part))
