"""Boxes, matching, losses, post-processing, and the formulas of attention: against libraries and hand-made numbers."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
import torchvision
from helpers import criterion_of, from_flags, settings
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from samdetr.models.build import FAMILIES
from samdetr.models.criterion import (
    SetCriterion,
    box_losses,
    cardinality_error,
    class_error,
    focal_loss,
    sigmoid_focal_loss,
)
from samdetr.models.feature_levels import valid_ratio
from samdetr.models.layers import inverse_sigmoid
from samdetr.models.matcher import HungarianMatcher, focal_class_cost, giou_cost, l1_cost, position_class_cost
from samdetr.models.position_encoding import grid_points, sine_encoding
from samdetr.models.postprocess import postprocess
from samdetr.models.quality_losses import ia_bce_loss, mal_loss
from samdetr.models.spatial_prior import gaussian_log_prior
from samdetr.util.box_ops import box_area, cxcywh_to_xyxy, generalized_iou, xyxy_to_cxcywh
from samdetr.util.padded_images import pad_images


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def random_boxes(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """cx, cy, w, h in [0, 1]; some reach out of the image."""
    return torch.rand(*shape, 4, dtype=dtype) * torch.tensor([1, 1, 0.8, 0.8]) + 0.01


# ---- Boxes


def test_box_formats():
    torch.testing.assert_close(cxcywh_to_xyxy(torch.tensor([5.0, 3, 4, 2])), torch.tensor([3.0, 2, 7, 4]))
    torch.testing.assert_close(box_area(torch.tensor([3.0, 2, 7, 4])), torch.tensor(8.0))
    boxes = random_boxes(5, 7)
    torch.testing.assert_close(xyxy_to_cxcywh(cxcywh_to_xyxy(boxes)), boxes, rtol=0, atol=1e-15)


def test_generalized_iou_equals_torchvision():
    a, b = cxcywh_to_xyxy(random_boxes(20)), cxcywh_to_xyxy(0.2 * random_boxes(30))
    wanted = torchvision.ops.generalized_box_iou(a, b)
    assert wanted.min() < -0.5  # some are far apart,
    assert wanted.max() > 0.05  # others overlap
    torch.testing.assert_close(generalized_iou(a[:, None], b), wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(generalized_iou(a, b[:20]), wanted.diagonal(), rtol=0, atol=1e-12)


def test_generalized_iou_by_hand():
    # Two 2 x 2 squares that share a corner: 1 / 7 - (9 - 7) / 9; the same square; squares side by side, a gap of 2.
    a = torch.tensor([[0.0, 0, 2, 2]] * 3)
    b = torch.tensor([[1.0, 1, 3, 3], [0, 0, 2, 2], [4, 0, 6, 2]])
    torch.testing.assert_close(generalized_iou(a, b), torch.tensor([1 / 7 - 2 / 9, 1, -4 / 12]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_boxes_have_finite_values_and_gradients(dtype):
    # Points, lines and a box: every pair, also of a box without area with itself, where a plain IoU would be 0 / 0.
    boxes = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0.3], [0.5, 0.5, 0.3, 0], [0.5, 0.5, 0.3, 0.3]], dtype=dtype)
    boxes.requires_grad_()
    overlap = generalized_iou(cxcywh_to_xyxy(boxes)[:, None], cxcywh_to_xyxy(boxes).detach())
    assert (overlap >= -1).all()
    assert (overlap <= 1).all()
    assert overlap[3, 3] == 1
    assert overlap[0, 0] == 0
    overlap.sum().backward()
    assert torch.isfinite(boxes.grad).all()


# ---- Matching

COSTS = [(2.0, focal_class_cost(alpha=0.25)), (5.0, l1_cost), (2.0, giou_cost)]


def random_case(*numbers: int, queries: int = 7, classes: int = 5, dtype: torch.dtype = torch.float64):
    """Outputs, and targets with so many objects in each image."""
    outputs = {
        "pred_logits": 2 * torch.randn(len(numbers), queries, classes, dtype=dtype),
        "pred_boxes": random_boxes(len(numbers), queries, dtype=dtype),
    }
    targets = [{"labels": torch.randint(classes, (n,)), "boxes": random_boxes(n, dtype=dtype)} for n in numbers]
    return outputs, targets


def plain_cost(outputs: dict, targets: list, image: int) -> np.ndarray:
    """The cost of every query and object of an image, one number at a time: 2 class + 5 L1 + 2 (-GIoU)."""
    logits, boxes = outputs["pred_logits"][image], outputs["pred_boxes"][image]
    target = targets[image]
    cost = np.empty((len(logits), len(target["labels"])))
    for q in range(cost.shape[0]):
        for t in range(cost.shape[1]):
            p = 1 / (1 + math.exp(-logits[q, target["labels"][t]]))
            gain = -0.25 * (1 - p) ** 2 * math.log(p + 1e-8) + 0.75 * p**2 * math.log(1 - p + 1e-8)
            l1 = sum(abs(boxes[q, i].item() - target["boxes"][t, i].item()) for i in range(4))
            pair = torchvision.ops.box_convert(torch.stack([boxes[q], target["boxes"][t]]), "cxcywh", "xyxy")
            giou = torchvision.ops.generalized_box_iou(pair[:1], pair[1:]).item()
            cost[q, t] = 2 * gain + 5 * l1 - 2 * giou
    return cost


def pairs_of(matches, image: int, first_target: int = 0) -> set[tuple[int, int]]:
    here = matches.image == image
    return set(zip(matches.query[here].tolist(), (matches.target[here] - first_target).tolist()))


def test_costs_and_assignment():
    outputs, targets = random_case(3, 5, 7)
    (matches,) = HungarianMatcher(costs=COSTS)([outputs], targets)
    assert [m.dtype for m in vars(matches).values()] == [torch.int64] * 3
    first = 0
    for image, target in enumerate(targets):
        n = len(target["labels"])
        wanted = plain_cost(outputs, targets, image)
        one = {name: value[image, None] for name, value in outputs.items()}
        ours = sum(weight * cost(one, target) for weight, cost in COSTS)
        np.testing.assert_allclose(ours[0].numpy(), wanted, rtol=0, atol=1e-12)
        assert pairs_of(matches, image, first) == set(zip(*(index.tolist() for index in linear_sum_assignment(wanted))))
        if n == 3:  # every assignment there is
            best = min(permutations(range(7), n), key=lambda queries: sum(wanted[q, t] for t, q in enumerate(queries)))
            assert pairs_of(matches, image) == {(q, t) for t, q in enumerate(best)}
        first += n


def test_matching_together_equals_one_by_one():
    """Images of a batch, with empty ones between, and decoder layers, matched in one go."""
    layers, targets = [random_case(2, 0, 4, 0)[0] for _ in range(3)], random_case(2, 0, 4, 0)[1]
    matcher = HungarianMatcher(costs=COSTS)
    together = matcher(layers, targets)
    assert len(together) == 3
    assert {pairs for m in together for pairs in pairs_of(m, 1) | pairs_of(m, 3)} == set()
    for matches, layer in zip(together, layers):
        for image, first in ((0, 0), (2, 2)):
            alone = {name: value[[image]] for name, value in layer.items()}
            (single,) = matcher([alone], [targets[image]])
            assert pairs_of(matches, image, first) == pairs_of(single, 0)
    assert len({frozenset(pairs_of(m, 2)) for m in together}) > 1  # layers are matched anew


def test_nothing_to_match():
    outputs, targets = random_case(0, 0)
    matches = HungarianMatcher(costs=COSTS)([outputs, outputs], targets)
    assert [index.shape for m in matches for index in vars(m).values()] == [(0,)] * 6


def test_more_objects_than_queries():
    outputs, targets = random_case(6, 2, queries=4)
    (matches,) = HungarianMatcher(costs=COSTS)([outputs], targets)
    rows, columns = linear_sum_assignment(plain_cost(outputs, targets, 0))
    assert pairs_of(matches, 0) == set(zip(rows.tolist(), columns.tolist()))
    assert sorted(q for q, _ in pairs_of(matches, 0)) == [0, 1, 2, 3]
    assert len(pairs_of(matches, 1, first_target=6)) == 2
    terms = criterion()(outputs | {"aux_outputs": []}, targets)
    assert all(torch.isfinite(term) for term in terms.values())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_costs_that_are_not_finite_are_matched_last(bad):
    outputs, targets = random_case(3)
    outputs["pred_boxes"][0, 2] = bad
    outputs["pred_logits"][0, 5] = math.nan
    (matches,) = HungarianMatcher(costs=COSTS)([outputs], targets)
    assert {q for q, _ in pairs_of(matches, 0)} <= {0, 1, 3, 4, 6}
    outputs["pred_boxes"][:] = bad
    (matches,) = HungarianMatcher(costs=COSTS)([outputs], targets)
    assert len(pairs_of(matches, 0)) == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_cost_that_is_not_finite_is_large_even_if_it_is_negative(bad):
    costs = torch.tensor([[[bad, 3.0], [5.0, bad], [4.0, 9.0]]])  # of three queries and two objects
    (matches,) = HungarianMatcher(costs=[(1.0, lambda outputs, targets: costs[..., targets["labels"]])])(
        [{"pred_logits": torch.zeros(1, 3, 2)}], [{"labels": torch.arange(2)}]
    )
    assert pairs_of(matches, 0) == {(0, 1), (2, 0)}  # 3 + 4; the others without a bad cost: 3 + 5, 5 + 9


@pytest.mark.parametrize(
    ("flags", "alpha"),
    [
        ("--focal_alpha 0.75", 0.25),  # fixed officially
        ("--model deformable_detr --focal_alpha 0.75", 0.25),
        ("--focal_alpha 0.75 --set_cost_alpha 0.5", 0.5),
        ("-m sap_detr --focal_alpha 0.75", 0.75),  # passed on officially
        ("-m sap_detr --focal_alpha 0.75 --set_cost_alpha 0.1", 0.1),
    ],
)
def test_alpha_of_the_matching_cost(flags, alpha):
    """Of the probability 1/2 the class cost is (2 alpha - 1) / 4 x log 2, whatever the loss."""
    found = settings(flags)
    criterion = FAMILIES[found.trunk.model].criterion(found.loss, found.family)
    weight, cost = criterion.matcher.costs[0]
    outputs = {"pred_logits": torch.zeros(1, 1, 2), "pred_objs": torch.full((1, 1, 1), 99.0)}
    value = cost(outputs, {"labels": torch.tensor([1])}).item()
    assert (weight, value) == (2, pytest.approx((2 * alpha - 1) / 4 * math.log(2), rel=1e-6))
    assert found.loss.focal_alpha == 0.75


def test_a_matcher_without_costs():
    with pytest.raises(ValueError, match="`set_cost_class`"):
        HungarianMatcher(costs=[(0.0, l1_cost)])


# ---- Losses


def criterion(**changes) -> SetCriterion:
    options = {
        "matcher": HungarianMatcher(costs=COSTS),
        "losses": [focal_loss(alpha=0.25), box_losses, cardinality_error],
        "final_losses": [class_error],
        "weights": {"loss_ce": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0},
    }
    return SetCriterion(**(options | changes)).eval()


@pytest.mark.parametrize("alpha", [0.25, 0.6])
def test_focal_loss_equals_torchvision(alpha):
    logits = (4 * torch.randn(3, 9, 5, dtype=torch.float64)).requires_grad_()
    wanted = (torch.rand(3, 9, 5) < 0.2).double()
    ours = sigmoid_focal_loss(logits, wanted, alpha=alpha)
    theirs = torchvision.ops.sigmoid_focal_loss(logits, wanted, alpha=alpha, gamma=2)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_loss_terms_of_a_batch():
    """Every term of a batch from libraries, given the assignment: sums over matched pairs (all logits for the classes),
    divided by the number of objects in the batch."""
    outputs, targets = random_case(2, 0, 4)
    earlier, _ = random_case(2, 0, 4)
    terms = criterion()(outputs | {"aux_outputs": [earlier]}, targets)
    names = ["loss_ce", "loss_bbox", "loss_giou", "cardinality_error"]
    assert list(terms) == [*names, "class_error", *(f"{name}_0" for name in names)]
    for prediction, suffix in ((outputs, ""), (earlier, "_0")):
        wanted = torch.zeros_like(prediction["pred_logits"])
        l1 = giou = right = 0
        for image, target in enumerate(targets):
            for q, t in zip(*linear_sum_assignment(plain_cost(prediction, targets, image))):
                wanted[image, q, target["labels"][t]] = 1
                pair = torch.stack([prediction["pred_boxes"][image, q], target["boxes"][t]])
                l1 += (pair[0] - pair[1]).abs().sum().item() / 6
                corners = torchvision.ops.box_convert(pair, "cxcywh", "xyxy")
                giou += torchvision.ops.generalized_box_iou_loss(corners[0], corners[1]).item() / 6
                right += int(prediction["pred_logits"][image, q].argmax() == target["labels"][t])
        focal = torchvision.ops.sigmoid_focal_loss(prediction["pred_logits"], wanted, reduction="sum") / 6
        # A query counts as found unless its best class is the last one.
        found = [sum(int(row.argmax()) != 4 for row in logits) for logits in prediction["pred_logits"]]
        cardinality = np.mean([abs(n - len(target["labels"])) for n, target in zip(found, targets)])
        for name, value in zip(names, (focal.item(), l1, giou, cardinality)):
            # torchvision's loss has an epsilon of 1e-7 in its denominators
            assert terms[name + suffix].item() == pytest.approx(value, rel=1e-5 if name == "loss_giou" else 1e-12), name
        if not suffix:
            assert terms["class_error"].item() == pytest.approx(100 - 100 * right / 6)


def test_targets_fed_back_as_predictions():
    """Boxes cost nothing, classes next to nothing, and every layer says the same."""
    targets = random_case(3, 0, 2)[1]
    logits = torch.full((3, 7, 5), -20.0, dtype=torch.float64)
    boxes = random_boxes(3, 7)
    for image, target in enumerate(targets):
        for t, label in enumerate(target["labels"]):
            query = 6 - 2 * t
            logits[image, query, label] = 20
            boxes[image, query] = target["boxes"][t]
    layer = {"pred_logits": logits, "pred_boxes": boxes}
    terms = criterion()(layer | {"aux_outputs": [layer, layer]}, targets)
    assert terms["loss_bbox"] == 0
    assert terms["loss_giou"].abs() < 1e-12
    assert terms["loss_ce"] < 1e-12
    assert terms["class_error"] == 0
    for name in ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error"):
        assert terms[name] == terms[f"{name}_0"] == terms[f"{name}_1"]


def test_weights_and_auxiliary_losses():
    outputs, targets = random_case(2)
    outputs["aux_outputs"] = [random_case(2)[0] for _ in range(11)]  # a suffix of two digits
    with_all = criterion()
    terms = with_all(outputs, targets)
    weighted = with_all.weighted(terms)
    assert weighted.keys() == {n for n in terms if not n.startswith(("cardinality", "class"))}
    assert len(weighted) == 3 * 12
    for name, value in weighted.items():
        assert value == terms[name] * (5 if "bbox" in name else 2)
    last_only = criterion(auxiliary=False)(outputs, targets)
    assert last_only == {name: terms[name] for name in last_only}
    assert len(last_only) == 5


def test_a_batch_without_objects():
    outputs, targets = random_case(0, 0)
    outputs = {name: value.requires_grad_() for name, value in outputs.items()}
    terms = criterion()(outputs | {"aux_outputs": []}, targets)
    assert terms["loss_bbox"] == terms["loss_giou"] == 0
    assert terms["class_error"] == 100
    logits = outputs["pred_logits"]
    wanted = torchvision.ops.sigmoid_focal_loss(
        logits, torch.zeros_like(logits), reduction="sum"
    )  # divided by 1, not 0
    torch.testing.assert_close(terms["loss_ce"], wanted, rtol=1e-12, atol=0)
    sum(terms[name] for name in ("loss_ce", "loss_bbox", "loss_giou")).backward()
    assert torch.equal(outputs["pred_boxes"].grad, torch.zeros(2, 7, 4))


def test_the_error_of_classes_with_one_object():
    """The average over matched queries, of which there is one: right or wrong."""
    outputs, targets = random_case(1, queries=1)
    outputs["pred_logits"] = torch.tensor([[[0.0, 1, 0, 0, 0]]], dtype=torch.float64)
    for label, wanted in ((1, 0), (2, 100)):
        targets[0]["labels"] = torch.tensor([label])
        assert criterion()(outputs | {"aux_outputs": []}, targets)["class_error"] == wanted


# ---- Post-processing


def test_detections_by_hand():
    """Two queries, three classes: all six pairs, best first, in pixels of an image 100 high and 200 wide."""
    probabilities = torch.tensor([[[0.2, 0.9, 0.1], [0.6, 0.3, 0.7]]], dtype=torch.float64)
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.1, 0.9, 0.4, 0.4]]], dtype=torch.float64)
    outputs = {"pred_logits": probabilities.logit(), "pred_boxes": boxes}
    first, second = [80.0, 30.0, 120.0, 70.0], [-20.0, 70.0, 60.0, 110.0]  # not clipped
    (found,) = postprocess(outputs, torch.tensor([[100, 200]]))
    torch.testing.assert_close(found["scores"], torch.tensor([0.9, 0.7, 0.6, 0.3, 0.2, 0.1], dtype=torch.float64))
    assert found["labels"].tolist() == [1, 2, 0, 1, 0, 2]
    assert found["queries"].tolist() == [0, 1, 1, 1, 0, 0]
    wanted = torch.tensor([first, second, second, second, first, first], dtype=torch.float64)
    torch.testing.assert_close(found["boxes"], wanted)
    (found,) = postprocess(outputs, torch.tensor([[100, 200]]), top_k=2)
    assert found["labels"].tolist() == [1, 2]


def test_a_hundred_detections_an_image():
    outputs, _ = random_case(0, 0, queries=30)
    found = postprocess(outputs, torch.tensor([[10, 20], [1000, 10]]))
    for image, detections in enumerate(found):
        assert {name: value.shape for name, value in detections.items()} == {
            "scores": (100,), "labels": (100,), "queries": (100,), "boxes": (100, 4),
        }  # fmt: skip
        wanted = np.sort(outputs["pred_logits"][image].sigmoid().flatten().numpy())[::-1][:100]
        np.testing.assert_array_equal(detections["scores"], wanted)


# ---- Spatial prior, positions


def test_spatial_prior_equals_the_dense_formula():
    points, scales = 5 * torch.rand(2, 3, 2, dtype=torch.float64), torch.randn(2, 3, 2, dtype=torch.float64)
    prior = gaussian_log_prior(points, scales, height=4, width=6)
    y, x = torch.meshgrid(torch.arange(4) + 0.5, torch.arange(6) + 0.5, indexing="ij")
    cells = torch.stack([x, y], -1)  # (4, 6, 2)
    distance = cells - points[:, :, None, None]
    wanted = -((scales[:, :, None, None] ** 2) * distance**2).sum(-1) / 8
    torch.testing.assert_close(prior.dense(), wanted.flatten(2), rtol=0, atol=1e-12)
    # By hand: a point in the middle of cell (1, 0); the cell to the right of it, and the one below that.
    prior = gaussian_log_prior(torch.tensor([0.5, 1.5]), torch.tensor([2.0, 4.0]), height=3, width=2)
    assert prior.dense()[2:].tolist() == [0, -0.5, -2, -2.5]


def test_sine_encoding_by_hand():
    """Eight channels: sine and cosine of y at the periods 1 and 100 (of 2 pi), then of x."""
    encoded = sine_encoding(torch.tensor([0.25, 0.5]), num_channels=8)
    y, x = math.pi, math.pi / 2
    wanted = [f(v / period) for v in (y, x) for period in (1, 100) for f in (math.sin, math.cos)]
    torch.testing.assert_close(encoded, torch.tensor(wanted), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="6"):
        sine_encoding(torch.zeros(2), num_channels=6)


def test_periods_are_float32_for_points_of_any_type():
    """As published: what the sines of a float64 point say of them, at angles small enough to turn back."""
    sines = sine_encoding(torch.tensor([0.0, 1e-3], dtype=torch.float64), num_channels=24)[:12:2]
    periods = 2e-3 * math.pi / sines.asin()
    torch.testing.assert_close(periods, 10000 ** (torch.arange(6, dtype=torch.float64) / 6), rtol=1e-6, atol=0)
    torch.testing.assert_close(periods, periods.float().double(), rtol=1e-11, atol=0)  # a float32 number each


def test_positions_of_rows_that_are_all_padding_are_the_published_ones():
    """-0.5 divided by what float32 leaves of (-0.5 + 1e-6) + 0.5. Encoded, it reaches RoIAlign at an image's border."""
    half, eps = np.float32(0.5), np.float32(1e-6)
    points = grid_points(torch.tensor([[[False, False], [True, True]]]))
    assert points[0, 1, :, 0].tolist() == [-half / ((-half + eps) + half)] * 2
    assert -half / ((-half + eps) + half) != -half / eps


