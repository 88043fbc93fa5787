"""SAP-DETR's parts: points and boxes, the side-directed Gaussian, costs and losses, the published oddities."""

import math

import pytest
import torch
import torchvision
from helpers import TINY_SAP, build_tiny, criterion_of, from_flags
from torch import Tensor, nn

from samdetr.models.encoder import DenseEncoderLayer
from samdetr.models.feature_levels import FeatureLevel
from samdetr.models.layers import FeedForward, LayerSizes
from samdetr.models.matcher import Matches
from samdetr.models.position_encoding import grid_points
from samdetr.models.postprocess import postprocess
from samdetr.models.sap_detr.losses import (
    corner_box_losses,
    corner_l1_cost,
    giou_cost,
    inner_loss,
    object_class_cost,
    object_loss,
    outside_cost,
)
from samdetr.models.sap_detr.points import boxes_around, corners_around, grid_cell, grid_logits, move_points, move_sides
from samdetr.models.sap_detr.side_directed_gaussian import SideDirectedGaussian
from samdetr.util.box_ops import cxcywh_to_xyxy, generalized_iou, iou
from samdetr.util.padded_images import pad_images

# No width is its default, as in helpers.TINY; 16 queries make a grid of 4 x 4, the published reach of a point is 1/20.
EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def tiny(*flags: str) -> nn.Module:
    """In float64 and evaluation mode, all weights random."""
    return build_tiny(*flags, network=TINY_SAP)[0].double().eval()


def layers_of(outputs: dict) -> list[dict]:
    return [*outputs["aux_outputs"], {name: value for name, value in outputs.items() if name != "aux_outputs"}]


# ---- Points and boxes


def test_the_grid_of_306_and_of_squares():
    points = grid_logits(306).sigmoid()
    assert points.shape == (306, 2)
    # Row by row from the top left: x in eighteenths, y in seventeenths; 0 is as near as a logit of 0.001 brings it.
    torch.testing.assert_close(points[1], torch.tensor([1 / 18, 0.001 / 1.001]))
    torch.testing.assert_close(points[18 + 2], torch.tensor([2 / 18, 1 / 17]))
    torch.testing.assert_close(points[-1], torch.tensor([17 / 18, 16 / 17]))
    torch.testing.assert_close(grid_logits(49).sigmoid()[8], torch.tensor([1 / 7, 1 / 7]))
    assert (grid_cell(306), grid_cell(49), grid_cell(1)) == ((1 / 18, 1 / 17), (1 / 7, 1 / 7), (1.0, 1.0))
    for number in (49**2, 103**2):  # where n * (1 / n) is not 1 in floating point
        assert grid_logits(number).shape == (number, 2)


@pytest.mark.parametrize(("number", "advice"), [(300, "289 or 324"), (305, "289 or 324"), (2, "1 or 4")])
def test_a_number_that_makes_no_grid(number, advice):
    with pytest.raises(ValueError, match=rf"`num_queries` {number} makes no grid.*306 \(18 x 17\).*{advice}"):
        grid_logits(number)


def test_points_move_right_and_down_within_their_cell():
    start = torch.rand(2, 50, 2, dtype=torch.float64)
    cell = torch.tensor([0.2, 0.1], dtype=torch.float64)
    points = start
    for _ in range(4):
        points = move_points(5 * torch.randn_like(start), points, start, cell)
        assert ((points > start) & (points < start + cell)).all()
    # By hand: moved by 0.05 of the image, offset 0.7: 0.2 / (1 + exp(-(0.7 + log(0.05 / 0.95)))).
    offset, before, start = torch.tensor([[0.7, 0.7], [0.35, 0.3], [0.3, 0.3]], dtype=torch.float64)
    moved = move_points(offset, before, start, cell)
    assert moved[0].item() == pytest.approx(0.3 + 0.2 / (1 + math.exp(-0.7) * 19))
    assert moved[1].item() == pytest.approx(0.3 + 0.1 / (1 + math.exp(-0.7) * 999))  # 0 counts as 0.001


def test_boxes_from_points_and_sides():
    points, distances = torch.tensor([0.5, 0.4]), torch.tensor([0.1, 0.2, 0.3, 0.1])
    torch.testing.assert_close(corners_around(points, distances), torch.tensor([0.4, 0.2, 0.8, 0.5]))
    torch.testing.assert_close(boxes_around(points, distances), torch.tensor([0.6, 0.35, 0.4, 0.3]))
    torch.testing.assert_close(move_sides(torch.zeros(4), distances), distances)


