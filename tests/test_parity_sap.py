"""SAP-DETR: equal numbers to the official implementation, in the manner of test_parity.py.

Four models. In the two named "live" a few weights are made from other names, so that the class heads tell queries apart
and points move; "q49" has a grid of 7 x 7 points, where the reach of a point in the heads is not the grid's cell.
"""

import re

import numpy as np
import pytest
import torch
from helpers import criterion_of, from_flags
from official import sap_detr as to_official
from parity import cases, extract
from parity.cases import FULL, USUAL_SINE, needs_full_figures

from samdetr.models.sam_detr import official_weights as sam_detr_weights
from samdetr.models.sap_detr.official_weights import convert_official, from_official, is_official

VARIANTS = extract.FAMILIES["sap_detr"]
# We see 5e-14, 3e-14 (relative) and 1e-12 (relative). As in test_parity.py, other tolerances hold on processors that
# round the sine otherwise; here the figures come with 1e-4 for gradients.
OUTPUTS = {"rtol": 0, "atol": 1e-9 if USUAL_SINE else 1e-5}
LOSSES = {"rtol": 1e-9 if USUAL_SINE else 1e-5, "atol": 1e-9}
GRADIENTS = {"rtol": 1e-9 if USUAL_SINE else 1e-4, "atol": 1e-9 if USUAL_SINE else 1e-7}
PREDICTED = ("pred_logits", "pred_boxes", "pred_objs", "pred_points")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    yield
    cases.weight.cache_clear()


@pytest.fixture(scope="module", params=VARIANTS)
def case(request):
    return cases.run("sap_detr", request.param, convert_official=convert_official)


def test_every_name_and_shape_is_accounted_for_both_ways(case):
    official = case.facts["state_dict"]
    assert is_official(official)
    assert not is_official(case.shapes)
    assert not sam_detr_weights.is_official(official)
    alias = {
        name for name in official if re.match(r"transformer\.decoder\.(ref_\w+_head|bbox_embed|point_embed)\.", name)
    }
    assert len(alias) == 2 * 4 + 2 * 6 * 6
    assert {from_official(name): shape for name, shape in official.items()} == case.shapes
    assert {to_official(name): shape for name, shape in case.shapes.items()} == {
        name: shape for name, shape in official.items() if name not in alias
    }
    for name in official.keys() - alias:
        assert to_official(from_official(name)) == name


def test_the_last_alias_wins(case):
    """`aliases` of the figures: the winning name, and those that it overwrites."""
    detector = from_flags(case.facts["args"])[0]
    official = {name: torch.zeros(shape) for name, shape in case.facts["state_dict"].items()}
    for number, (winner, losers) in enumerate(case.facts["aliases"].items(), 1):
        official[winner] += number
        for name in losers:
            official[name] -= number
    for state in (official, dict(reversed(official.items()))):
        detector.load_state_dict(convert_official(state))
        loaded = detector.state_dict()
        for number, (winner, losers) in enumerate(case.facts["aliases"].items(), 1):
            for name in (winner, *losers):
                assert (loaded[from_official(name)] == number).all(), name


def test_the_same_parameters_train(case):
    # A shared head is listed once, under its first name; so does PyTorch with ours.
    assert {from_official(name) for name in case.facts["trainable"]} == set(case.gradients)


def test_points_start_as_a_grid(case):
    points = from_flags(case.facts["args"])[0].decoder.points
    np.testing.assert_allclose(points.detach().numpy(), case.figures["init_refpoint_embed"], rtol=0, atol=2e-7)


@pytest.mark.parametrize("name", PREDICTED)
def test_outputs_of_all_layers(case, name):
    cases.assert_same_outputs(case.ours.outputs, case.figures, [name], **OUTPUTS)


def test_assignment(case):
    cases.assert_same_matches(case.ours.matches, case.figures)


def test_detections(case):
    assert [found["scores"].shape for found in case.detections] == 2 * [(300,)]
    if "fill_names" in case.facts:
        cases.assert_same_detections(case.detections, case.figures, OUTPUTS["atol"])
    for image, found in enumerate(case.detections):  # elsewhere all queries have the same scores, in any order
        np.testing.assert_allclose(found["scores"], case.figures[f"post_scores_{image}"], **OUTPUTS)


def test_losses(case):
    """Five terms a layer, and class_error of the last one."""
    cases.assert_same_losses(case, terms=5 * 6 + 1, **LOSSES)


def test_gradient_norm_of_every_parameter(case):
    cases.assert_same_gradients(case, from_official, **GRADIENTS)


def test_float32(case):
    cases.assert_near_in_float32(case, PREDICTED)


# With the published flags 50,391,687, of which 222,400 of the backbone and 612 of the points are frozen.
@pytest.mark.parametrize(
    ("change", "total"),
    [
        ({}, 50_391_687),
        ({"--dilation": None}, 50_391_687),
        ({"--backbone": "resnet101"}, 69_331_591),
        ({"--num_queries": "49"}, 50_390_145),  # 257 queries of 2 + 4 numbers less
        # 6 x (2 x 65,792 + 8,224) of the Gaussian's heads; 3 x (590,080 + 512) of the convolutions
        ({"--sdg": False}, 50_391_687 - 838_848),
        ({"--newconvinit": False}, 50_391_687 - 1_771_776),
        ({"--sdg": False, "--newconvinit": False}, 50_391_687 - 838_848 - 1_771_776),
        # 5 x (4 x 65,792 + 257 x 6) of heads that are shared
        ({"--bbox_embed_diff_each_layer": False}, 50_391_687 - 1_323_550),
        ({"--transformer_activation": "prelu"}, 50_391_687 + 12),  # a slope in each feed-forward branch
    ],
)
def test_number_of_parameters(change, total):
    flags = {"-m": "sap_detr", "--backbone": "resnet50", "--sdg": None, "--newconvinit": None}
    flags |= {"--bbox_embed_diff_each_layer": None} | change
    words = [word for pair in flags.items() if pair[1] is not False for word in pair if word]
    with torch.device("meta"):  # counts without memory
        detector, _, _ = from_flags(words)
    assert sum(p.numel() for p in detector.parameters()) == total
    points = 2 * detector.decoder.points.shape[0]
    assert sum(p.numel() for p in detector.parameters() if p.requires_grad) == total - 222_400 - points


def test_published_weights_of_the_losses():
    facts, _ = cases.read_figures("r50_live", family="sap_detr")
    criterion = criterion_of(facts["args"])
    weighted = criterion.weighted({name: torch.ones(()) for name in facts["losses"]})
    assert {name: weight.item() for name, weight in weighted.items()} == facts["loss_weights"]


@needs_full_figures
def test_compact_figures_are_those_of_the_full_ones():
    for variant in VARIANTS:
        full, compact = (
            extract.read_full(FULL, variant, family="sap_detr"),
            extract.read_compact(variant, family="sap_detr"),
        )
        kept = compact[1]["queries"]
        assert len(kept) in (28, 5)
        names = {"args", "state_dict", "losses", "total_loss", "grad_norms", "aliases", "loss_weights", "fill_names"}
        for name in names & full[0].keys():
            assert full[0][name] == compact[0][name], name
        assert set(full[0]["trainable"]) == set(compact[0]["trainable"])
        assert full[1].keys() == compact[1].keys()
        for name, values in full[1].items():
            wanted = kept if name == "queries" else values[:, :, kept] if name in PREDICTED else values
            np.testing.assert_array_equal(compact[1][name], wanted, err_msg=name)
