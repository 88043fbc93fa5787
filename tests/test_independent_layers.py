"""Which weights of like layers are equal at the start, as the official constructors leave them: layers start as copies,
then most of their matrices are drawn anew. Layers that stay equal learn alike at first, which no later test shows."""

import re

import pytest
import torch
from helpers import from_flags
from parity import extract

from samdetr.models.sam_detr.official_weights import from_official

SMALL = "--backbone resnet18 --hidden_dim 32 --nheads 4 --dim_feedforward 64 --num_queries 16"
FAMILIES = {
    "deformable_detr": "-m deformable_detr",
    "deformable_detr, one level": "-m deformable_detr --num_feature_levels 1",
    "deformable_detr, two stages": "-m deformable_detr --with_box_refine --two_stage",
    "deformable_detr, aligner": "-m deformable_detr --aligner",
    "sap_detr": "-m sap_detr --newconvinit --sdg --bbox_embed_diff_each_layer --transformer_activation prelu",
    "sap_detr, shared heads": "-m sap_detr",
    "sam_detr, no aligner": "--no_aligner",
}
# Of Deformable DETR and SAP-DETR, read off the official constructors: the first pattern that occurs in a name decides.
SHARED = (
    (r"(class|box|distance|point)_heads", True),  # clones
    (r"sampling_offsets|attention_weights|norm|activation|levels\.\*\.1\.", True),  # constants
    (r"bias$", True),  # copies of the first layer's; those of attention are 0
    (r"weight$", False),
)


def like_parameters(names) -> dict[str, list[str]]:
    """Names that differ in the number of a layer, a head or a level alone."""
    groups: dict[str, list[str]] = {}
    for name in names:
        if number := re.match(r"((?:encoder|decoder)\.layers|decoder\.\w+_heads|projection\.levels)\.\d+", name):
            groups.setdefault(f"{number[1]}.*{name[number.end() :]}", []).append(name)
    return {key: group for key, group in groups.items() if len(group) > 1}


def assert_shared(state: dict[str, torch.Tensor], group: list[str], shared: bool) -> None:
    pairs = [(a, b) for number, a in enumerate(group) for b in group[:number] if state[a].shape == state[b].shape]
    for a, b in pairs:
        assert torch.equal(state[a], state[b]) == shared, (a, b)


@pytest.mark.parametrize("variant", extract.INITIALISED)
def test_sam_detr_shares_what_the_official_figures_show(variant):
    """Values of one draw that all have the same mean, deviation and maximum are copies."""
    figures = {from_official(name): figure for name, figure in extract.read_initialisation(variant).items()}
    flags = extract.read_compact(variant)[0]["args"]
    state = from_flags([*flags, *SMALL.split()])[0].state_dict()
    groups = like_parameters(figures)
    assert len(groups) > 50
    independent = 0
    for group in groups.values():
        drawn = {(figures[name]["mean"], figures[name]["std"], figures[name]["max_abs"]) for name in group}
        assert_shared(state, group, shared=len(drawn) == 1)
        independent += len(drawn) > 1
    assert independent > 20


@pytest.mark.parametrize("flags", FAMILIES.values(), ids=FAMILIES)
def test_the_other_families(flags):
    state = from_flags([*SMALL.split(), *flags.split()])[0].state_dict()
    groups = like_parameters(state)
    assert any("encoder.layers" in name for name in groups)
    assert any("decoder.layers" in name for name in groups)
    for name, group in groups.items():
        if re.search(r"box_heads\..*\.2\.bias$", name) and "two_stage" not in flags:
            group = group[1:]  # the first head's boxes start with another width and height
        shared = next(shared for pattern, shared in SHARED if re.search(pattern, name))
        assert_shared(state, group, shared)
