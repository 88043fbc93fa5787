"""Official names of weights <-> names here, by tables of rules (official, ours)."""

import re
from collections.abc import Sequence

from torch import Tensor

Rules = Sequence[tuple[str, str]]


def translate(name: str, rules: Rules) -> str | None:
    """The name with its beginning replaced by the first rule (from, to) whose `from` it starts with; {i} stands for a
    number in both. None if no rule matches."""
    for source, target in rules:
        match = re.match(re.escape(source).replace(r"\{i\}", r"(\d+)"), name)
        if match:
            return target.replace("{i}", match.group(1) if match.groups() else "") + name[match.end() :]
    return None


def layer_rules(stack: str, *rules: tuple[str, str]) -> Rules:
    """Rules for every layer of a `stack`, "encoder" or "decoder"."""
    return [
        (f"transformer.{stack}.layers.{{i}}.{source}", f"{stack}.layers.{{i}}.{target}") for source, target in rules
    ]


# What the official models share: all have backbone and encoder of Deformable DETR's code.
TRUNK = [
    ("backbone.0.body.", "backbone.body."),
    *layer_rules("encoder", ("self_attn.", "self_attention."), ("linear", "feed_forward.linear"), ("norm", "norm")),
]
# The decoder layers of SAM-DETR and SAP-DETR come from Conditional DETR's code.
CONDITIONAL_DECODER = layer_rules(
    "decoder",
    ("sa_qcontent_proj.", "self_attention.query_content."),
    ("sa_kcontent_proj.", "self_attention.key_content."),
    ("sa_v_proj.", "self_attention.value."),
    ("self_attn.out_proj.", "self_attention.output."),
    ("ca_qcontent_proj.", "cross_attention.query_content."),
    ("ca_kcontent_proj.", "cross_attention.key_content."),
    ("ca_v_proj.", "cross_attention.value."),
    ("cross_attn.out_proj.", "cross_attention.output."),
    ("linear", "feed_forward.linear"),
    ("norm", "norm"),
)


class WeightNames:
    """The names of a family's weights.

    Args:
        rules: (official, ours), for `translate`.
        aliases: beginnings of official names that a file holds a second time, with the same values, below
            `transformer.decoder.`.
    """

    def __init__(self, rules: Rules, *, aliases: tuple[str, ...]):
        self.rules = rules
        self.aliases = tuple(f"transformer.decoder.{name}" for name in aliases)

    def from_official(self, name: str) -> str | None:
        """Our name of an official parameter or buffer; None if it is unknown."""
        return translate(
            name.removeprefix("transformer.decoder.") if name.startswith(self.aliases) else name, self.rules
        )

    def convert(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """An official state dict under our names. Unknown names stay, and loading reports them."""
        # The official loading order: aliases first, which the names without the prefix overwrite.
        names = sorted(state, key=lambda name: not name.startswith(self.aliases))
        return {self.from_official(name) or name: state[name] for name in names}
