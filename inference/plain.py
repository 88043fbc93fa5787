"""The plain path: the same networks and losses written out as published, to compare the fast ones with.

`plain(module)` gives a copy with the same weights under the same names, in which these parts run as they are described:

    Semantics Aligner      torchvision's RoIAlign, 7 x 7 x C for every query; its network on the bins; grid_sample on
                           those of a second, equal call
    attention              all logits of all heads at once; the mean of the heads' weights is computed, too
    cross-attention        the shared key repeated for every head
    spatial prior          one tensor with x and y distances of every head, query and cell
    deformable attention   grid_sample, differentiated by autograd
    dense encoder          PyTorch's attention module, which is asked for the weights
    backbone               convolution, then torchvision's frozen BatchNorm; contiguous memory, not channels_last
    criterion              layer by layer; costs between all queries and all boxes of the batch; the GIoU of matched
                           pairs is the diagonal of a square matrix

Legend: B batch, Q queries, P points of a query, N heads, C channels, L = H x W positions of a level.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d, roi_align

from samdetr.models.attention import SelfAttention
from samdetr.models.backbone import FoldedConvolution, FoldedNorm
from samdetr.models.criterion import SetCriterion, Targets, box_losses
from samdetr.models.encoder import DenseEncoderLayer
from samdetr.models.feature_levels import FeatureLevel
from samdetr.models.layers import FeedForward
from samdetr.models.matcher import HungarianMatcher, Matches
from samdetr.models.ops.module import MSDeformAttn
from samdetr.models.ops.ms_deform_attn.plain import plain_ms_deform_attn
from samdetr.models.position_encoding import sine_encoding
from samdetr.models.sam_detr.decoder import CrossAttention, SAMDecoderLayer
from samdetr.models.semantics_aligner import AlignedQueries, SemanticsAligner
from samdetr.util.box_ops import cxcywh_to_xyxy, generalized_iou

M = TypeVar("M", bound=nn.Module)


class PlainAligner(SemanticsAligner):
    """In the order of the paper (section 3.3), one box after another."""

    def forward(
        self, queries: Tensor, boxes: Tensor, features: Tensor, valid_ratio: Tensor | None = None
    ) -> AlignedQueries:
        batch, num_queries, channels = queries.shape
        points_of_a_query = self.num_points if self.resample == "points" else 1
        height, width = features.shape[2:]
        if valid_ratio is None:
            valid_ratio = boxes.new_ones(batch, 2)
        cells = (valid_ratio * valid_ratio.new_tensor([width, height]))[:, None]  # (B, 1, 2)
        in_cells = list((cxcywh_to_xyxy(boxes) * cells.repeat(1, 1, 2)).detach())

        def pool() -> Tensor:
            return roi_align(features, in_cells, output_size=7, sampling_ratio=-1, aligned=True)  # (B Q, C, 7, 7)

        regions = pool()
        scales = None
        points = boxes[:, :, None, :2]
        if self.resample == "average":
            content = regions.mean((2, 3))
        elif self.resample == "maximum":
            content = regions.flatten(2).max(2).values
        else:
            x = self.reduce(pool()).relu().flatten(1)
            *hidden, last = self.point_head.layers
            for layer in hidden:
                x = layer(x).relu()
            x = last(x).view(batch, num_queries, -1, points_of_a_query, 2)
            scales = x[:, :, 1] if x.shape[2] == 2 else None
            offsets = x[:, :, 0].tanh()  # (B, Q, P, 2), -1 and 1 are the edges of the box
            if self.search_range == "box":
                points = boxes[:, :, None, :2] + offsets * boxes[:, :, None, 2:] / 2
                grid = offsets.flatten(0, 1)[:, None]  # (B Q, 1, P, 2)
                content = F.grid_sample(regions, grid, padding_mode="zeros", align_corners=False)
            else:
                points = (offsets + 1) / 2
                grid = (points * valid_ratio[:, None, None] * 2 - 1).flatten(1, 2)[:, None]  # (B, 1, Q P, 2)
                content = F.grid_sample(features, grid, padding_mode="border", align_corners=False)
                content = content.view(batch, channels, num_queries, -1).transpose(1, 2).flatten(0, 1)
        content = content.reshape(batch, num_queries, channels, -1).transpose(2, 3)  # (B, Q, P, C)
        position = sine_encoding(points.detach(), num_channels=channels).to(content)
        if self.reweight:  # each head has its own gates, be there a point for each or one for all
            of_head = (batch, num_queries, self.num_heads, channels)
            content = content * torch.sigmoid(self.content_gate(queries)).view(of_head)
            position = position * torch.sigmoid(self.position_gate(queries)).view(of_head)
        return AlignedQueries(content, position, points, scales)


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, *, padding: Tensor | None, bias: Tensor | None, dropout: float
) -> Tensor:
    """`query` (B, N, Q, D), `key` (B, N, L, D), `value` (B, N, L, E), `padding` (B, L), `bias` (B, N, Q, L)
    -> (B, Q, N * E)."""
    logits = (query * query.shape[-1] ** -0.5) @ key.mT  # (B, N, Q, L)
    if padding is not None:
        logits = logits.masked_fill(padding[:, None, None], -torch.inf)
    if bias is not None:
        logits = logits + bias
    weights = F.dropout(logits.softmax(-1), dropout)
    _ = weights.sum(1) / weights.shape[1]  # what the published modules hand back beside the output
    return (weights @ value).transpose(1, 2).flatten(2)


class PlainSelfAttention(SelfAttention):
    def forward(
        self, content: Tensor, *positions: Tensor, hidden: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        query, key = self.project("query", content, *positions), self.project("key", content, *positions)
        value = self.value(content).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        if hidden is not None:
            added = torch.zeros_like(hidden, dtype=query.dtype) if bias is None else bias
            bias = added.masked_fill(hidden, -torch.inf)
        return self.output(plain_attention(query, key, value, padding=None, bias=bias, dropout=dropout))


class PlainCrossAttention(CrossAttention):
    """Every head has its own queries and keys, C wide where queries are aligned."""

    def forward(  # type: ignore[override]
        self, content: Tensor, position: Tensor, level: FeatureLevel, bias: Tensor | None = None
    ) -> Tensor:
        """`bias` (B, Q, L, N)."""
        tokens = level.features.flatten(2).transpose(1, 2)  # (B, L, C)
        key_position = level.position.flatten(2).transpose(1, 2)
        query = self.query_content(content) + self.query_position(position)
        key = self.key_content(tokens) + self.key_position(key_position)
        value = self.value(tokens).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, N, L, C / N)
        if self.aligned:
            query = query.expand(-1, -1, self.num_heads, -1)  # (B, Q, N, C)
            key = key[:, :, None].repeat(1, 1, self.num_heads, 1)  # (B, L, N, C)
        else:
            query, key = query.unflatten(2, (self.num_heads, -1)), key.unflatten(2, (self.num_heads, -1))
        attended = plain_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value,
            padding=level.padding.flatten(1),
            bias=None if bias is None else bias.permute(0, 3, 1, 2),
            dropout=self.dropout if self.training else 0.0,
        )
        return self.output(attended)


class PlainSAMDecoderLayer(SAMDecoderLayer):
    def forward(
        self,
        queries: Tensor,
        boxes: Tensor,
        level: FeatureLevel,
        hidden: Tensor | None = None,
        relation: Tensor | None = None,
    ) -> Tensor:
        position = sine_encoding(boxes[..., :2].detach(), num_channels=self.hidden_dim).to(queries)
        attended = self.self_attention(queries, position, hidden=hidden, bias=relation)
        queries = self.norm1(queries + self.dropout(attended))
        content, bias = queries, None
        if self.aligner is not None:
            aligned = self.aligner(queries, boxes, level.features, level.valid_ratio)
            content, position = aligned.content, aligned.position
            if aligned.scales is not None:
                bias = plain_prior(aligned.points, aligned.scales, level)
        queries = self.norm2(queries + self.dropout(self.cross_attention(content, position, level, bias)))
        return self.norm3(queries + self.dropout(self.feed_forward(queries)))


def plain_prior(points: Tensor, scales: Tensor, level: FeatureLevel) -> Tensor:
    """SMCA's prior of `points`, `scales` (B, Q, P, 2) at every cell: (B, Q, L, P)."""
    height, width = level.features.shape[2:]
    y, x = torch.meshgrid(torch.arange(height).to(points), torch.arange(width).to(points), indexing="ij")
    centres = torch.stack([x, y], -1).flatten(0, 1) + 0.5  # (L, 2)
    in_cells = points * level.valid_ratio[:, None, None] * points.new_tensor([width, height])
    distances = centres[:, None] - in_cells[:, :, None]  # (B, Q, L, P, 2)
    return -(distances * scales[:, :, None]).square().sum(-1) / 8


