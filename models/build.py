"""The table of families, and networks from settings."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from samdetr.models.criterion import SetCriterion
from samdetr.models.deformable_detr.family import FAMILY as DEFORMABLE_DETR
from samdetr.models.detector import Detector
from samdetr.models.family import Family
from samdetr.models.postprocess import postprocess
from samdetr.models.sam_detr.family import FAMILY as SAM_DETR
from samdetr.models.sap_detr.family import FAMILY as SAP_DETR
from samdetr.models.settings import FamilyConfig, Loss, Trunk

Postprocess = Callable[..., list[dict[str, Tensor]]]

FAMILIES: dict[str, Family] = {family.name: family for family in (SAM_DETR, DEFORMABLE_DETR, SAP_DETR)}


def register(family: Family) -> None:
    """Add a family from outside this project: `--model` then accepts it, and the command line has its flags.

    Raises:
        ValueError: there is another family of this name.
    """
    if FAMILIES.get(family.name, family) != family:
        raise ValueError(f"a family {family.name!r} is there already; give the new one another name")
    FAMILIES[family.name] = family


def build_model(
    trunk: Trunk, config: FamilyConfig | None = None, loss: Loss | None = None
) -> tuple[Detector, SetCriterion, Postprocess]:
    """The network with random weights, its criterion, and the function that turns its output into detections.

    Args:
        trunk: its `model` chooses the family.
        config: the family's own settings; None: as published.
        loss: weights of the losses; None: as published for the family.

    Raises:
        ValueError: settings that cannot be built; the message names the field and its value.
    """
    family, config = of_family(trunk, config)
    criterion = build_criterion(trunk, config, loss)
    network = family.build(trunk, config)
    network.auxiliary = criterion.auxiliary
    return network, criterion, partial(postprocess, top_k=config.top_k)


def build_criterion(trunk: Trunk, config: FamilyConfig | None = None, loss: Loss | None = None) -> SetCriterion:
    """The criterion alone. Arguments and errors are those of `build_model`."""
    family, config = of_family(trunk, config)
    criterion = family.criterion(loss or family.loss(), config)
    criterion.denoising = config.denoising_of(trunk.num_classes)
    return criterion


def of_family(trunk: Trunk, config: FamilyConfig | None) -> tuple[Family, FamilyConfig]:
    """The family that `trunk` chooses, and its settings. Raises ValueError."""
    if trunk.model not in FAMILIES:
        raise ValueError(f"`model` {trunk.model!r} is none of {', '.join(FAMILIES)}")
    family = FAMILIES[trunk.model]
    config = family.config() if config is None else config
    if not isinstance(config, family.config):
        raise ValueError(f"a {trunk.model} takes a {family.config.__module__}.Config, not {type(config).__module__}'s")
    return family, config