# ---- Side-directed Gaussian


def test_gaussian_number_by_number():
    heads, height, width = 4, 3, 5
    module = SideDirectedGaussian(hidden_dim=32, num_heads=heads).double()
    queries = torch.randn(2, 6, 32, dtype=torch.float64)
    points, sides = torch.rand(2, 6, 2, dtype=torch.float64), torch.rand(2, 6, 4, dtype=torch.float64)
    ours = module(queries, points, sides, height=height, width=width).dense()
    assert ours.shape == (2, heads, 6, height * width)
    made = module.head(queries)  # x, y of the first head, of the second, ...; then the scales alike
    for b in range(2):
        for q in range(6):
            left, top, right, bottom = sides[b, q].tolist()
            for head in range(heads):
                share_x, share_y = (math.tanh(made[b, q, 2 * head + axis].item()) for axis in (0, 1))
                scale_x, scale_y = made[b, q, 2 * heads + 2 * head : 2 * heads + 2 * head + 2].tolist()
                x = width * (points[b, q, 0].item() + share_x * (right if share_x > 0 else left))
                y = height * (points[b, q, 1].item() + share_y * (bottom if share_y > 0 else top))
                for cell in range(height * width):
                    row, column = divmod(cell, width)
                    wanted = -((scale_x * (column + 0.5 - x)) ** 2 + (scale_y * (row + 0.5 - y)) ** 2) / 8
                    assert ours[b, head, q, cell].item() == pytest.approx(wanted, abs=1e-12)


# ---- Shared parts that SAP-DETR uses otherwise


def test_iou_and_eps():
    a = cxcywh_to_xyxy(0.3 * torch.rand(20, 4, dtype=torch.float64) + 0.1)
    b = cxcywh_to_xyxy(0.3 * torch.rand(30, 4, dtype=torch.float64) + 0.1)
    wanted = torchvision.ops.box_iou(a, b)
    assert wanted.max() > 0.1
    torch.testing.assert_close(iou(a[:, None], b), wanted, **EXACT)
    # Two 2 x 2 squares that share a corner of 1: 1 / 7 and 1 / 7 - (9 - 7) / 9; a large eps shows where it goes.
    pair = torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 3]])
    torch.testing.assert_close(iou(pair[0], pair[1], eps=1.0), torch.tensor(1 / 8))
    torch.testing.assert_close(generalized_iou(pair[0], pair[1], eps=1.0), torch.tensor(1 / 8 - 2 / 10))


def test_grid_of_far_corners():
    padding = torch.tensor([[[False, False, True], [False, False, True]]])
    x, y = grid_points(padding, centred=False).unbind(-1)
    torch.testing.assert_close(x, torch.tensor([[[0.5, 1, 1], [0.5, 1, 1]]]))
    torch.testing.assert_close(y[..., :2], torch.tensor([[[0.5, 0.5], [1.0, 1]]]))
    assert (y[..., 2] == 0).all()  # columns of padding


def test_prelu_and_scaled_positions():
    branch = FeedForward(LayerSizes(hidden_dim=2, num_heads=1, feedforward_dim=2, dropout=0.0, activation="prelu"))
    for linear in (branch.linear1, branch.linear2):
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
    torch.testing.assert_close(branch(torch.tensor([-2.0, 3.0])), torch.tensor([-0.5, 3.0]))  # slope 0.25

    sizes = LayerSizes(hidden_dim=8, num_heads=2, feedforward_dim=8, dropout=0.0)
    layer, plain = DenseEncoderLayer(sizes, scale_position=True), DenseEncoderLayer(sizes)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "position_scale" not in k})
    tokens, position, padding = torch.randn(1, 5, 8), torch.randn(1, 5, 8), torch.zeros(1, 5, dtype=torch.bool)
    scaled = position * layer.position_scale(tokens)
    torch.testing.assert_close(layer(tokens, position, padding), plain(tokens, scaled, padding))


# ---- Costs and losses


def case(*numbers: int, queries: int = 5, classes: int = 3):
    outputs = {
        "pred_logits": torch.randn(len(numbers), queries, classes, dtype=torch.float64),
        "pred_objs": torch.randn(len(numbers), queries, 1, dtype=torch.float64),
        "pred_boxes": torch.rand(len(numbers), queries, 4, dtype=torch.float64),
        "pred_points": torch.rand(len(numbers), queries, 2, dtype=torch.float64),
    }
    targets = [
        {"labels": torch.randint(classes, (n,)), "boxes": torch.rand(n, 4, dtype=torch.float64)} for n in numbers
    ]
    return outputs, targets