class PlainFeedForward(FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))

    def added_to(self, x: Tensor, *, norm: nn.LayerNorm, dropout: nn.Dropout) -> Tensor:
        return norm(x + dropout(self(x)))


class PlainDenseEncoderLayer(DenseEncoderLayer):
    def _attend(self, where: Tensor, tokens: Tensor, padding: Tensor) -> Tensor:
        return self.self_attention(where, where, tokens, key_padding_mask=padding)[0]


class PlainMSDeformAttn(MSDeformAttn):
    def forward(
        self,
        query: Tensor,
        reference: Tensor,
        value: Tensor,
        level_shapes: Sequence[tuple[int, int]],
        padding: Tensor | None = None,
    ) -> Tensor:
        value = self.value_proj(value)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0)
        value = value.unflatten(-1, (self.num_heads, -1))
        sizes = [size for shape in level_shapes for size in shape]
        locations = self.locate(query, reference, level_shapes)
        return self.output_proj(plain_ms_deform_attn(value, sizes, locations, self.weigh(query)))


class PlainMatcher(HungarianMatcher):
    @torch.no_grad()
    def __call__(self, predictions: Sequence[dict[str, Any]], targets: Targets) -> list[Matches]:
        return [self._match(prediction, targets) for prediction in predictions]

    def _match(self, prediction: dict[str, Any], targets: Targets) -> Matches:
        batch, num_queries = prediction["pred_logits"].shape[:2]
        outputs = {name: values.flatten(0, 1) for name, values in prediction.items() if name.startswith("pred_")}
        objects = {name: torch.cat([target[name] for target in targets]) for name in ("labels", "boxes")}
        # (B Q, objects of the batch)
        cost = torch.stack([weight * cost(outputs, objects) for weight, cost in self.costs]).sum(0)
        cost = cost.view(batch, num_queries, -1).cpu()
        sizes = [len(target["labels"]) for target in targets]
        rows = []
        for image, of_image in enumerate(cost.split(sizes, -1)):
            query, target = linear_sum_assignment(of_image[image])
            rows += [(image, q, sum(sizes[:image]) + t) for q, t in zip(query, target)]
        image, query, target = torch.tensor(rows, dtype=torch.int64).view(-1, 3).T.to(prediction["pred_logits"].device)
        return Matches(image, query, target)


