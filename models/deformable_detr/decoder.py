"""Deformable DETR's decoder (Zhu et al., ICLR 2021): self-attention among the queries, and deformable cross-attention
around each query's reference in all levels.

Legend: B batch, Q queries, C channels, L positions of all levels together.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samdetr.models.deformable_detr.queries import LearnedQueries, ProposedQueries, encode_boxes
from samdetr.models.denoising import DenoisingQueries, Noised
from samdetr.models.feature_levels import FeatureLevel, JoinedLevels, join_levels
from samdetr.models.layers import FeedForward, LayerSizes, copies, inverse_sigmoid, start_heads, xavier_matrices
from samdetr.models.mlp import MLP
from samdetr.models.ops.module import MSDeformAttn
from samdetr.models.semantics_aligner import SemanticsAligner


class DeformableDecoderLayer(nn.Module):
    """Self-attention, deformable cross-attention, feed-forward; post-norm.

    Args:
        aligner: a Semantics Aligner of one head and one point (SAM-DETR, CVPR 2022), whose new content and position
            make the query of the cross-attention, and whose salient point its reference; None as published.
    """

    def __init__(self, sizes: LayerSizes, *, num_levels: int, num_points: int, aligner: SemanticsAligner | None = None):
        super().__init__()
        self.hidden_dim = width = sizes.hidden_dim
        self.self_attention = nn.MultiheadAttention(width, sizes.num_heads, dropout=sizes.dropout, batch_first=True)
        self.norm1 = nn.LayerNorm(width)
        self.aligner = aligner
        self.cross_attention = MSDeformAttn(
            hidden_dim=width, num_levels=num_levels, num_heads=sizes.num_heads, num_points=num_points
        )
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = FeedForward(sizes)
        self.norm3 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(
        self,
        queries: Tensor,
        position: Tensor,
        reference: Tensor,
        memory: JoinedLevels,
        boxes: Tensor,
        level: FeatureLevel,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """`queries`, `position` (B, Q, C); `reference` (B, Q, 2 or 4), relative to the valid image; `memory`, what
        queries attend; `boxes` (B, Q, 4) and `level`, where an aligner looks for salient points; `hidden` (Q, Q), which
        query, row, does not attend to which -> (B, Q, C)."""
        where = queries + position
        attended, _ = self.self_attention(where, where, queries, need_weights=False, attn_mask=hidden)
        queries = self.norm1(queries + self.dropout(attended))
        where = queries + position
        if self.aligner is not None:
            aligned = self.aligner(queries, boxes, level.features, level.valid_ratio)  # one head: (B, Q, 1, ...)
            where = (aligned.content + aligned.position).squeeze(2)
            reference = torch.cat([aligned.points.squeeze(2), reference[..., 2:]], -1)
        ratios = memory.ratios.tile(reference.shape[-1] // 2)  # sizes shrink with the image, too
        attended = self.cross_attention(
            where, reference[:, :, None] * ratios[:, None], memory.tokens, memory.shapes, memory.padding
        )
        queries = self.norm2(queries + self.dropout(attended))
        return self.feed_forward.added_to(queries, norm=self.norm3, dropout=self.dropout)


class DeformableDecoder(nn.Module):
    """Decoder layers that look around reference points.

    Args:
        layer: the first layer; the others start as copies of it.
        levels: for each layer, the index of the level that its aligner resamples queries from; as many layers as
            entries.
        num_queries: Q.
        num_classes: outputs of the class heads.
        refine: each layer has separate heads, and its boxes are the next layer's references. Otherwise all layers
            share one class head and one box head, and look around the same points.
        two_stage: queries are the best proposals of the encoder, made by a further pair of heads; needs `refine`.
        denoising: whether training adds denoising queries. A noised box is such a query's first reference, as far as
            the others have one: its centre, or all of it (two-stage). Its label, embedded, is its content. Position
            follows from the box: as a proposal's, or, if queries are learned, by a projection of its own.

    Weights start as the reference leaves them:

        matrices of the layers      xavier uniform, except the deformable attention's (see MSDeformAttn); biases:
                                    PyTorch's default, of self-attention 0
        class heads                 bias -log(99), so that every class starts at 1 %
        box heads                   last layer 0, so that boxes start at their references; if a reference is a point,
                                    width and height start at sigmoid(-2), an eighth of the image
        other weights of heads      PyTorch's default, the same in every head
    """

    def __init__(
        self,
        *,
        layer: DeformableDecoderLayer,
        levels: Sequence[int],
        num_queries: int,
        num_classes: int,
        refine: bool = False,
        two_stage: bool = False,
        denoising: bool = False,
    ):
        super().__init__()
        if two_stage and not refine:
            raise ValueError("two-stage queries have boxes, which only a decoder that refines them can use")
        self.refine, self.levels = refine, tuple(levels)
        self.layers = copies(layer, len(self.levels))
        xavier_matrices(self.layers)
        for each in self.layers:
            each.cross_attention.reset_parameters()

        hidden_dim = layer.hidden_dim
        class_head, box_head = nn.Linear(hidden_dim, num_classes), MLP(hidden_dim, hidden_dim, hidden_dim, 4)
        start_heads([class_head], [box_head])
        self.class_heads = copies(class_head, len(self.levels) if refine else 1)
        self.box_heads = copies(box_head, len(self.levels) if refine else 1)
        given = {"num_queries": num_queries, "hidden_dim": hidden_dim}
        self.queries: ProposedQueries | LearnedQueries
        if two_stage:
            self.queries = ProposedQueries(**given, class_head=class_head, box_head=box_head)
        else:
            self.queries = LearnedQueries(**given)
            nn.init.constant_(self.box_heads[0].layers[-1].bias[2:], -2.0)
        self.denoising = None
        if denoising:  # last, so that nothing else starts with other numbers
            self.denoising = DenoisingQueries(num_classes=num_classes, hidden_dim=hidden_dim, position=not two_stage)

    def forward(self, levels: list[FeatureLevel], noised: Noised | None = None) -> list[dict[str, Any]]:
        """One prediction for each layer, the last one final: `pred_logits` (B, Q, classes), `pred_boxes` (B, Q, 4).
        With two stages, `enc_outputs` of the last one has the same of all proposals, (B, L, ...). For `noised` copies
        of objects, which come first in all tensors here, see `Noised.split`."""
        memory = join_levels(levels)
        start = self.queries(levels)
        reference = start.reference
        # An aligner looks at a query's latest box. Points have none at first; the first head's takes its place.
        boxes = reference if reference.shape[-1] == 4 else self._boxes(self.box_heads[0](start.content), reference)
        queries, position, hidden = start.content, start.position, None
        if noised is not None and self.denoising is not None:
            hidden = noised.hidden(queries.shape[1])
            copies = noised.logits.sigmoid()
            content, places = self.denoising(noised), self._position(copies)
            queries = torch.cat([content.to(queries.dtype), queries], 1)
            position = torch.cat([places.to(position.dtype), position], 1)
            boxes = torch.cat([copies.to(boxes.dtype), boxes], 1)
            reference = torch.cat([copies[..., : reference.shape[-1]].to(reference.dtype), reference], 1)
        predictions = []
        for index, (layer, level) in enumerate(zip(self.layers, self.levels)):
            queries = layer(queries, position, reference, memory, boxes.detach(), levels[level], hidden)
            head = index if self.refine else 0
            boxes = self._boxes(self.box_heads[head](queries), reference)
            predictions.append({"pred_logits": self.class_heads[head](queries), "pred_boxes": boxes})
            if self.refine:
                reference = boxes.detach()
        if start.proposals is not None:
            predictions[-1]["enc_outputs"] = start.proposals
        return predictions if noised is None else noised.split(predictions)

    def _position(self, boxes: Tensor) -> Tensor:
        """Positions (B, D, C) of denoising queries at boxes (B, D, 4)."""
        encoded = encode_boxes(boxes, num_channels=self.layers[0].hidden_dim).to(boxes.dtype)
        if isinstance(self.queries, ProposedQueries):
            return self.queries.embed(encoded)[0]
        assert self.denoising is not None
        assert self.denoising.position is not None
        return self.denoising.position(encoded)

    @staticmethod
    def _boxes(offset: Tensor, reference: Tensor) -> Tensor:
        """`offset` (B, Q, 4) from the logits of `reference` (B, Q, 2 or 4) -> boxes (B, Q, 4)."""
        return (offset + F.pad(inverse_sigmoid(reference), (0, 4 - reference.shape[-1]))).sigmoid()
