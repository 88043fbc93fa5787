"""Names of the official SAM-DETR checkpoints <-> names here."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from samdetr.models.weight_names import translate

# (official, ours), rules for models.weight_names.translate
_RULES = [
    ("backbone.0.body.", "backbone.body."),
    ("input_proj.{i}.", "projection.levels.{i}."),
    ("transformer.level_embed", "projection.level_embedding"),
    ("transformer.encoder.layers.{i}.self_attn.", "encoder.layers.{i}.self_attention."),
    ("transformer.encoder.layers.{i}.linear", "encoder.layers.{i}.feed_forward.linear"),
    ("transformer.encoder.layers.{i}.norm", "encoder.layers.{i}.norm"),
    ("transformer.decoder.layers.{i}.sa_qcontent_proj.", "decoder.layers.{i}.self_attention.query_content."),
    ("transformer.decoder.layers.{i}.sa_qpos_proj.", "decoder.layers.{i}.self_attention.query_position."),
    ("transformer.decoder.layers.{i}.sa_kcontent_proj.", "decoder.layers.{i}.self_attention.key_content."),
    ("transformer.decoder.layers.{i}.sa_kpos_proj.", "decoder.layers.{i}.self_attention.key_position."),
    ("transformer.decoder.layers.{i}.sa_v_proj.", "decoder.layers.{i}.self_attention.value."),
    ("transformer.decoder.layers.{i}.self_attn.out_proj.", "decoder.layers.{i}.self_attention.output."),
    ("transformer.decoder.layers.{i}.ca_qcontent_proj.", "decoder.layers.{i}.cross_attention.query_content."),
    ("transformer.decoder.layers.{i}.ca_qpos_sine_proj.", "decoder.layers.{i}.cross_attention.query_position."),
    ("transformer.decoder.layers.{i}.ca_kcontent_proj.", "decoder.layers.{i}.cross_attention.key_content."),
    ("transformer.decoder.layers.{i}.ca_kpos_sine_proj.", "decoder.layers.{i}.cross_attention.key_position."),
    ("transformer.decoder.layers.{i}.ca_v_proj.", "decoder.layers.{i}.cross_attention.value."),
    ("transformer.decoder.layers.{i}.cross_attn.out_proj.", "decoder.layers.{i}.cross_attention.output."),
    ("transformer.decoder.layers.{i}.point1.0.", "decoder.layers.{i}.aligner.reduce."),
    ("transformer.decoder.layers.{i}.point2.0.", "decoder.layers.{i}.aligner.point_head.layers.0."),
    ("transformer.decoder.layers.{i}.point2.2.", "decoder.layers.{i}.aligner.point_head.layers.1."),
    ("transformer.decoder.layers.{i}.point2.4.", "decoder.layers.{i}.aligner.point_head.layers.2."),
    ("transformer.decoder.layers.{i}.point2.6.", "decoder.layers.{i}.aligner.point_head.layers.3."),
    ("transformer.decoder.layers.{i}.attn1.", "decoder.layers.{i}.aligner.content_gate."),
    ("transformer.decoder.layers.{i}.attn2.", "decoder.layers.{i}.aligner.position_gate."),
    ("transformer.decoder.layers.{i}.linear", "decoder.layers.{i}.feed_forward.linear"),
    ("transformer.decoder.layers.{i}.norm", "decoder.layers.{i}.norm"),
    ("query_embed.weight", "decoder.reference_boxes"),
    ("class_embed.{i}.", "decoder.class_heads.{i}."),
    ("bbox_embed.{i}.", "decoder.box_heads.{i}."),
]

# The official model hangs its box heads in two places; a file holds both, of the same values.
_ALIAS = "transformer.decoder.bbox_embed."


def to_official(name: str) -> str | None:
    """Official name of one of our parameters or buffers; None where the official model has no such thing."""
    return translate(name, [(ours, official) for official, ours in _RULES])


def from_official(name: str) -> str | None:
    """Our name of an official parameter or buffer; None for names that are none."""
    return translate(name.removeprefix("transformer.decoder.") if name.startswith(_ALIAS) else name, _RULES)


def is_official(names: Iterable[str]) -> bool:
    """Whether these are the names of an official SAM-DETR file."""
    names = set(names)
    return "query_embed.weight" in names and any(".point1." in name or ".sa_qcontent_proj." in name for name in names)


def convert_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An official state dict under our names; names without a counterpart stay, to be reported on loading."""
    return {from_official(name) or name: tensor for name, tensor in sorted(state.items(), key=_aliases_first)}


def _aliases_first(item: tuple[str, Tensor]) -> bool:
    # The official loading order: what stands under `bbox_embed.*` overwrites its alias.
    return not item[0].startswith(_ALIAS)
