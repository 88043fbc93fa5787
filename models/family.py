"""What the programs know of a family of detectors, and parts that several families build."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from samdetr.models import criterion
from samdetr.models.backbone import RESNETS, Backbone
from samdetr.models.criterion import SetCriterion, box_losses, cardinality_error, class_error, focal_loss
from samdetr.models.detector import Detector
from samdetr.models.feature_levels import InputProjection
from samdetr.models.matcher import Cost, HungarianMatcher, focal_class_cost, giou_cost, l1_cost, position_class_cost
from samdetr.models.quality_losses import ia_bce_loss, mal_loss
from samdetr.models.semantics_aligner import SemanticsAligner
from samdetr.models.settings import AlignerConfig, FamilyConfig, Loss, Trunk
from samdetr.models.timm_backbone import PREFIX, TimmBackbone


def weighted_criterion(
    loss: Loss,
    *,
    costs: Sequence[Cost],
    losses: Sequence[criterion.Loss],
    more_costs: Sequence[tuple[float, Cost]] = (),
    more_weights: dict[str, float] | None = None,
) -> SetCriterion:
    """Loss of classes and `losses`; `costs` of class, L1 distance and generalised IoU, weighted by the settings."""
    weights = (loss.set_cost_class, loss.set_cost_bbox, loss.set_cost_giou)
    terms = {"loss_ce": loss.cls_loss_coef, "loss_bbox": loss.bbox_loss_coef, "loss_giou": loss.giou_loss_coef}
    kinds = {"focal": focal_loss(alpha=loss.focal_alpha), "ia_bce": ia_bce_loss(), "mal": mal_loss()}
    classes = kinds[loss.class_loss]
    return SetCriterion(
        matcher=HungarianMatcher(costs=[*zip(weights, costs), *more_costs]),
        losses=[classes, *losses],
        final_losses=[class_error],
        denoising_losses=[classes, partial(box_losses, eps=1e-6)],  # DN-DETR's eps, not DETR's
        weights=terms | (more_weights or {}),
        auxiliary=loss.aux_loss,
    )


def build_criterion(loss: Loss, config: FamilyConfig) -> SetCriterion:
    """The losses of SAM-DETR and Deformable DETR: of classes, L1 and generalised IoU of boxes."""
    class_cost = {"focal": focal_class_cost, "position": position_class_cost}[loss.class_cost]
    costs = [class_cost(alpha=loss.cost_alpha), l1_cost, giou_cost]
    return weighted_criterion(loss, costs=costs, losses=[box_losses, cardinality_error])


# Of all official programs; see `Family.official_limits`.
OFFICIAL_LIMITS: dict[str, tuple[Any, ...]] = {
    "backbone": RESNETS,
    "position_embedding": ("sine",),
    "masks": (False,),
    "frozen_weights": (None,),
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table of families.

    Args:
        name: what `--model` calls it.
        config: its own settings, a subclass of `FamilyConfig`: fields become flags.
        build: trunk and config -> network with random weights. May raise ValueError, naming fields in backticks.
        criterion: loss settings and config -> losses.
        from_weights: settings to read off weights (under our names), because files may not hold them.
        is_official: whether parameters have the official names of this family.
        convert_official: an official state dict under our names.
        official_limits: for flags of the official program that shape the network but are not, or not entirely, built
            here: their values that are. Those of our settings' names need no entry unless their values differ.
        images_per_step: images of a step that the trunk's network was published with; None: unknown.
        defaults: its published settings of trunk, loss and training that differ from the defaults there.
    """

    name: str
    config: type[FamilyConfig]
    build: Callable[[Trunk, Any], Detector]
    criterion: Callable[[Loss, Any], SetCriterion] = build_criterion
    from_weights: Callable[[dict[str, Tensor]], dict[str, Any]] = lambda state: {}
    is_official: Callable[[Iterable[str]], bool] = lambda names: False
    convert_official: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    official_limits: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    images_per_step: Callable[[Trunk], int | None] = lambda trunk: None
    defaults: dict[str, Any] = field(default_factory=dict)

    def check_official(self, flags: dict[str, Any], *, where: str) -> None:
        """Refuse a network that is another one here, though its weights may fit. Raises ValueError, beginning with
        `where`."""
        for name, built in self.official_limits.items():
            if name in flags and flags[name] not in built:
                others = ", ".join(str(value) for value in built)
                raise ValueError(
                    f"{where} has {name} {flags[name]}, which is not built here (but {others}): it would load and "
                    "detect something else; take another file"
                )

    def trunk(self, **changes: Any) -> Trunk:
        """The trunk as published for this family, except `changes`."""
        return Trunk.pick({**self.defaults, "model": self.name, **changes})

    def loss(self, **changes: Any) -> Loss:
        """The loss settings as published for this family, except `changes`."""
        return Loss.pick({**self.defaults, **changes})


def build_backbone(trunk: Trunk, *, levels: Sequence[int]) -> Backbone | TimmBackbone:
    """A ResNet of torchvision, or "timm/" with any name of timm. Raises ValueError."""
    kind = TimmBackbone if trunk.backbone.startswith(PREFIX) else Backbone
    return kind(
        name=trunk.backbone,
        levels=tuple(levels),
        dilation=trunk.dilation,
        norm=trunk.backbone_norm,
        # A pretrained backbone keeps its first stage. One whose norms learn is trained from scratch.
        freeze_stem=trunk.backbone_norm == "frozen",
    )


def build_projection(
    trunk: Trunk, config: FamilyConfig, backbone: Backbone | TimmBackbone, **options: Any
) -> InputProjection:
    """`options` as of `InputProjection`. "auto" follows the rule for 25 epochs or more."""
    norm = trunk.input_proj_norm == "group" or (trunk.input_proj_norm == "auto" and config.several_levels)
    return InputProjection(in_channels=backbone.num_channels, hidden_dim=trunk.hidden_dim, norm=norm, **options)


def build_aligner(trunk: Trunk, config: AlignerConfig, **options: Any) -> SemanticsAligner | None:
    """`options` as of `SemanticsAligner`. None if the config turns it off."""
    if config.sam_resample == "off":
        return None
    return SemanticsAligner(
        hidden_dim=trunk.hidden_dim,
        resample=config.sam_resample,
        reweight=config.sam_reweight,
        search_range=config.sam_range,
        **options,
    )


def read_settings(state: dict[str, Tensor]) -> dict[str, Any]:
    """Settings that official files do not hold, read off the input projection and the first class head."""
    found: dict[str, Any] = {"input_proj_norm": "group" if "projection.levels.0.1.weight" in state else "none"}
    for name in ("decoder.class_heads.0.bias", "decoder.class_heads.0.layers.2.bias"):
        if name in state:
            found["num_classes"] = state[name].numel()
    return found


def coarse_to_fine(num_layers: int, num_levels: int) -> tuple[int, ...]:
    """The level that each decoder layer attends; levels are ordered from fine to coarse. An even split that starts with
    the coarsest: for six layers and three levels 2, 2, 1, 1, 0, 0."""
    return tuple(num_levels - 1 - layer * num_levels // num_layers for layer in range(num_layers))
