"""A family from outside: plain DETR with learned reference points, and its own loss and cost.

    python main.py --plugin docs/example_family.py -m point_detr --coco_path my_data --output_dir output/point_detr

DETR's decoder (Carion et al., ECCV 2020) whose queries hold a learned reference point each, as in Anchor DETR (Wang et
al., AAAI 2022). Backbone, projection, encoder, feed-forward branch and heads are the project's own. docs/extending.md
explains the parts. Legend: B batch, Q queries, C channels, L cells of the map, M matched pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from samdetr.models.build import register
from samdetr.models.criterion import SetCriterion, Targets
from samdetr.models.detector import Detector
from samdetr.models.encoder import DenseEncoder
from samdetr.models.family import Family, build_backbone, build_criterion, build_projection
from samdetr.models.feature_levels import FeatureLevel
from samdetr.models.layers import FeedForward, LayerSizes, copies, inverse_sigmoid
from samdetr.models.matcher import Matches
from samdetr.models.mlp import MLP
from samdetr.models.position_encoding import sine_encoding
from samdetr.models.settings import FamilyConfig, Loss, Trunk
from samdetr.util.settings import flag


@dataclass(frozen=True, kw_only=True)
class Config(FamilyConfig):
    """Each field is a flag. A checkpoint brings those that are `carried`, because they shape the network."""

    learned_points: bool = flag(True, "draw the reference points once instead of learning them", carried=True)
    centre_loss_coef: float = flag(1.0, "weight of the distance between centres, in loss and cost", least=0)


class PointLayer(nn.Module):
    """Self-attention, cross-attention, feed-forward branch; each is added to its input and normalised."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        options: dict[str, Any] = {"dropout": sizes.dropout, "batch_first": True}
        self.self_attention = nn.MultiheadAttention(sizes.hidden_dim, sizes.num_heads, **options)
        self.cross_attention = nn.MultiheadAttention(sizes.hidden_dim, sizes.num_heads, **options)
        self.feed_forward = FeedForward(sizes)
        self.norms = nn.ModuleList(nn.LayerNorm(sizes.hidden_dim) for _ in range(3))
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(self, queries: Tensor, position: Tensor, level: FeatureLevel) -> Tensor:
        """`queries` and `position` (B, Q, C) -> (B, Q, C)."""
        where = queries + position
        attended, _ = self.self_attention(where, where, queries, need_weights=False)
        queries = self.norms[0](queries + self.dropout(attended))
        attended, _ = self.cross_attention(
            queries + position,
            level.tokens + level.position_tokens,  # (B, L, C)
            level.tokens,
            key_padding_mask=level.token_padding,
            need_weights=False,
        )
        queries = self.norms[1](queries + self.dropout(attended))
        return self.norms[2](queries + self.dropout(self.feed_forward(queries)))


class PointDecoder(nn.Module):
    """Decoder layers whose boxes are predicted around a reference point for each query.

    Args:
        layer: the first layer; the others start as copies of it.
        num_layers, num_queries, num_classes: their numbers.
        learned: whether the reference points learn.
    """

    def __init__(
        self, *, layer: PointLayer, hidden_dim: int, num_layers: int, num_queries: int, num_classes: int, learned: bool
    ) -> None:
        super().__init__()
        self.layers = copies(layer, num_layers)
        self.points = nn.Parameter(torch.rand(num_queries, 2).logit(), requires_grad=learned)  # logits of x, y
        self.class_heads = copies(nn.Linear(hidden_dim, num_classes), num_layers)
        self.box_heads = copies(MLP(hidden_dim, hidden_dim, hidden_dim, 4), num_layers)
        for head in self.class_heads:
            nn.init.constant_(head.bias, -math.log(99))  # every class starts at 1 %, as the focal loss needs

    def forward(self, levels: list[FeatureLevel]) -> list[dict[str, Tensor]]:
        """A prediction for each layer, the last one final: `pred_logits` (B, Q, classes), `pred_boxes` (B, Q, 4)."""
        (level,) = levels
        batch, channels = level.features.shape[:2]
        points = self.points.sigmoid().expand(batch, -1, -1)  # (B, Q, 2)
        position = sine_encoding(points, num_channels=channels).to(level.features.dtype)  # (B, Q, C)
        queries = torch.zeros_like(position)
        predictions = []
        for layer, class_head, box_head in zip(self.layers, self.class_heads, self.box_heads):
            queries = layer(queries, position, level)
            offset = box_head(queries)  # (B, Q, 4)
            centre = offset[..., :2] + inverse_sigmoid(points)
            boxes = torch.cat([centre, offset[..., 2:]], -1).sigmoid()
            predictions.append({"pred_logits": class_head(queries), "pred_boxes": boxes})
        return predictions


def build(trunk: Trunk, config: Config) -> Detector:
    """The network with random weights."""
    backbone = build_backbone(trunk, levels=(trunk.backbone_level,))
    return Detector(
        backbone=backbone,
        projection=build_projection(trunk, config, backbone),
        encoder=DenseEncoder(trunk.layer_sizes, num_layers=trunk.enc_layers),
        decoder=PointDecoder(
            layer=PointLayer(trunk.layer_sizes),
            hidden_dim=trunk.hidden_dim,
            num_layers=trunk.dec_layers,
            num_queries=trunk.num_queries,
            num_classes=trunk.num_classes,
            learned=config.learned_points,
        ),
    )


def centre_cost(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    """A cost: L1 distance of centres, (S, Q, n), between all queries and all n objects of one image; S predictions."""
    return (outputs["pred_boxes"][..., :, None, :2] - targets["boxes"][:, :2]).abs().sum(-1)


def centre_loss(outputs: dict[str, Any], targets: Targets, matches: Matches, num_boxes: Tensor) -> dict[str, Tensor]:
    """A loss: `loss_centre`, L1 distance of the centres of matched pairs, divided by the number of boxes."""
    predicted = outputs["pred_boxes"][matches.image, matches.query, :2]  # (M, 2)
    wanted = torch.cat([target["boxes"] for target in targets])[matches.target, :2]  # (M, 2)
    return {"loss_centre": (predicted - wanted).abs().sum() / num_boxes}


def build_losses(loss: Loss, config: Config) -> SetCriterion:
    """SAM-DETR's losses and costs, and those of centres."""
    criterion = build_criterion(loss, config)
    criterion.losses.append(centre_loss)
    criterion.weights["loss_centre"] = config.centre_loss_coef
    if config.centre_loss_coef:
        criterion.matcher.costs.append((config.centre_loss_coef, centre_cost))
    return criterion


register(
    Family(
        name="point_detr",
        config=Config,
        build=build,
        criterion=build_losses,
        defaults={"num_queries": 100, "lr_drop": 40},  # published settings that differ from SAM-DETR's
    )
)
