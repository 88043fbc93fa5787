"""Names of the official SAP-DETR checkpoints <-> names here."""

from collections.abc import Iterable

from samdetr.models.weight_names import CONDITIONAL_DECODER, TRUNK, WeightNames, layer_rules

RULES = [
    ("input_proj.", "projection.levels.0.0."),
    *TRUNK,
    ("transformer.encoder.query_scales.{i}.", "encoder.layers.{i}.position_scale."),
    *layer_rules("encoder", ("activation.", "feed_forward.activation.")),
    *CONDITIONAL_DECODER,
    *layer_rules(
        "decoder",
        ("sa_point_qpos_proj.", "self_attention.query_point."),
        ("sa_bbox_qpos_proj.", "self_attention.query_box."),
        ("sa_point_kpos_proj.", "self_attention.key_point."),
        ("sa_bbox_kpos_proj.", "self_attention.key_box."),
        ("gaussian_proj.", "gaussian.head."),
        ("ca_point_qpos_proj.", "cross_attention.content_positions.point."),
        ("ca_bbox_qpos_proj.", "cross_attention.content_positions.box."),
        ("ca_qpos_sine_proj.", "cross_attention.query_point."),
        ("ca_bbox_qpos_sine_proj.", "cross_attention.query_box."),
        ("ca_kpos_proj.", "cross_attention.key_position."),
        ("activation.", "feed_forward.activation."),
    ),
    ("transformer.decoder.norm.", "decoder.norm."),
    ("transformer.decoder.query_scale.", "decoder.position_scale."),
    ("transformer.point_transfer.", "decoder.initial_content."),
    ("refpoint_embed.weight", "decoder.points"),
    ("refbbox_embed.weight", "decoder.distances"),
    ("ref_point_head.", "decoder.point_position."),
    ("ref_bbox_head.", "decoder.box_position."),
    ("class_embed.{i}.", "decoder.class_heads.{i}."),
    ("obj_embed.", "decoder.object_head."),
    ("bbox_embed.{i}.", "decoder.distance_heads.{i}."),
    ("point_embed.{i}.", "decoder.point_heads.{i}."),
]
_NAMES = WeightNames(RULES, aliases=("ref_point_head.", "ref_bbox_head.", "bbox_embed.", "point_embed."))
from_official, convert_official = _NAMES.from_official, _NAMES.convert


def is_official(names: Iterable[str]) -> bool:
    """Whether these are the names of an official SAP-DETR file."""
    return {"refpoint_embed.weight", "refbbox_embed.weight"} <= set(names)