def test_costs_number_by_number():
    outputs, targets = case(4)
    ours = {
        "class": object_class_cost(alpha=0.25)(outputs, targets[0])[0],
        "l1": corner_l1_cost(outputs, targets[0])[0],
        "giou": giou_cost(outputs, targets[0])[0],
        "outside": outside_cost(outputs, targets[0])[0],
    }
    for q in range(5):
        for t in range(4):
            label = targets[0]["labels"][t]
            sigmoids = outputs["pred_logits"][0, q, label].sigmoid() * outputs["pred_objs"][0, q, 0].sigmoid()
            p = sigmoids.item()
            gain = -0.25 * (1 - p) ** 2 * math.log(p + 1e-8) + 0.75 * p**2 * math.log(1 - p + 1e-8)
            assert ours["class"][q, t].item() == pytest.approx(gain, abs=1e-12)
            pair = torch.stack([outputs["pred_boxes"][0, q], targets[0]["boxes"][t]])
            a, b = torchvision.ops.box_convert(pair, "cxcywh", "xyxy")
            assert ours["l1"][q, t].item() == pytest.approx(sum(abs(a - b)).item(), abs=1e-12)
            overlap = torchvision.ops.generalized_box_iou(a[None], b[None]).item()
            assert ours["giou"][q, t].item() == pytest.approx(-overlap, abs=1e-3)  # without eps
            x, y = outputs["pred_points"][0, q].tolist()
            inside = b[0] <= x <= b[2] and b[1] <= y <= b[3]
            assert ours["outside"][q, t].item() == (0 if inside else 1)
    assert 0 < ours["outside"].mean() < 1


def test_a_point_on_the_edge_is_inside():
    outputs = {"pred_points": torch.tensor([[[0.25, 0.5], [0.2499, 0.5], [0.75, 0.75], [0.5, 0.7501]]])}
    target = {"boxes": torch.tensor([[0.5, 0.5, 0.5, 0.5]])}
    assert outside_cost(outputs, target)[0, :, 0].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("weight", ["5", "200"])
def test_no_object_takes_a_point_outside_it(weight):
    """However much better the rest of that query fits, and unless there is none inside."""
    criterion = criterion_of([*TINY_SAP, "--set_cost_bbox", weight])
    target = {"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    outputs = {
        "pred_logits": torch.tensor([[[0.0, 9, 0], [9, -9, 9], [9, -9, 9]]]),
        "pred_objs": torch.tensor([[[9.0], [-9], [-9]]]),
        "pred_boxes": torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1], [0.9, 0.9, 0.1, 0.1]]]),
        "pred_points": torch.tensor([[[0.3, 0.5], [0.9, 0.9], [0.5, 0.55]]]),
    }
    assert criterion.matcher([outputs], [target])[0].query.tolist() == [2]
    outputs["pred_points"][0, 2] = 0.1
    assert criterion.matcher([outputs], [target])[0].query.tolist() == [0]
    terms = criterion.eval()({**outputs, "aux_outputs": []}, [target])
    assert terms["loss_inner"] == 1
    assert terms["loss_bbox"] == 0
    # and the wanted IoU, which eps makes 0.04 / (0.04 + 1e-6)
    torch.testing.assert_close(terms["loss_giou"].item(), 2 * (1 - 0.04 / (0.04 + 1e-6)) / 2, rtol=0, atol=1e-6)


def matches_of(rows: list[tuple[int, int, int]]) -> Matches:
    return Matches(*torch.tensor(rows, dtype=torch.int64).view(-1, 3).T)


