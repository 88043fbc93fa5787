"""Equal numbers to the official Deformable DETR: its weights in, its figures out. See test_parity.py."""

import re

import numpy as np
import pytest
import torch
from helpers import from_flags
from official import deformable_detr as to_official
from parity import cases, extract

from samdetr.models.deformable_detr.official_weights import convert_official, from_official, is_official

FAMILY = "deformable_detr"
VARIANTS = extract.FAMILIES[FAMILY]
PREDICTED = ("pred_logits", "pred_boxes")


def tolerances(variant: str) -> dict[str, dict[str, float]]:
    """We see 1e-14 for one level. For more, two roundings in float32 differ in the last place: the divisor of the
    position grid where a map has 16 valid rows (16 + 1e-6 depends on the order of its sum, which is SAM-DETR's here),
    and the logarithm of the proposals (processors differ). They move logits by 2.3e-7, losses by 1.5e-8, gradients by
    5e-8."""
    if not cases.USUAL_SINE:
        outputs, losses, gradients, floor = 1e-5, 1e-5, 1e-5, 1e-7
    elif variant.startswith("single_scale"):
        outputs, losses, gradients, floor = 1e-9, 1e-9, 1e-9, 1e-9
    else:
        outputs, losses, gradients, floor = 1e-6, 1e-7, 1e-6, 1e-8
    return {
        "outputs": {"rtol": 0, "atol": outputs},
        "losses": {"rtol": losses, "atol": floor},
        "gradients": {"rtol": gradients, "atol": floor},
    }


