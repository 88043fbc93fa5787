"""Our weights under official names, to make files as the official programs do."""

import re

from torch import Tensor

from samdetr.models.deformable_detr import official_weights as deformable_detr_weights
from samdetr.models.sam_detr import official_weights as sam_detr_weights
from samdetr.models.sap_detr import official_weights as sap_detr_weights
from samdetr.models.weight_names import Rules, translate

_OUR_HEAD_NAME = re.compile(r"decoder\.(queries\.)?(?P<kind>class|box)_heads?\.((?P<number>\d+)\.)?(?P<rest>.*)")


def _reversed(rules: Rules) -> Rules:
    return [(ours, official) for official, ours in rules]


def sam_detr(name: str) -> str | None:
    """Official name of one of our parameters or buffers; None if the official model has no such weight."""
    return translate(name, _reversed(sam_detr_weights.RULES))


def sap_detr(name: str) -> str | None:
    """The same for SAP-DETR."""
    return translate(name, _reversed(sap_detr_weights.RULES))


def deformable_detr(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under the official names, every alias included."""
    numbers = {match[1] for match in map(re.compile(r"decoder\.layers\.(\d+)\.").match, state) if match}
    two_stage = any(name.startswith("decoder.queries.box_head.") for name in state)
    refined = two_stage or any(name.startswith("decoder.box_heads.1.") for name in state)
    official = {}
    for name, tensor in state.items():
        head = _OUR_HEAD_NAME.fullmatch(name)
        if not head:
            official[translate(name, _reversed(deformable_detr_weights.RULES))] = tensor
            continue
        kind = "class_embed" if head["kind"] == "class" else "bbox_embed"
        number = head["number"] or str(len(numbers))
        for alias in [number] if refined else numbers:
            official[f"{kind}.{alias}.{head['rest']}"] = tensor
        if two_stage or (refined and kind == "bbox_embed"):
            official[f"transformer.decoder.{kind}.{number}.{head['rest']}"] = tensor
    return official