def test_losses_number_by_number():
    outputs, targets = case(2, 0, 1)
    matches, number = matches_of([(0, 3, 1), (0, 4, 0), (2, 1, 2)]), torch.tensor(1.5, dtype=torch.float64)
    terms = corner_box_losses(outputs, targets, matches, number)
    terms |= object_loss(alpha=0.25)(outputs, targets, matches, number)
    terms |= inner_loss(outputs, targets, matches, number)
    boxes = torch.cat([t["boxes"] for t in targets])
    l1 = giou = outside = objectness = 0.0
    wanted = {(b, q): 0.0 for b in range(3) for q in range(5)}
    for b, q, t in zip(*(index.tolist() for index in vars(matches).values())):
        mine, its = (torchvision.ops.box_convert(v, "cxcywh", "xyxy") for v in (outputs["pred_boxes"][b, q], boxes[t]))
        l1 += sum(abs(mine - its)).item()
        giou += 1 - torchvision.ops.generalized_box_iou(mine[None], its[None]).item()
        wanted[b, q] = torchvision.ops.box_iou(mine[None], its[None]).item()
        x, y = outputs["pred_points"][b, q].tolist()
        outside += not (its[0] <= x <= its[2] and its[1] <= y <= its[3])
    for (b, q), target in wanted.items():
        p = outputs["pred_objs"][b, q, 0].sigmoid().item()
        entropy = -target * math.log(p) - (1 - target) * math.log(1 - p)
        miss = 1 - p * target - (1 - p) * (1 - target)
        objectness += (0.25 * target + 0.75 * (1 - target)) * miss**2 * entropy
    assert terms["loss_bbox"].item() == pytest.approx(l1 / 1.5, abs=1e-12)
    assert terms["loss_giou"].item() == pytest.approx(giou / 1.5, abs=1e-3)
    assert terms["loss_ce_obj"].item() == pytest.approx(objectness / 1.5, abs=1e-4)
    assert terms["loss_inner"].item() == pytest.approx(outside / 1.5)


@pytest.mark.parametrize("detach", [False, True])
def test_boxes_learn_from_the_objectness_target_unless_it_is_detached(detach):
    outputs, targets = case(2)
    targets[0]["boxes"] = outputs["pred_boxes"][0, :2] * 0.9
    for value in outputs.values():
        value.requires_grad_()
    loss = object_loss(alpha=0.25, detach_target=detach)
    loss(outputs, targets, matches_of([(0, 0, 0), (0, 1, 1)]), torch.tensor(2.0))["loss_ce_obj"].backward()
    assert outputs["pred_objs"].grad.abs().min() > 0
    moved = outputs["pred_boxes"].grad
    assert moved is None if detach else moved[0, :2].abs().sum(-1).min() > 1e-3


@pytest.mark.parametrize("counts", [(0, 0), (2, 0)])
def test_no_objects_and_objects_without_size(counts):
    network = tiny().train()
    criterion = criterion_of(TINY_SAP).train()
    targets = [{"labels": torch.ones(n, dtype=torch.int64), "boxes": torch.full((n, 4), 0.5).double()} for n in counts]
    for target in targets:
        target["boxes"][:, 2:] = 0
    outputs = network(pad_images([torch.randn(3, 64, 96).double() for _ in counts]))
    terms = criterion(outputs, targets)
    sum(criterion.weighted(terms).values()).backward()
    assert all(torch.isfinite(term) for term in terms.values())
    gradients = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())  # none is missing, as DDP needs
    if sum(counts) == 0:
        assert {terms[name].item() for name in ("loss_bbox", "loss_giou", "loss_inner")} == {0}
        assert terms["class_error"] == 100


# ---- Network


def watch(network: nn.Module) -> dict[str, list[Tensor]]:
    """What the heads say in a forward pass: of each layer on the normed queries and on the raw ones, in turn."""
    said: dict[str, list[Tensor]] = {"points": [], "sides": []}
    for name, heads in (("points", network.decoder.point_heads), ("sides", network.decoder.distance_heads)):
        for head in heads:
            head.register_forward_hook(lambda module, inputs, output, name=name: said[name].append(output))
    return said


def logit(x: Tensor) -> Tensor:
    return (x.clamp(min=1e-3) / (1 - x).clamp(min=1e-3)).log()