def test_grid_points_and_valid_ratio_by_hand():
    """A map of 2 x 4 cells whose last column is padding: centres at 1/6, 3/6, 5/6 of the width; the height is whole."""
    padding = torch.tensor([[[False, False, False, True]] * 2])
    points = grid_points(padding)
    assert points.shape == (1, 2, 4, 2)
    torch.testing.assert_close(points[0, 0, :3, 0], torch.tensor([1 / 6, 3 / 6, 5 / 6]), rtol=0, atol=1e-6)
    torch.testing.assert_close(points[0, :, 0, 1], torch.tensor([1 / 4, 3 / 4]), rtol=0, atol=1e-6)
    torch.testing.assert_close(valid_ratio(padding), torch.tensor([[0.75, 1.0]]))


def test_inverse_sigmoid():
    p = torch.tensor([0.3, 0.999], dtype=torch.float64)
    torch.testing.assert_close(inverse_sigmoid(p), (p / (1 - p)).log())
    limit = math.log(1e-5)
    wanted = torch.tensor([limit, limit, -limit, -limit], dtype=torch.float64)
    torch.testing.assert_close(inverse_sigmoid(torch.tensor([-1.0, 0, 1, 2], dtype=torch.float64)), wanted)


def test_padded_images():
    batch = pad_images([torch.ones(3, 2, 5), torch.ones(3, 4, 3)])
    assert batch.images.shape == (2, 3, 4, 5)
    for image, (height, width) in enumerate([(2, 5), (4, 3)]):
        inside = torch.zeros(4, 5, dtype=torch.bool)
        inside[:height, :width] = True
        assert torch.equal(batch.padding[image], ~inside)
        assert torch.equal(batch.images[image], inside.float().expand(3, -1, -1))
    converted = batch.to(torch.float64)
    assert (converted.images.dtype, converted.padding.dtype) == (torch.float64, torch.bool)


