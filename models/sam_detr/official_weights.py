"""Names of the official SAM-DETR checkpoints <-> names here."""

from collections.abc import Iterable

from samdetr.models.weight_names import CONDITIONAL_DECODER, TRUNK, WeightNames, layer_rules

RULES = [
    *TRUNK,
    ("input_proj.{i}.", "projection.levels.{i}."),
    ("transformer.level_embed", "projection.level_embedding"),
    *CONDITIONAL_DECODER,
    *layer_rules(
        "decoder",
        ("sa_qpos_proj.", "self_attention.query_position."),
        ("sa_kpos_proj.", "self_attention.key_position."),
        ("ca_qpos_sine_proj.", "cross_attention.query_position."),
        ("ca_kpos_sine_proj.", "cross_attention.key_position."),
        ("point1.0.", "aligner.reduce."),
        *((f"point2.{2 * layer}.", f"aligner.point_head.layers.{layer}.") for layer in range(4)),
        ("attn1.", "aligner.content_gate."),
        ("attn2.", "aligner.position_gate."),
    ),
    ("query_embed.weight", "decoder.reference_boxes"),
    ("class_embed.{i}.", "decoder.class_heads.{i}."),
    ("bbox_embed.{i}.", "decoder.box_heads.{i}."),
]
_NAMES = WeightNames(RULES, aliases=("bbox_embed.",))
from_official, convert_official = _NAMES.from_official, _NAMES.convert


def is_official(names: Iterable[str]) -> bool:
    """Whether these are the names of an official SAM-DETR file."""
    names = set(names)
    return "query_embed.weight" in names and any(".point1." in name or ".sa_qcontent_proj." in name for name in names)