@pytest.mark.parametrize(
    ("flags", "queries", "head_cell", "late"),
    [
        ([], 16, (1 / 20, 1 / 20), True),
        (["--head_cell", "grid"], 16, (1 / 4, 1 / 4), True),
        (["--point_reference", "current"], 16, (1 / 20, 1 / 20), False),
        ([], 306, (1 / 18, 1 / 17), True),
        ([], 400, (1 / 20, 1 / 20), True),
    ],
)
def test_what_the_heads_refer_to(flags, queries, head_cell, late):
    network = tiny("--num_queries", str(queries), *flags)
    said = watch(network)
    layers = layers_of(network(pad_images([torch.randn(3, 64, 96).double()])))
    start = network.decoder.points.sigmoid()
    entered, sides = [start], [network.decoder.distances.sigmoid()]  # of each layer
    cell = start.new_tensor(grid_cell(queries))
    head_cell = start.new_tensor(head_cell)
    for layer, predicted in enumerate(layers):
        normed, raw = said["points"][2 * layer], said["points"][2 * layer + 1]
        reference = entered[max(layer - 1, 0) if late else layer]
        points = start + head_cell * (normed + logit(reference - start)).sigmoid()
        torch.testing.assert_close(predicted["pred_points"], points, **EXACT)
        entered.append(start + cell * (raw + logit(entered[layer] - start)).sigmoid())
        distances = (said["sides"][2 * layer] + logit(sides[layer])).sigmoid()
        sides.append((said["sides"][2 * layer + 1] + logit(sides[layer])).sigmoid())
        low, high = points - distances[..., :2], points + distances[..., 2:]
        torch.testing.assert_close(predicted["pred_boxes"], torch.cat([(low + high) / 2, high - low], -1), **EXACT)
    assert (layers[1]["pred_points"] - layers[0]["pred_points"]).abs().max() > 1e-6


def test_queries_start_as_the_features_at_their_points():
    """Of the map with its padding, between the centres of cells; what lies outside counts as 0."""
    decoder = tiny().decoder
    decoder.initial_content = nn.Identity()
    height, width = 6, 10
    rows, columns = torch.arange(height).double() + 0.5, torch.arange(width).double() + 0.5
    features = torch.stack([columns.expand(height, -1), rows[:, None].expand(-1, width)])[None]
    padding = torch.zeros(1, height, width, dtype=torch.bool)
    padding[:, 4:] = padding[:, :, 7:] = True
    level = FeatureLevel(features, padding, features)
    points = torch.tensor([[[0.5, 0.5], [0.23, 0.81], [0.95, 0.1], [0.001, 0.5]]], dtype=torch.float64)
    wanted = points * torch.tensor([width, height])
    # A hundredth of a cell from the left edge, 0.49 of the weight is outside the map.
    wanted[0, 3] = 0.51 * torch.tensor([0.5, 3]).double()
    torch.testing.assert_close(decoder._start(level, points), wanted, **EXACT)


@pytest.mark.parametrize("late", [True, False])
def test_gradients_cross_one_layer_through_distances_and_corrected_points(late):
    network = tiny("--point_reference", "late" if late else "current")
    outputs = network(pad_images([torch.randn(3, 64, 96).double()]))
    outputs["pred_boxes"][..., 2:].sum().backward(retain_graph=True)  # sizes: sides alone
    moved = [head.layers[-1].bias.grad for head in network.decoder.distance_heads]
    assert moved[0] is None  # the heads of the last layer but two are not reached
    assert moved[1].abs().min() > 0
    assert network.decoder.distances.grad is not None  # through the first layer's attention
    network.zero_grad()
    outputs["pred_points"].sum().backward()
    assert (network.decoder.point_heads[1].layers[-1].bias.grad is None) is late


def test_the_flags_reach_the_parts():
    network = tiny("--dropout", "0.3", "--transformer_activation", "prelu")
    assert isinstance(network.encoder.layers[0].feed_forward.activation, nn.PReLU)
    assert isinstance(network.decoder.layers[2].feed_forward.activation, nn.PReLU)
    assert network.decoder.layers[2].cross_attention.dropout == 0.3
    assert network.decoder.distance_heads[0] is not network.decoder.distance_heads[1]
    shared = from_flags(TINY_SAP[:-1])[0].decoder
    assert shared.distance_heads[0] is shared.distance_heads[2]
    assert shared.point_heads[0] is shared.point_heads[2]
    assert shared.class_heads[0] is not shared.class_heads[1]
    assert shared.class_heads[1] is shared.class_heads[2]


def test_order_of_queries_and_company_in_the_batch_do_not_matter():
    network = tiny("--backbone_norm", "frozen")
    images = [torch.randn(3, 64, 96).double() for _ in range(2)]
    with torch.no_grad():
        together = layers_of(network(pad_images(images)))
        alone = layers_of(network(pad_images(images[1:])))
        order = torch.randperm(16)
        for name in ("points", "distances"):
            weight = getattr(network.decoder, name)
            weight.copy_(weight[order].clone())
        permuted = layers_of(network(pad_images(images)))
    for layer in range(3):
        for name, values in together[layer].items():
            torch.testing.assert_close(values[1:], alone[layer][name], rtol=0, atol=1e-10)
            torch.testing.assert_close(values[:, order], permuted[layer][name], rtol=0, atol=1e-10)
    assert (together[2]["pred_logits"][:, 0] - together[2]["pred_logits"][:, 1]).abs().max() > 1e-4