# ---- Class losses and a cost that know how well a box fits


def plain_fit(predicted: Tensor, wanted: Tensor) -> tuple[float, float]:
    """IoU and generalised IoU of two boxes, by torchvision."""
    pair = torchvision.ops.box_convert(torch.stack([predicted, wanted]), "cxcywh", "xyxy")
    return (
        torchvision.ops.box_iou(pair[:1], pair[1:]).item(),
        torchvision.ops.generalized_box_iou(pair[:1], pair[1:]).item(),
    )


@pytest.mark.parametrize("kind", ["ia_bce", "mal"])
def test_quality_losses_one_number_at_a_time(kind):
    """Values by the papers' formulas, gradients by finite differences with the quality held."""
    outputs, targets = random_case(2, 0, 3, queries=4, classes=3)
    outputs["pred_boxes"][0, 1] = targets[0]["boxes"][0] + 0.01  # one that fits, others that hardly do
    logits = outputs["pred_logits"].requires_grad_()
    criterion = SetCriterion(
        matcher=HungarianMatcher(costs=COSTS), losses=[{"ia_bce": ia_bce_loss(), "mal": mal_loss()}[kind]], weights={}
    )
    (matches,) = criterion.matcher([outputs], targets)
    labels, boxes = (torch.cat([target[name] for target in targets]) for name in ("labels", "boxes"))
    held = {}
    for image, query, target in zip(matches.image.tolist(), matches.query.tolist(), matches.target.tolist()):
        overlap = plain_fit(outputs["pred_boxes"][image, query], boxes[target])[0]
        label = labels[target].item()
        p = 1 / (1 + math.exp(-logits[image, query, label].item()))
        held[image, query, label] = max(p**0.25 * overlap**0.75, 0.01) if kind == "ia_bce" else overlap**1.5
    assert max(held.values()) > 0.5

    def plain(values: Tensor) -> float:
        total = 0.0
        for place in np.ndindex(*values.shape):
            p = 1 / (1 + math.exp(-values[place].item()))
            if place in held:
                total -= held[place] * math.log(p) + (1 - held[place]) * math.log(1 - p)
            else:
                weight = p**2 if kind == "ia_bce" else (1 / (1 + math.exp(-logits[place].item()))) ** 1.5
                total -= weight * math.log(1 - p)
        return total / 5

    found = criterion({**outputs, "aux_outputs": []}, targets)["loss_ce"]
    assert found.item() == pytest.approx(plain(logits.detach()), rel=1e-12)
    (gradient,) = torch.autograd.grad(found, logits)
    for place in [*held, (1, 0, 0), (0, 3, 2)]:
        step = torch.zeros_like(logits)
        step[place] = 1e-6
        slope = (plain((logits + step).detach()) - plain((logits - step).detach())) / 2e-6
        assert gradient[place].item() == pytest.approx(slope, rel=1e-6, abs=1e-9)