# Of the published models at 300 queries: all, and those that train.
PARAMETERS = {
    "single_scale": (34_066_593, 33_844_193),
    "single_scale_dc5": (34_066_593, 33_844_193),
    "multi_scale": (40_069_665, 39_847_265),
    "multi_scale_refine": (40_849_660, 40_627_260),
    "multi_scale_refine_two_stage": (41_181_529, 40_959_129),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    yield
    cases.weight.cache_clear()


@pytest.fixture(scope="module", params=VARIANTS)
def case(request):
    case = cases.run(FAMILY, request.param, convert_official=convert_official)
    case.tolerances = tolerances(request.param)
    return case


def test_every_name_and_shape_is_accounted_for(case):
    official = case.facts["state_dict"]
    assert is_official(official)
    assert not is_official(case.shapes)
    ours = from_official(official)
    assert ours.keys() == official.keys()
    assert {name: official[theirs] for theirs, name in ours.items()} == case.shapes
    empty = {name: torch.empty(shape, device="meta") for name, shape in case.shapes.items()}
    assert {name: list(value.shape) for name, value in to_official(empty).items()} == official
    # What shares a name here are the official model's names of one parameter, of which the last one read counts.
    names = {}
    for theirs, name in ours.items():
        names.setdefault(name, []).append(theirs)
    assert {group[-1]: sorted(group[:-1]) for group in names.values() if len(group) > 1} == {
        winner: sorted(overwritten) for winner, overwritten in case.facts["aliases"].items()
    }


def test_the_same_parameters_train(case):
    ours = from_official(case.facts["state_dict"])
    assert {ours[name] for name in case.facts["trainable"]} == case.gradients.keys()


def test_outputs_of_all_layers(case):
    cases.assert_same_outputs(case.ours.outputs, case.figures, PREDICTED, **case.tolerances["outputs"])


def test_assignment_and_detections(case):
    cases.assert_same_matches(case.ours.matches, case.figures)
    cases.assert_same_detections(case.detections, case.figures, case.tolerances["outputs"]["atol"])


def test_proposals(case):
    """All of them, which ones become queries, in which order, and what they are matched with."""
    if "enc_topk" not in case.figures:
        assert "enc_outputs" not in case.ours.outputs
        return
    proposals, figures = case.ours.outputs["enc_outputs"], case.figures
    logits, boxes = (proposals[name].detach() for name in ("pred_logits", "pred_boxes"))
    step = 1 if figures["enc_pred_logits"].shape == logits.shape else extract.EVERY
    np.testing.assert_allclose(logits[:, ::step], figures["enc_pred_logits"], **case.tolerances["outputs"])
    np.testing.assert_allclose(boxes, figures["enc_pred_boxes"], **case.tolerances["outputs"])
    np.testing.assert_array_equal(logits[..., 0].topk(figures["enc_topk"].shape[1]).indices, figures["enc_topk"])
    objects = [target | {"labels": torch.zeros_like(target["labels"])} for target in case.ours.targets]
    (matches,) = case.ours.matcher([proposals], objects)
    cases.assert_same_matches(matches, figures, prefix="match_enc")


def test_losses(case):
    cases.assert_same_losses(case, **case.tolerances["losses"])


def test_gradient_norm_of_every_parameter(case):
    ours = from_official(case.facts["state_dict"])
    cases.assert_same_gradients(case, ours.__getitem__, **case.tolerances["gradients"])


def test_float32(case):
    cases.assert_near_in_float32(case, PREDICTED)


@pytest.mark.parametrize("variant", VARIANTS)
def test_number_of_parameters(variant):
    flags = re.sub(r"--num_queries \d+", "", " ".join(cases.read_figures(variant, family=FAMILY)[0]["args"])).split()
    with torch.device("meta"):  # counts without memory
        detector, _, _ = from_flags(["--model", FAMILY, *flags])
    numbers = [p.numel() for p in detector.parameters()], [p.numel() for p in detector.parameters() if p.requires_grad]
    assert tuple(map(sum, numbers)) == PARAMETERS[variant]


@pytest.mark.parametrize("order", [1, -1])
def test_the_last_alias_wins(order):
    """As loading the official file does, whatever the order in ours."""
    heads = {f"class_embed.{i}.bias": torch.full((3,), float(i)) for i in range(6)}
    state = convert_official(dict([*heads.items()][::order]) | {"foreign.weight": torch.zeros(1)})
    assert state.keys() == {"decoder.class_heads.0.bias", "foreign.weight"}
    assert torch.equal(state["decoder.class_heads.0.bias"], torch.full((3,), 5.0))

    layer = {"transformer.decoder.layers.2.norm1.bias": torch.zeros(1)}  # the last one; head 3 makes proposals
    for number, ours in ((2, "decoder.box_heads.2"), (3, "decoder.queries.box_head")):
        name = f"bbox_embed.{number}.layers.0.bias"
        pair = [(f"transformer.decoder.{name}", torch.zeros(3)), (name, torch.ones(3))]
        state = convert_official(dict(pair[::order]) | layer)
        assert state.keys() == {f"{ours}.layers.0.bias", "decoder.layers.2.norm2.bias"}
        assert torch.equal(state[f"{ours}.layers.0.bias"], torch.ones(3))


@cases.needs_full_figures
def test_compact_figures_are_those_of_the_full_ones():
    for variant in VARIANTS:
        full = extract.read_full(cases.FULL, variant, family=FAMILY)
        compact = extract.read_compact(variant, family=FAMILY)
        for name in ("args", "state_dict", "losses", "total_loss", "grad_norms", "aliases"):
            assert full[0][name] == compact[0][name], name
        ours = from_official(full[0]["state_dict"])  # the compact tables name all aliases of a parameter
        assert {ours[name] for name in full[0]["trainable"]} == {ours[name] for name in compact[0]["trainable"]}
        assert full[1].keys() == compact[1].keys()
        fewer = {"queries": 0, "pred_logits": 2, "enc_pred_logits": 1}  # axis
        for name, values in full[1].items():
            if name in fewer:
                values = np.take(values, range(0, values.shape[fewer[name]], extract.EVERY), axis=fewer[name])
            np.testing.assert_array_equal(compact[1][name], values, err_msg=name)