@pytest.mark.parametrize("size", [(32, 32), (64, 1333), (1, 1)])
@pytest.mark.parametrize("flags", [[], ["--dilation", "--backbone", "resnet50", "--backbone_level", "5"]])
def test_images_of_any_size(size, flags):
    network = tiny("--backbone_norm", "frozen", *flags)
    for others in ([], [torch.randn(3, 32, 48).double()]):
        for layer in layers_of(network(pad_images([torch.randn(3, *size).double(), *others]))):
            assert all(torch.isfinite(value).all() for value in layer.values())
            low, high = layer["pred_points"].aminmax()
            assert 0 <= low <= high <= 1
    layer["pred_boxes"].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


def test_fewer_pairs_than_num_select():
    network = tiny()  # 6 classes
    outputs = network(pad_images([torch.randn(3, 64, 64).double()]))
    (found,) = postprocess(outputs, torch.tensor([[64, 64]]), top_k=300)
    assert len(found["scores"]) == 16 * 6
    assert len(postprocess(outputs, torch.tensor([[64, 64]]), top_k=20)[0]["scores"]) == 20
    assert len(from_flags([*TINY_SAP, "--num_select", "7"])[2](outputs, torch.tensor([[64, 64]]))[0]["scores"]) == 7


def test_initialisation():
    """Of the published model; figures from the notes on the official constructor."""
    flags = "-m sap_detr --newconvinit --sdg --bbox_embed_diff_each_layer --dec_layers 3 --enc_layers 2"
    network = from_flags(flags.split())[0]
    decoder = network.decoder
    weights = dict(network.named_parameters())
    for name, weight in weights.items():
        transformer = name.startswith(("encoder.", "decoder.layers.", "decoder.position_scale."))
        if transformer and weight.dim() > 1:  # xavier uniform: up to sqrt(6 / (in + out)), deviation that / sqrt(3)
            bound = math.sqrt(6 / sum(weight.shape))
            assert 0.95 * bound < weight.abs().max() <= bound, name
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name
        elif transformer and name.endswith(("in_proj_bias", "out_proj.bias", "attention.output.bias")):
            assert (weight == 0).all(), name
        elif transformer and "norm" not in name:  # PyTorch's default: within 1 / sqrt(in)
            assert 0 < weight.abs().max() <= 1 / 16, name
    for index in (0, 3, 6):
        convolution = decoder.initial_content[index]
        assert convolution.weight.std().item() == pytest.approx(0.01, rel=0.02)
        assert (convolution.bias == 0).all()
    for head in (*decoder.distance_heads, *decoder.point_heads):
        assert (head.layers[-1].weight == 0).all()
        assert (head.layers[-1].bias == 0).all()
        assert 0.95 / 16 < head.layers[0].weight.abs().max() <= 1 / 16
    for last in (*(head.layers[-1] for head in decoder.class_heads), decoder.object_head):
        torch.testing.assert_close(last.bias, torch.full_like(last.bias, -math.log(99)))
        assert 0.9 / 16 < last.weight.abs().max() <= 1 / 16
    for head in (decoder.point_position, decoder.box_position):
        assert head.layers[0].weight.abs().max() <= head.layers[0].in_features ** -0.5
    for heads in (decoder.class_heads, decoder.distance_heads, decoder.point_heads):  # copies start equal
        for head in heads[1:]:
            torch.testing.assert_close(head.state_dict(), heads[0].state_dict(), rtol=0, atol=0)
    assert decoder.distances.std().item() == pytest.approx(1, rel=0.1)
    assert not decoder.points.requires_grad
    frozen = {name for name, weight in weights.items() if not weight.requires_grad and name.startswith("decoder.")}
    assert frozen == {"decoder.points"}


def test_a_single_decoder_layer_leaves_no_parameter_without_gradient():
    network = tiny("--dec_layers", "1")
    outputs = network(pad_images([torch.randn(3, 64, 64).double()]))
    sum(outputs[name].sum() for name in ("pred_logits", "pred_boxes", "pred_objs")).backward()
    assert not [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