def plain_box_losses(
    outputs: dict[str, Any], targets: Targets, matches: Matches, num_boxes: Tensor
) -> dict[str, Tensor]:
    predicted = outputs["pred_boxes"][matches.image, matches.query]
    wanted = torch.cat([t["boxes"] for t in targets])[matches.target]
    overlap = generalized_iou(cxcywh_to_xyxy(predicted)[:, None], cxcywh_to_xyxy(wanted)[None]).diag()
    return {"loss_bbox": (predicted - wanted).abs().sum() / num_boxes, "loss_giou": (1 - overlap).sum() / num_boxes}


class PlainCriterion(SetCriterion):
    """For one process."""

    def forward(self, outputs: dict[str, Any], targets: Targets, num_boxes: Tensor | None = None) -> dict[str, Tensor]:
        number = sum(len(target["labels"]) for target in targets)
        number_of_boxes = outputs["pred_logits"].new_tensor(number).clamp(min=1) if num_boxes is None else num_boxes
        losses = [plain_box_losses if loss is box_losses else loss for loss in self.losses]
        terms: dict[str, Tensor] = {}

        def add(prediction: dict[str, Any], objects: Targets, losses: Sequence, suffix: str) -> None:
            (matches,) = self.matcher([prediction], objects)
            for loss in losses:
                terms.update(
                    {name + suffix: term for name, term in loss(prediction, objects, matches, number_of_boxes).items()}
                )

        add(outputs, targets, [*losses, *self.final_losses], "")
        for layer, prediction in enumerate(outputs["aux_outputs"] if self.auxiliary else []):
            add(prediction, targets, losses, f"_{layer}")
        if "enc_outputs" in outputs:
            objects = [target | {"labels": torch.zeros_like(target["labels"])} for target in targets]
            add(outputs["enc_outputs"], objects, losses, "_enc")
        return terms


PLAIN = {
    SemanticsAligner: PlainAligner,
    SelfAttention: PlainSelfAttention,
    CrossAttention: PlainCrossAttention,
    SAMDecoderLayer: PlainSAMDecoderLayer,
    MSDeformAttn: PlainMSDeformAttn,
    FeedForward: PlainFeedForward,
    DenseEncoderLayer: PlainDenseEncoderLayer,
    FoldedConvolution: nn.Conv2d,
    FoldedNorm: FrozenBatchNorm2d,
    SetCriterion: PlainCriterion,
}


def plain(module: M) -> M:
    """A copy of a network, a criterion or a part of them, on the plain path."""
    module = copy.deepcopy(module).to(memory_format=torch.contiguous_format)
    for part in module.modules():
        # Same parameters, settings and names; only what is done with them is another.
        part.__class__ = PLAIN.get(type(part), type(part))
        if isinstance(part, PlainCriterion):
            part.matcher.__class__ = PlainMatcher
    return module
