"""SAM-DETR (Zhang et al., CVPR 2022): a dense or deformable encoder, and a decoder with Semantics Aligners."""

from dataclasses import dataclass, replace

from samdetr.models.detector import Detector
from samdetr.models.encoder import DeformableEncoder, DenseEncoder
from samdetr.models.family import (
    OFFICIAL_LIMITS,
    Family,
    build_aligner,
    build_backbone,
    build_projection,
    coarse_to_fine,
    read_settings,
)
from samdetr.models.sam_detr.decoder import SAMDecoder, SAMDecoderLayer
from samdetr.models.sam_detr.official_weights import convert_official, is_official
from samdetr.models.settings import AlignerConfig, Trunk
from samdetr.util.settings import flag


@dataclass(frozen=True, kw_only=True)
class Config(AlignerConfig):
    """Settings of SAM-DETR beside the trunk's."""

    multiscale: bool = flag(False, "C3, C4 and C5, with a deformable encoder", carried=True)
    smca: bool = flag(False, "spatial prior around the salient points", carried=True)
    relation: bool = flag(
        False, "self-attention of queries knows how their boxes lie to each other (Relation-DETR)", carried=True
    )
    sam_points: int | None = flag(None, "salient points per query: 1, or nheads (default)", least=1, carried=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.smca and self.sam_resample != "points":
            raise ValueError(
                f"`smca` needs salient points, which `sam_resample` {self.sam_resample} takes away; leave one of them "
                "out"
            )

    @property
    def several_levels(self) -> bool:
        return self.multiscale


def build(trunk: Trunk, config: Config) -> Detector:
    """The network with random weights. Raises ValueError for settings that do not go together."""
    _check(trunk, config)
    backbone = build_backbone(trunk, levels=(3, 4, 5) if config.multiscale else (trunk.backbone_level,))
    num_levels = len(backbone.num_channels)
    projection = build_projection(trunk, config, backbone)
    sizes = trunk.layer_sizes
    encoder: DeformableEncoder | DenseEncoder
    if config.multiscale:
        # The feed-forward branch is half as wide as the setting, as published: it runs on 21 times as many positions.
        narrow = replace(sizes, feedforward_dim=trunk.dim_feedforward // 2)
        encoder = DeformableEncoder(narrow, num_layers=trunk.enc_layers, num_levels=num_levels)
    else:
        encoder = DenseEncoder(sizes, num_layers=trunk.enc_layers)
    aligner = build_aligner(
        trunk, config, num_heads=trunk.nheads, num_points=config.sam_points, predict_scales=config.smca
    )
    decoder = SAMDecoder(
        layer=SAMDecoderLayer(sizes, aligner=aligner),
        num_queries=trunk.num_queries,
        num_classes=trunk.num_classes,
        levels=attended_levels(trunk.dec_layers, num_levels),
        denoising=config.denoising > 0,
        relation=config.relation,
    )
    return Detector(backbone=backbone, projection=projection, encoder=encoder, decoder=decoder)


def attended_levels(num_layers: int, num_levels: int) -> tuple[int, ...]:
    """The level that each decoder layer attends. Of three levels as published for up to six layers, which the official
    code cannot exceed: two layers each from coarse to fine, the finer levels missing if there are fewer layers. Else an
    even split."""
    if num_levels == 3 and num_layers <= 6:
        return (2, 2, 1, 1, 0, 0)[:num_layers]
    return coarse_to_fine(num_layers, num_levels)


def _check(trunk: Trunk, config: Config) -> None:
    if config.sam_points not in (None, 1, trunk.nheads):
        raise ValueError(f"`sam_points` {config.sam_points} must be 1, or as many as `nheads`, {trunk.nheads}")
    if config.relation and trunk.dec_layers < 2:
        raise ValueError(
            f"`relation` works from the second decoder layer on, `dec_layers` is {trunk.dec_layers}; leave one of them "
            "out"
        )
    if config.multiscale and trunk.backbone_level != 5:
        raise ValueError(
            f"`multiscale` uses C3, C4 and C5, `backbone_level` {trunk.backbone_level} one of them; pass "
            "`backbone_level` 5, or leave `multiscale` out"
        )
    if config.multiscale and not trunk.enc_layers and trunk.dec_layers < 5:
        raise ValueError(
            f"`multiscale` has three levels, of which `enc_layers` 0 and `dec_layers` {trunk.dec_layers} leave some "
            "unused; use an encoder, or at least 5 decoder layers"
        )


FAMILY = Family(
    name="sam_detr",
    config=Config,
    build=build,
    from_weights=read_settings,
    is_official=is_official,
    convert_official=convert_official,
    official_limits=OFFICIAL_LIMITS,
    images_per_step=lambda trunk: 8 if trunk.dilation else 16,
)
