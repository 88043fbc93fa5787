"""Settings that all families share: the trunk of the network, and the losses."""

from dataclasses import dataclass

from samdetr.models.backbone import RESNETS
from samdetr.models.denoising import Denoising
from samdetr.models.layers import LayerSizes
from samdetr.util.settings import Settings, flag


@dataclass(frozen=True, kw_only=True)
class Trunk(Settings):
    """What a detector of any family is made of. Defaults are those published for SAM-DETR; `Family.trunk` has those of
    another family."""

    model: str = flag("sam_detr", "family; published defaults go with it", on=("-m",), carried=True)
    num_classes: int = flag(91, "outputs of the class heads", least=1, most=10**6, hidden=True, carried=True)
    backbone: str = flag("resnet50", f"{', '.join(RESNETS)}, or timm/NAME", carried=True)
    backbone_level: int = flag(5, "the last stage used: 4 is C4, stride 16", choices=(3, 4, 5), carried=True)
    backbone_norm: str = flag(
        "frozen", "BatchNorm; learned: to train from scratch", choices=("frozen", "learned"), carried=True
    )
    dilation: bool = flag(False, "C5 at stride 16 (DC5)", carried=True)
    position_embedding: str = flag("sine", "position encoding of the maps", choices=("sine",), carried=True)
    input_proj_norm: str = flag(
        "auto",
        "GroupNorm after the input projection; auto: multi-scale, or epochs < 25",
        choices=("auto", "group", "none"),
        carried=True,
    )
    enc_layers: int = flag(6, "encoder layers", least=0, most=1000, carried=True)
    dec_layers: int = flag(6, "decoder layers", least=1, most=1000, carried=True)
    dim_feedforward: int = flag(2048, "width of the feed-forward branches", least=1, most=10**6, carried=True)
    hidden_dim: int = flag(256, "width of the transformer", least=1, most=10**5, carried=True)
    dropout: float = flag(0.1, "of attention weights and of every branch", least=0, most=1)
    nheads: int = flag(8, "attention heads", least=1, carried=True)
    num_queries: int = flag(300, "object queries", least=1, most=10**5, carried=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_dim % 4:
            raise ValueError(
                f"`hidden_dim` {self.hidden_dim} is not a multiple of 4, which the position encoding needs"
            )
        if self.hidden_dim % self.nheads:
            raise ValueError(
                f"`hidden_dim` {self.hidden_dim} cannot be divided by `nheads` {self.nheads}; change one of them"
            )

    @property
    def layer_sizes(self) -> LayerSizes:
        return LayerSizes(
            hidden_dim=self.hidden_dim,
            num_heads=self.nheads,
            feedforward_dim=self.dim_feedforward,
            dropout=self.dropout,
        )


@dataclass(frozen=True, kw_only=True)
class FamilyConfig(Settings):
    """Base class of what each family adds to the trunk."""

    @property
    def top_k(self) -> int:
        """Detections kept of an image."""
        return 100

    @property
    def several_levels(self) -> bool:
        """Whether the published network has a GroupNorm after its input projection, whatever its schedule."""
        return False

    def denoising_of(self, num_classes: int) -> Denoising | None:
        """What makes noised copies of the objects, in training with denoising queries."""
        return None


@dataclass(frozen=True, kw_only=True)
class AlignerConfig(FamilyConfig):
    """Base class for families whose decoder layers may have a Semantics Aligner, and whose training may have denoising
    queries."""

    sam_resample: str = flag(
        "points",
        "what queries are resampled from; off: no Semantics Aligner",
        choices=("points", "average", "maximum", "off"),
        carried=True,
    )
    sam_range: str = flag("box", "where salient points may lie", choices=("box", "image"), carried=True)
    sam_reweight: bool = flag(True, "do not gate new queries by old ones", carried=True)
    # Not carried: a network that is trained with them detects without.
    denoising: int = flag(
        0, "groups of noised copies of the objects as further queries in training; 0: none", least=0, most=1000,
        metavar="GROUPS",
    )  # fmt: skip
    denoising_box_noise: float = flag(0.4, "how far their boxes move, in parts of their size", least=0, most=1)
    denoising_label_noise: float = flag(0.2, "share of their labels that are replaced", least=0, most=1)
    contrastive: bool = flag(False, "also copies that are moved further, which shall find nothing; needs --denoising")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.contrastive and not self.denoising:
            raise ValueError("`contrastive` is a kind of `denoising`, which is 0: pass its number of groups, e.g. 5")

    def denoising_of(self, num_classes: int) -> Denoising | None:
        if not self.denoising:
            return None
        return Denoising(
            groups=self.denoising,
            num_classes=num_classes,
            box_noise=self.denoising_box_noise,
            label_noise=self.denoising_label_noise,
            contrastive=self.contrastive,
        )


@dataclass(frozen=True, kw_only=True)
class Loss(Settings):
    """Weights of the matching costs and of the losses."""

    aux_loss: bool = flag(True, "loss at the last layer only")
    set_cost_class: float = flag(2.0, "weight of the class in the matching cost", least=0)
    set_cost_bbox: float = flag(5.0, "weight of the L1 distance in the matching cost", least=0)
    set_cost_giou: float = flag(2.0, "weight of the generalised IoU in the matching cost", least=0)
    cls_loss_coef: float = flag(2.0, "weight of the focal loss", least=0)
    bbox_loss_coef: float = flag(5.0, "weight of the L1 loss of boxes", least=0)
    giou_loss_coef: float = flag(2.0, "weight of the generalised IoU loss", least=0)
    focal_alpha: float = flag(0.25, "weight of the positive class in the focal loss", least=0, most=1)
    set_cost_alpha: float | None = flag(
        0.25, "the same in the matching cost; sap_detr: that of --focal_alpha", least=0, most=1
    )

    class_loss: str = flag(
        "focal", "loss of classes; by the fit of boxes: ia_bce (Align-DETR), mal (DEIM)",
        choices=("focal", "ia_bce", "mal"),
    )  # fmt: skip
    class_cost: str = flag(
        "focal", "class in the matching cost; position: modulated by the fit of boxes (Stable-DINO)",
        choices=("focal", "position"),
    )  # fmt: skip

    @property
    def cost_alpha(self) -> float:
        """The alpha of the matching cost."""
        return self.focal_alpha if self.set_cost_alpha is None else self.set_cost_alpha