def test_quality_losses_of_hopeless_and_perfect_boxes_are_finite():
    targets = [{"labels": torch.tensor([0, 1]), "boxes": torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.2, 0.2]])}]
    for logit in (-200.0, 200.0):
        boxes = torch.tensor([[[0.2, 0.2, 0.1, 0.1], [0.5, 0.5, 0.0, 0.0]]])
        logits = torch.full((1, 2, 3), logit, requires_grad=True)
        for loss in (ia_bce_loss(), mal_loss()):
            criterion = SetCriterion(matcher=HungarianMatcher(costs=COSTS), losses=[loss], weights={})
            value = criterion({"pred_logits": logits, "pred_boxes": boxes, "aux_outputs": []}, targets)["loss_ce"]
            (gradient,) = torch.autograd.grad(value, logits)
            assert value.isfinite()
            assert gradient.isfinite().all()


def test_position_modulated_cost_one_number_at_a_time():
    outputs, targets = random_case(3, queries=4, classes=3)
    found = position_class_cost(alpha=0.25)(outputs, targets[0])
    for query in range(4):
        for target in range(3):
            box = outputs["pred_boxes"][0, query]
            fit = math.sqrt((plain_fit(box, targets[0]["boxes"][target])[1] + 1) / 2)
            p = fit / (1 + math.exp(-outputs["pred_logits"][0, query, targets[0]["labels"][target]].item()))
            wanted = -0.25 * (1 - p) ** 2 * math.log(p + 1e-8) + 0.75 * p**2 * math.log(1 - p + 1e-8)
            assert found[0, query, target].item() == pytest.approx(wanted, rel=1e-9)


def test_flags_choose_class_loss_and_cost():
    outputs, targets = random_case(2, 3)
    outputs["aux_outputs"] = []
    values = {}
    for flags in ("", "--class_loss ia_bce", "--class_loss mal", "--class_cost position"):
        criterion = criterion_of(flags)
        values[flags] = criterion(outputs, targets)["loss_ce"].item()
    assert len(set(values.values())) >= 3
    for flags in ("--class_loss mal", "--class_cost position"):
        with pytest.raises(ValueError, match="has no effect on --model sap_detr"):
            from_flags(f"-m sap_detr {flags}")
