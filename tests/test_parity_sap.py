"""SAP-DETR: equal numbers to the official implementation, in the manner of test_parity.py.

Four models. In the two named "live" a few weights are made from other names, so that the class heads tell queries apart
and points move; "q49" has a grid of 7 x 7 points, where the reach of a point in the heads is not the grid's cell.
"""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import reference_fill
import torch
from parity import extract
from test_parity import FULL, USUAL_SINE, evaluate, needs_full_figures

from main import build_parser
from models import build_model
from models.build import FAMILIES
from models.sam_detr import official_weights as sam_detr_weights
from models.sap_detr.official_weights import convert_official, from_official, is_official, to_official

VARIANTS = extract.FAMILIES["sap_detr"]
# We see 5e-14, 3e-14 (relative) and 1e-12 (relative). As in test_parity.py, other tolerances hold on processors that
# round the sine otherwise; here the figures come with 1e-4 for gradients.
OUTPUTS = {"rtol": 0, "atol": 1e-9 if USUAL_SINE else 1e-5}
LOSSES = {"rtol": 1e-9 if USUAL_SINE else 1e-5, "atol": 1e-9}
GRADIENTS = {"rtol": 1e-9 if USUAL_SINE else 1e-4, "atol": 1e-9 if USUAL_SINE else 1e-7}
FLOAT32 = {"rtol": 1e-3, "atol": 1e-3}
PREDICTED = ("pred_logits", "pred_boxes", "pred_objs", "pred_points")


def read_figures(variant: str) -> tuple[dict, dict[str, np.ndarray]]:
    if FULL.is_dir():
        return extract.read_full(FULL, variant, family="sap_detr")
    return extract.read_compact(variant, family="sap_detr")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def stacked(outputs: dict, name: str) -> np.ndarray:
    """(layers, B, Q, ...)."""
    return np.stack([layer[name].detach().numpy() for layer in (*outputs["aux_outputs"], outputs)])


@pytest.fixture(scope="module", params=VARIANTS)
def case(request) -> SimpleNamespace:
    """What the figures say (`facts`, `figures`) and what our network makes of the same weights; not the network."""
    facts, figures = read_figures(request.param)
    detector, criterion, postprocess = build_model(build_parser().parse_args(facts["args"]))
    detector.eval()
    criterion.eval()
    grid = detector.decoder.points.detach().clone()
    filled_as = facts.get("fill_names", {})
    state = {
        name: torch.from_numpy(reference_fill.weights(filled_as.get(name, name), tuple(shape)))
        for name, shape in facts["state_dict"].items()
    }
    detector.double().load_state_dict(convert_official(state), strict=True)
    ours = evaluate(detector, criterion, torch.float64)
    ours.total.backward()
    trainable = {name: p for name, p in detector.named_parameters() if p.requires_grad}
    gradients = {name: p.grad.norm().item() for name, p in trainable.items()}
    shapes = {name: list(value.shape) for name, value in detector.state_dict().items()}
    detections = postprocess(ours.outputs, ours.sizes)
    with torch.no_grad():
        in_float32 = evaluate(detector, criterion, torch.float32)
    return SimpleNamespace(
        live="fill_names" in facts, facts=facts, figures=figures, grid=grid, shapes=shapes, ours=ours,
        gradients=gradients, detections=detections, in_float32=in_float32,
    )  # fmt: skip


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
    detector = build_model(build_parser().parse_args(case.facts["args"]))[0]
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
    np.testing.assert_allclose(case.grid.numpy(), case.figures["init_refpoint_embed"], rtol=0, atol=2e-7)


@pytest.mark.parametrize("name", PREDICTED)
def test_outputs_of_all_layers(case, name):
    ours = stacked(case.ours.outputs, name)[:, :, case.figures["queries"]]
    np.testing.assert_allclose(ours, case.figures[name], **OUTPUTS)


def test_assignment(case):
    matches = case.ours.matches
    first_target = 0
    for image, number in enumerate(reference_fill.OBJECTS):
        here = matches.image == image
        np.testing.assert_array_equal(matches.query[here], case.figures[f"match_pred_{image}"])
        np.testing.assert_array_equal(matches.target[here] - first_target, case.figures[f"match_target_{image}"])
        first_target += number


def test_detections(case):
    for image, found in enumerate(case.detections):
        names = ("scores", "labels", "boxes")
        wanted = {name: torch.from_numpy(case.figures[f"post_{name}_{image}"]) for name in names}
        assert found["scores"].shape == (300,)
        torch.testing.assert_close(found["scores"], wanted["scores"], **OUTPUTS)
        if not case.live:
            continue  # all queries have the same scores there, so their order means nothing
        same = found["labels"][:, None] == wanted["labels"]
        same &= (found["scores"][:, None] - wanted["scores"]).abs() < OUTPUTS["atol"]
        same &= (found["boxes"][:, None] - wanted["boxes"]).abs().amax(-1) < 1000 * OUTPUTS["atol"]  # pixels
        assert same.any(0).all()
        assert same.any(1).all()


def test_losses(case):
    assert case.ours.losses.keys() == case.facts["losses"].keys()
    names = list(case.ours.losses)
    assert len(names) == 5 * 6 + 1  # five terms a layer, and class_error of the last one
    wanted = [case.facts["losses"][name] for name in names]
    np.testing.assert_allclose([case.ours.losses[name] for name in names], wanted, **LOSSES)
    np.testing.assert_allclose(case.ours.total.item(), case.facts["total_loss"], **LOSSES)


def test_gradient_norm_of_every_parameter(case):
    wanted = {from_official(name): norm for name, norm in case.facts["grad_norms"].items()}
    assert wanted.keys() == case.gradients.keys()
    for name, norm in wanted.items():
        np.testing.assert_allclose(case.gradients[name], norm, err_msg=name, **GRADIENTS)


def test_float32(case):
    """All that is predicted and every loss term within 1e-3 of the float64 figures, and the same assignment."""
    in_float32, figures = case.in_float32, case.figures
    for name in PREDICTED:
        ours = stacked(in_float32.outputs, name)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours[:, :, figures["queries"]], figures[name], err_msg=name, **FLOAT32)
    assert torch.equal(in_float32.matches.query, case.ours.matches.query)
    for name, wanted in case.facts["losses"].items():
        np.testing.assert_allclose(in_float32.losses[name], wanted, err_msg=name, **FLOAT32)


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
        detector, _, _ = build_model(build_parser().parse_args(words))
    assert sum(p.numel() for p in detector.parameters()) == total
    points = 2 * detector.decoder.points.shape[0]
    assert sum(p.numel() for p in detector.parameters() if p.requires_grad) == total - 222_400 - points


def test_published_weights_of_the_losses():
    facts, _ = read_figures("r50_live")
    args = build_parser().parse_args(facts["args"])
    criterion = FAMILIES["sap_detr"].criterion(args)
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
