"""SAP-DETR (Liu et al., CVPR 2023): queries are salient points of a grid with distances to the sides of their boxes."""

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from samdetr.models.criterion import SetCriterion
from samdetr.models.detector import Detector
from samdetr.models.encoder import DenseEncoder
from samdetr.models.family import (
    OFFICIAL_LIMITS,
    Family,
    build_backbone,
    build_projection,
    read_settings,
    weighted_criterion,
)
from samdetr.models.sap_detr import losses
from samdetr.models.sap_detr.decoder import TEMPERATURE, SAPDecoder, SAPDecoderLayer
from samdetr.models.sap_detr.official_weights import convert_official, is_official
from samdetr.models.settings import FamilyConfig, Loss, Trunk
from samdetr.util.settings import flag


@dataclass(frozen=True, kw_only=True)
class Config(FamilyConfig):
    """Settings of SAP-DETR beside the trunk's."""

    num_select: int = flag(300, "detections kept of an image", least=1, most=10**6, carried=True)
    transformer_activation: str = flag("relu", "of the feed-forward branches", choices=("relu", "prelu"), carried=True)
    meshgrid_refpoints_xy: bool = flag(False, "points start as a grid; always so, nothing else exists", carried=True)
    newconvinit: bool = flag(False, "queries start as the features at their points", carried=True)
    sdg: bool = flag(False, "side-directed Gaussian", carried=True)
    bbox_embed_diff_each_layer: bool = flag(False, "separate distance and point heads for each layer", carried=True)
    obj_loss_coef: float = flag(1.0, "weight of the objectness loss", least=0)
    inner_loss_coef: float = flag(2.0, "weight of loss_inner, which has no gradient", least=0)
    point_reference: str = flag(
        "late",
        "which points a layer's heads move: late (published), those that entered the layer before",
        choices=("late", "current"),
        carried=True,
    )
    head_cell: str = flag(
        "published",
        "how far heads move a point: published, 1/20 of the image unless there are 306 queries; grid, a cell of the "
        "grid",
        choices=("published", "grid"),
        carried=True,
    )
    objectness_target: str = flag(
        "attached",
        "whether boxes learn from the IoU that objectness predicts: attached (published), they do",
        choices=("attached", "detached"),
        carried=True,
    )

    @property
    def top_k(self) -> int:
        return self.num_select


def build(trunk: Trunk, config: Config) -> Detector:
    """The network with random weights. Raises ValueError for settings that do not go together."""
    backbone = build_backbone(trunk, levels=(trunk.backbone_level,))
    projection = build_projection(trunk, config, backbone, temperature=TEMPERATURE, centred=False)
    sizes = replace(trunk.layer_sizes, activation=config.transformer_activation)
    decoder = SAPDecoder(
        layer=SAPDecoderLayer(sizes, gaussian=config.sdg),
        num_layers=trunk.dec_layers,
        num_queries=trunk.num_queries,
        num_classes=trunk.num_classes,
        content_from_points=config.newconvinit,
        share_box_heads=not config.bbox_embed_diff_each_layer,
        point_reference=config.point_reference,
        head_cell=config.head_cell,
    )
    encoder = DenseEncoder(sizes, num_layers=trunk.enc_layers, scale_position=True)
    return Detector(backbone=backbone, projection=projection, encoder=encoder, decoder=decoder)


def build_criterion(loss: Loss, config: Config) -> SetCriterion:
    """Focal loss, corner L1 and generalised IoU, objectness, and the count of points outside their boxes. Raises
    ValueError: a class loss or cost of the other families."""
    for name in ("class_loss", "class_cost"):
        if getattr(loss, name) != "focal":
            raise ValueError(
                f"`{name}` {getattr(loss, name)} has no effect on `model` sap_detr, whose objectness does that; leave "
                "it out, or choose another model"
            )
    return weighted_criterion(
        loss,
        costs=[losses.object_class_cost(alpha=loss.cost_alpha), losses.corner_l1_cost, losses.giou_cost],
        more_costs=[(losses.OUTSIDE, losses.outside_cost)],
        losses=[
            losses.corner_box_losses,
            losses.object_loss(alpha=loss.focal_alpha, detach_target=config.objectness_target == "detached"),
            losses.inner_loss,
        ],
        more_weights={"loss_ce_obj": config.obj_loss_coef, "loss_inner": config.inner_loss_coef},
    )


def from_weights(state: dict[str, Tensor]) -> dict[str, Any]:
    """Settings that official files do not hold, or only under other names."""
    found = read_settings(state) | {
        "sdg": "decoder.layers.0.gaussian.head.layers.0.bias" in state,
        "newconvinit": "decoder.initial_content.0.bias" in state,
        "transformer_activation": "prelu" if "decoder.layers.0.feed_forward.activation.weight" in state else "relu",
    }
    if _differ(state, r"decoder\.distance_heads\.\d+\.layers\.2\.bias"):
        found["bbox_embed_diff_each_layer"] = True
    if _differ(state, r"decoder\.class_heads\.[1-9]\d*\.layers\.2\.bias"):  # all but the first are one here
        found["class_embed_diff_each_layer"] = True
    return found


def _differ(state: dict[str, Tensor], pattern: str) -> bool:
    found = [state[name] for name in state if re.fullmatch(pattern, name)]
    return any(not torch.equal(found[0], other) for other in found)


FAMILY = Family(
    name="sap_detr",
    config=Config,
    build=build,
    criterion=build_criterion,
    from_weights=from_weights,
    is_official=is_official,
    convert_official=convert_official,
    official_limits={
        **OFFICIAL_LIMITS,
        "transformer_activation": ("relu", "prelu"),
        "pe_temperatureH": (20,),
        "pe_temperatureW": (20,),
        "class_embed_diff_each_layer": (False,),
        "pre_norm": (False,),
        "rm_self_attn_decoder": (False,),
    },
    images_per_step=lambda trunk: 8 if trunk.dilation else 16,
    defaults={
        "num_queries": 306,
        "dropout": 0.0,
        "input_proj_norm": "none",
        "meshgrid_refpoints_xy": True,
        "cls_loss_coef": 1.0,
        "set_cost_alpha": None,
        "warmup_iters": 1000,
    },
)
