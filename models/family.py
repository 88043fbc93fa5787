"""What the programs know of a family of detectors, and what all families build alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from samdetr.models.backbone import Backbone
from samdetr.models.criterion import SetCriterion, box_losses, cardinality_error, class_error, focal_loss
from samdetr.models.detector import Detector
from samdetr.models.layers import InputProjection
from samdetr.models.matcher import HungarianMatcher, focal_class_cost, giou_cost, l1_cost
from samdetr.models.settings import FamilyConfig, Loss, Trunk


def build_criterion(loss: Loss, config: FamilyConfig) -> SetCriterion:
    """The losses of SAM-DETR and Deformable DETR: focal loss, L1 and generalised IoU of boxes."""
    matcher = HungarianMatcher(
        costs=[
            (loss.set_cost_class, focal_class_cost(alpha=loss.focal_alpha)),
            (loss.set_cost_bbox, l1_cost),
            (loss.set_cost_giou, giou_cost),
        ]
    )
    return SetCriterion(
        matcher=matcher,
        losses=[focal_loss(alpha=loss.focal_alpha), box_losses, cardinality_error],
        final_losses=[class_error],
        weights={"loss_ce": loss.cls_loss_coef, "loss_bbox": loss.bbox_loss_coef, "loss_giou": loss.giou_loss_coef},
        auxiliary=loss.aux_loss,
    )


def no_settings(state: dict[str, Tensor]) -> dict[str, Any]:
    """For families whose files need not be read for settings."""
    return {}


def never_official(names: Iterable[str]) -> bool:
    """For families without official files."""
    return False


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table of families.

    Args:
        name: what `--model` calls it.
        config: its own settings, a subclass of `FamilyConfig`: fields become flags.
        build: trunk and config -> network with random weights. May raise ValueError, naming fields in backticks.
        criterion: loss settings and config -> losses.
        from_weights: settings read off weights under our names, because files may not hold them.
        is_official: whether parameters have the official names of this family.
        convert_official: an official state dict under our names.
        defaults: its published settings of trunk, loss and training, if they differ from the defaults there.
    """

    name: str
    config: type[FamilyConfig]
    build: Callable[[Trunk, Any], Detector]
    criterion: Callable[[Loss, Any], SetCriterion] = build_criterion
    from_weights: Callable[[dict[str, Tensor]], dict[str, Any]] = no_settings
    is_official: Callable[[Iterable[str]], bool] = never_official
    convert_official: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    defaults: dict[str, Any] = field(default_factory=dict)

    def trunk(self, **changes: Any) -> Trunk:
        """The trunk as published for this family, but for `changes`."""
        return Trunk.pick({**self.defaults, "model": self.name, **changes})

    def loss(self, **changes: Any) -> Loss:
        """The loss settings as published for this family, but for `changes`."""
        return Loss.pick({**self.defaults, **changes})


def build_backbone(trunk: Trunk, *, levels: Sequence[int]) -> Backbone:
    return Backbone(
        name=trunk.backbone,
        levels=tuple(levels),
        dilation=trunk.dilation,
        norm=trunk.backbone_norm,
        # What is pretrained keeps its first stage; a backbone whose norms learn is trained from scratch.
        freeze_stem=trunk.backbone_norm == "frozen",
    )


def build_projection(trunk: Trunk, config: FamilyConfig, backbone: Backbone, **options: Any) -> InputProjection:
    """`options` as of `InputProjection`. "auto" is the rule of a schedule of 25 epochs or more."""
    norm = trunk.input_proj_norm == "group" or (trunk.input_proj_norm == "auto" and config.several_levels)
    return InputProjection(in_channels=backbone.num_channels, hidden_dim=trunk.hidden_dim, norm=norm, **options)


def norm_from_weights(state: dict[str, Tensor]) -> str:
    """`input_proj_norm`, which official files do not hold."""
    return "group" if "projection.levels.0.1.weight" in state else "none"


def coarse_to_fine(num_layers: int, num_levels: int) -> tuple[int, ...]:
    """Which level each decoder layer attends, levels being given from fine to coarse: an even split that starts with
    the coarsest. Six layers and three levels: 2, 2, 1, 1, 0, 0."""
    return tuple(num_levels - 1 - layer * num_levels // num_layers for layer in range(num_layers))
