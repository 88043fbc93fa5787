"""Deformable DETR (Zhu et al., ICLR 2021): deformable attention in the encoder and in the decoder."""

from dataclasses import dataclass

from samdetr.models.deformable_detr.decoder import DeformableDecoder, DeformableDecoderLayer
from samdetr.models.deformable_detr.official_weights import convert_official, is_official
from samdetr.models.detector import Detector
from samdetr.models.encoder import DeformableEncoder
from samdetr.models.family import (
    OFFICIAL_LIMITS,
    Family,
    build_aligner,
    build_backbone,
    build_projection,
    coarse_to_fine,
    read_settings,
)
from samdetr.models.settings import AlignerConfig, Trunk
from samdetr.util.settings import flag, with_default


@dataclass(frozen=True, kw_only=True)
class Config(AlignerConfig):
    """Settings of Deformable DETR beside the trunk's. The aligner is ours."""

    sam_resample: str = with_default(AlignerConfig, "sam_resample", "off")
    num_feature_levels: int = flag(
        4, "1: the last stage alone; more than C3 to C5: smaller ones", least=1, most=100, carried=True
    )
    with_box_refine: bool = flag(False, "a layer's boxes are the next one's references; separate heads", carried=True)
    two_stage: bool = flag(False, "queries are the encoder's best proposals; needs --with_box_refine", carried=True)
    enc_n_points: int = flag(4, "points a head samples in each level, encoder", least=1, most=1000, carried=True)
    dec_n_points: int = flag(4, "the same, decoder", least=1, most=1000, carried=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.two_stage and not self.with_box_refine:
            raise ValueError("`two_stage` needs `with_box_refine`: proposals are boxes to refine; add that flag")


def build(trunk: Trunk, config: Config) -> Detector:
    """The network with random weights. Raises ValueError for settings that do not go together."""
    # The coarsest stages up to the last one used; levels beyond them are convolved from that one.
    stages = range(3, trunk.backbone_level + 1)[-config.num_feature_levels :]
    backbone = build_backbone(trunk, levels=stages)
    projection = build_projection(
        trunk,
        config,
        backbone,
        extra_levels=config.num_feature_levels - len(stages),
        level_embedding=True,  # of a single level, too
        xavier=True,
    )
    sizes, num_levels = trunk.layer_sizes, config.num_feature_levels
    # One head: the heads of deformable attention share one query and its reference.
    aligner = build_aligner(trunk, config, num_heads=1)
    decoder = DeformableDecoder(
        layer=DeformableDecoderLayer(sizes, num_levels=num_levels, num_points=config.dec_n_points, aligner=aligner),
        levels=coarse_to_fine(trunk.dec_layers, num_levels),
        num_queries=trunk.num_queries,
        num_classes=trunk.num_classes,
        refine=config.with_box_refine,
        two_stage=config.two_stage,
        denoising=config.denoising > 0,
    )
    encoder = DeformableEncoder(
        sizes, num_layers=trunk.enc_layers, num_levels=num_levels, num_points=config.enc_n_points
    )
    return Detector(backbone=backbone, projection=projection, encoder=encoder, decoder=decoder)


FAMILY = Family(
    name="deformable_detr",
    config=Config,
    build=build,
    from_weights=read_settings,
    is_official=is_official,
    convert_official=convert_official,
    official_limits=OFFICIAL_LIMITS,
    images_per_step=lambda trunk: 32,
    defaults={
        "lr": 2e-4,
        "lr_backbone": 2e-5,
        "lr_linear_proj_names": ("reference_points", "sampling_offsets"),
        "dim_feedforward": 1024,
        "input_proj_norm": "group",
    },
)
