"""Names of the official SAP-DETR checkpoints <-> names here."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from samdetr.models.weight_names import translate

_ENCODER = ("transformer.encoder.layers.{i}.", "encoder.layers.{i}.")
_DECODER = ("transformer.decoder.layers.{i}.", "decoder.layers.{i}.")
_IN_BOTH = [("linear", "feed_forward.linear"), ("activation.", "feed_forward.activation."), ("norm", "norm")]
_IN_ENCODER = [("self_attn.", "self_attention.")]
_IN_DECODER = [
    ("sa_qcontent_proj.", "self_attention.query_content."),
    ("sa_point_qpos_proj.", "self_attention.query_point."),
    ("sa_bbox_qpos_proj.", "self_attention.query_box."),
    ("sa_kcontent_proj.", "self_attention.key_content."),
    ("sa_point_kpos_proj.", "self_attention.key_point."),
    ("sa_bbox_kpos_proj.", "self_attention.key_box."),
    ("sa_v_proj.", "self_attention.value."),
    ("self_attn.out_proj.", "self_attention.output."),
    ("gaussian_proj.", "gaussian.head."),
    ("ca_qcontent_proj.", "cross_attention.query_content."),
    ("ca_point_qpos_proj.", "cross_attention.content_positions.point."),
    ("ca_bbox_qpos_proj.", "cross_attention.content_positions.box."),
    ("ca_qpos_sine_proj.", "cross_attention.query_point."),
    ("ca_bbox_qpos_sine_proj.", "cross_attention.query_box."),
    ("ca_kcontent_proj.", "cross_attention.key_content."),
    ("ca_kpos_proj.", "cross_attention.key_position."),
    ("ca_v_proj.", "cross_attention.value."),
    ("cross_attn.out_proj.", "cross_attention.output."),
]

# (official, ours), rules for models.weight_names.translate
_RULES = [
    ("backbone.0.body.", "backbone.body."),
    ("input_proj.", "projection.levels.0.0."),
    ("transformer.encoder.query_scales.{i}.", "encoder.layers.{i}.position_scale."),
    *((_ENCODER[0] + official, _ENCODER[1] + ours) for official, ours in (*_IN_ENCODER, *_IN_BOTH)),
    *((_DECODER[0] + official, _DECODER[1] + ours) for official, ours in (*_IN_DECODER, *_IN_BOTH)),
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

# The official model hangs these in two places; a file holds both, of the same values.
_SHARED = ("ref_point_head.", "ref_bbox_head.", "bbox_embed.", "point_embed.")
_ALIASES = tuple(f"transformer.decoder.{name}" for name in _SHARED)


def to_official(name: str) -> str | None:
    """Official name of one of our parameters or buffers; None where the official model has no such thing."""
    return translate(name, [(ours, official) for official, ours in _RULES])


def from_official(name: str) -> str | None:
    """Our name of an official parameter or buffer; None for names that are none."""
    return translate(name.removeprefix("transformer.decoder.") if name.startswith(_ALIASES) else name, _RULES)


def is_official(names: Iterable[str]) -> bool:
    """Whether these are the names of an official SAP-DETR file."""
    return {"refpoint_embed.weight", "refbbox_embed.weight"} <= set(names)


def convert_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An official state dict under our names; names without a counterpart stay, to be reported on loading."""
    return {from_official(name) or name: tensor for name, tensor in sorted(state.items(), key=_aliases_first)}


def _aliases_first(item: tuple[str, Tensor]) -> bool:
    # The official loading order: what stands under `bbox_embed.*` overwrites its alias.
    return not item[0].startswith(_ALIASES)
