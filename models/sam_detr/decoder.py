"""SAM-DETR's decoder: a DETR decoder with a Semantics Aligner in front of each cross-attention.

Legend: B batch, Q queries, N heads, C channels, L positions of a level.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from samdetr.models.attention import LevelAttention, SelfAttention, split_heads
from samdetr.models.denoising import DenoisingQueries, Noised
from samdetr.models.feature_levels import FeatureLevel
from samdetr.models.layers import FeedForward, LayerSizes, copies, inverse_sigmoid, start_heads, xavier_matrices
from samdetr.models.mlp import MLP
from samdetr.models.position_encoding import in_cells, sine_encoding
from samdetr.models.relations import RelationBias
from samdetr.models.semantics_aligner import SemanticsAligner
from samdetr.models.spatial_prior import SeparablePrior, gaussian_log_prior


class CrossAttention(LevelAttention):
    """Attention of queries to a feature level.

    With aligned queries every head has a C-wide query, and all heads share one C-wide key (which the reference repeats
    for each head). Without an aligner, as in DETR, the C channels are split over the heads.
    """

    def __init__(self, sizes: LayerSizes, *, aligned: bool):
        super().__init__(sizes)
        self.aligned, hidden_dim = aligned, sizes.hidden_dim
        self.query_content = nn.Linear(hidden_dim, hidden_dim)
        self.query_position = MLP(hidden_dim, hidden_dim, hidden_dim)
        self.key_content = nn.Linear(hidden_dim, hidden_dim)
        self.key_position = MLP(hidden_dim, hidden_dim, hidden_dim)
        self.value = nn.Linear(hidden_dim, hidden_dim)
        self.output = nn.Linear(hidden_dim, hidden_dim)

    def forward(
        self, content: Tensor, position: Tensor, level: FeatureLevel, prior: SeparablePrior | None = None
    ) -> Tensor:
        """
        Args:
            content, position: aligned (B, Q, N or 1, C), else (B, Q, C).
            prior: rows (B, N or 1, Q, H) and columns (B, N or 1, Q, W).
        Returns:
            (B, Q, C).
        """
        return self.attend(*self.compare(content, position, level), level, prior)

    def compare(self, content: Tensor, position: Tensor, level: FeatureLevel) -> tuple[Tensor, Tensor]:
        query = self.query_content(content) + self.query_position(position)
        key = self.key_content(level.tokens) + self.key_position(level.position_tokens)  # (B, L, C)
        if self.aligned:
            return query.transpose(1, 2).expand(-1, self.num_heads, -1, -1), key[:, None]  # (B, N, Q, C), (B, 1, L, C)
        return split_heads(query, self.num_heads), split_heads(key, self.num_heads)


class SAMDecoderLayer(nn.Module):
    """Self-attention, alignment, cross-attention, feed-forward; post-norm.

    Args:
        aligner: the module that resamples the queries; None leaves them unchanged (the paper's baseline).
    """

    def __init__(self, sizes: LayerSizes, *, aligner: SemanticsAligner | None):
        super().__init__()
        self.hidden_dim = hidden_dim = sizes.hidden_dim
        self.self_attention = SelfAttention(sizes)
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.aligner = aligner
        self.cross_attention = CrossAttention(sizes, aligned=aligner is not None)
        self.norm2 = nn.LayerNorm(hidden_dim)
        self.feed_forward = FeedForward(sizes)
        self.norm3 = nn.LayerNorm(hidden_dim)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(
        self,
        queries: Tensor,
        boxes: Tensor,
        level: FeatureLevel,
        hidden: Tensor | None = None,
        relation: Tensor | None = None,
    ) -> Tensor:
        """`queries` (B, Q, C); `boxes` (B, Q, 4) as cx, cy, w, h relative to the valid image; `hidden` (Q, Q), which
        query, row, does not attend to which; `relation` (B, N, Q, Q), a bias of this attention -> (B, Q, C)."""
        # Without gradient, and not scaled by the valid ratio, as in the reference.
        position = sine_encoding(boxes[..., :2].detach(), num_channels=self.hidden_dim).to(queries.dtype)
        attended = self.self_attention(queries, position, hidden=hidden, bias=relation)
        queries = self.norm1(queries + self.dropout(attended))
        if self.aligner is None:
            attended = self.cross_attention(queries, position, level)
        else:
            aligned = self.aligner(queries, boxes, level.features, level.valid_ratio)
            prior = None if aligned.scales is None else self._prior(aligned.points, aligned.scales, level)
            attended = self.cross_attention(aligned.content, aligned.position, level, prior)
        queries = self.norm2(queries + self.dropout(attended))
        return self.feed_forward.added_to(queries, norm=self.norm3, dropout=self.dropout)

    def _prior(self, points: Tensor, scales: Tensor, level: FeatureLevel) -> SeparablePrior:
        """SMCA's prior around the salient points: rows (B, N or 1, Q, H), columns (B, N or 1, Q, W)."""
        height, width = level.features.shape[2:]
        cells = in_cells(level.valid_ratio[:, None, None], height=height, width=width)
        return gaussian_log_prior(points * cells, scales, height=height, width=width).transpose(1, 2)


class SAMDecoder(nn.Module):
    """Decoder layers with one class head and one box head each, reference boxes refined from layer to layer.

    Args:
        layer: the first layer; the others start as copies of it.
        num_queries: Q; each has a learned reference box.
        num_classes: outputs of the class heads.
        levels: for each layer, the index of the level that it attends; as many layers as entries.
        denoising: whether training adds denoising queries. A noised box is such a query's first reference. Its label,
            embedded, is its first content. An aligner samples anew what the cross-attention compares, so there the
            label only gates (re-weighting); it stays in the residual stream, which the class head reads, and in
            self-attention, where the queries of its group see it.
        relation: whether self-attention knows how boxes lie to each other, from the second layer on, as published for
            Relation-DETR: rows are the boxes that went into the layer before, columns those that it predicted.
    """

    def __init__(
        self,
        *,
        layer: SAMDecoderLayer,
        num_queries: int,
        num_classes: int,
        levels: Sequence[int],
        denoising: bool = False,
        relation: bool = False,
    ):
        super().__init__()
        self.levels = tuple(levels)
        hidden_dim = layer.hidden_dim
        self.layers = copies(layer, len(self.levels))
        self.reference_boxes = nn.Parameter(torch.empty(num_queries, 4))  # logits of cx, cy, w, h
        self.class_heads = copies(nn.Linear(hidden_dim, num_classes), len(self.levels))
        self.box_heads = copies(MLP(hidden_dim, hidden_dim, hidden_dim, 4), len(self.levels))
        self._init_weights()
        # Last, so that nothing else starts with other numbers.
        self.denoising = DenoisingQueries(num_classes=num_classes, hidden_dim=hidden_dim) if denoising else None
        self.relation = RelationBias(num_heads=layer.self_attention.num_heads) if relation else None

    def _init_weights(self) -> None:
        """Every parameter of the decoder, as the reference leaves it:

        matrices of the layers, including the aligner's 1 x 1 convolution and last linear layer: xavier uniform;
        attention outputs: bias 0; salient-point head: last bias 0 (set there); other biases: PyTorch's default;
        heads: see `start_heads` (the first prediction is the reference box), else PyTorch's default; reference boxes:
        N(0, 1).
        """
        xavier_matrices(self.layers)
        for layer in self.layers:
            nn.init.zeros_(layer.self_attention.output.bias)
            nn.init.zeros_(layer.cross_attention.output.bias)
        start_heads(self.class_heads, self.box_heads)
        nn.init.normal_(self.reference_boxes)

    def forward(self, levels: list[FeatureLevel], noised: Noised | None = None) -> list[dict[str, Any]]:
        """One prediction for each layer, the last one final: `pred_logits` (B, Q, classes), `pred_boxes` (B, Q, 4); for
        `noised` copies of objects, which come first in all tensors here, see `Noised.split`."""
        batch = levels[0].features.shape[0]
        reference = self.reference_boxes.expand(batch, -1, -1)  # (B, Q, 4), logits
        queries = levels[0].features.new_zeros(*reference.shape[:2], self.layers[0].hidden_dim)
        hidden = relation = None
        if noised is not None and self.denoising is not None:
            hidden = noised.hidden(queries.shape[1])
            queries = torch.cat([self.denoising(noised).to(queries.dtype), queries], 1)
            reference = torch.cat([noised.logits.to(reference.dtype), reference], 1)
        predictions = []
        for layer, level, class_head, box_head in zip(self.layers, self.levels, self.class_heads, self.box_heads):
            boxes = reference.sigmoid()
            queries = layer(queries, boxes, levels[level], hidden, relation)
            offset = box_head(queries)
            pred_boxes = (offset + inverse_sigmoid(boxes)).sigmoid()
            predictions.append({"pred_logits": class_head(queries), "pred_boxes": pred_boxes})
            if self.relation is not None and len(predictions) < len(self.layers):
                relation = self.relation(boxes, pred_boxes)
            # On the raw logit, not the clamped one, and detached; the initial boxes are not detached.
            reference = (offset + reference).detach()
        return predictions if noised is None else noised.split(predictions)
