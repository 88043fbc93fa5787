"""Names of the official Deformable DETR checkpoints <-> names here.

The official model lists a class head and a box head for every layer, even if all layers share them, and lists the heads
of refined models twice. The pair after the last layer's makes proposals. Here each parameter has one name.
"""

import re
from collections.abc import Iterable

from torch import Tensor

from samdetr.models.weight_names import TRUNK, layer_rules, translate

RULES = [
    *TRUNK,
    ("input_proj.{i}.", "projection.levels.{i}."),
    ("transformer.level_embed", "projection.level_embedding"),
    *layer_rules(
        "decoder",
        ("self_attn.", "self_attention."),
        ("norm2.", "norm1."),  # numbered by their use here, and by their definition there
        ("cross_attn.", "cross_attention."),
        ("norm1.", "norm2."),
        ("linear", "feed_forward.linear"),
        ("norm3.", "norm3."),
    ),
    ("query_embed.weight", "decoder.queries.embedding"),
    ("transformer.reference_points.", "decoder.queries.reference_points."),
    ("transformer.enc_output.", "decoder.queries.memory_projection."),
    ("transformer.enc_output_norm.", "decoder.queries.memory_norm."),
    ("transformer.pos_trans.", "decoder.queries.box_projection."),
    ("transformer.pos_trans_norm.", "decoder.queries.box_norm."),
]
_HEADS = {"class_embed": "class_head", "bbox_embed": "box_head"}
_HEAD_NAME = re.compile(rf"(transformer\.decoder\.)?({'|'.join(_HEADS)})\.(\d+)\.(.*)")


def is_official(names: Iterable[str]) -> bool:
    """Whether these are the names of an official Deformable DETR file."""
    return any(re.match(r"transformer\.decoder\.layers\.\d+\.cross_attn\.sampling_offsets", name) for name in names)


def from_official(names: Iterable[str]) -> dict[str, str]:
    """Our name of each official parameter or buffer of a model; unknown names stay.

    Several official names may be one parameter of ours. They come in the order in which loading the official file
    copies them: the last one wins.
    """
    names = list(names)
    refined = any(name.startswith("transformer.decoder.bbox_embed.") for name in names)
    layers = {match[1] for match in map(re.compile(r"transformer\.decoder\.layers\.(\d+)\.").match, names) if match}
    ours = {}
    for name in sorted(names, key=_loading_order):
        head = _HEAD_NAME.fullmatch(name)
        if not head:
            ours[name] = translate(name, RULES) or name
            continue
        _, kind, number, rest = head.groups()
        if refined and number not in layers:
            ours[name] = f"decoder.queries.{_HEADS[kind]}.{rest}"
        else:
            ours[name] = f"decoder.{_HEADS[kind]}s.{number if refined else 0}.{rest}"
    return ours


def _loading_order(name: str) -> tuple[bool, int]:
    head = _HEAD_NAME.fullmatch(name)
    return (not head[1], int(head[3])) if head else (False, 0)


def convert_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An official state dict under our names. Unknown names stay, and loading reports them."""
    return {name: state[official] for official, name in from_official(state).items()}
