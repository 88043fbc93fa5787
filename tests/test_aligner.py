"""The Semantics Aligner against its description written out plainly (inference/plain.py): torchvision's RoIAlign of
every box, a small network on the bins, and grid_sample at the salient points."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import from_flags
from torch import Tensor, nn
from torchvision.ops import roi_align

from samdetr.inference.plain import plain
from samdetr.models.ops import kernels
from samdetr.models.ops.kernels import plain_path
from samdetr.models.ops.roi_sampling import plain as plain_sampling, roi_sampling
from samdetr.models.semantics_aligner import SemanticsAligner
from samdetr.util.box_ops import cxcywh_to_xyxy
from samdetr.util.padded_images import pad_images


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the networks here are too small for more to help


@pytest.fixture(params=["tensor code", "compiled"])
def path(request):
    """Runs a test through the tensor code, then through the compiled kernels where this machine can build them."""
    if request.param == "tensor code":
        with plain_path():
            yield "tensor code"
    elif reason := kernels.why_not("cpu"):
        pytest.skip(f"no compiled kernel: {reason}")
    else:
        yield "compiled"


# Centre and size, as shares of the map: inside, over each border, half of it outside, all of the map, from the middle
# to far outside, narrower and lower than a cell, a line, a point, a point in a corner, and outside as a whole.
BOXES = torch.tensor(
    [
        [0.50, 0.40, 0.30, 0.50],
        [0.05, 0.50, 0.40, 0.20],
        [0.60, 0.98, 0.30, 0.30],
        [1.00, 0.00, 0.70, 0.60],
        [0.50, 0.50, 1.00, 1.00],
        [1.00, 1.00, 1.00, 1.00],
        [0.31, 0.73, 1e-3, 1e-4],
        [0.31, 0.73, 0.00, 0.40],
        [0.31, 0.73, 0.00, 0.00],
        [0.00, 1.00, 0.00, 0.00],
        [1.30, 1.30, 0.20, 0.20],
    ],
    dtype=torch.float64,
)


@pytest.mark.parametrize(("height", "width"), [(9, 13), (7, 28), (3, 2), (1, 40), (25, 34)])
def test_roi_align_equals_torchvision(height, width, path):
    features = torch.randn(2, 3, height, width, dtype=torch.float64)
    boxes = torch.cat([BOXES, torch.rand(50, 4, dtype=torch.float64)]).expand(2, -1, -1)
    boxes = cxcywh_to_xyxy(boxes) * torch.tensor([width, height] * 2)  # (2, Q, 4), in cells
    ours = roi_sampling(features.permute(0, 2, 3, 1), boxes)  # (2, Q, 7, 7, 3)
    wanted = roi_align(features, list(boxes), output_size=7, sampling_ratio=-1, aligned=True)
    torch.testing.assert_close(ours.movedim(-1, 2).flatten(0, 1), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_boxes_as_long_as_the_map_whose_length_is_rounded_up(dtype, path):
    """Where 7 divides the map, such a box needs one sample more than its true length says."""
    centres = torch.rand(200, dtype=dtype)
    low, high = (centres - 0.5) * 14, (centres + 0.5) * 14
    assert (high - low > 14).any()
    features = torch.rand(14, dtype=dtype)
    boxes = torch.stack([torch.zeros_like(low), low, torch.ones_like(low), high], 1)
    wanted = roi_align(features[None, None, :, None], [boxes], output_size=7, sampling_ratio=-1, aligned=True)
    ours = roi_sampling(features[None, :, None, None], boxes[None])[0, :, :, 0, 0]
    torch.testing.assert_close(ours, wanted[:, 0, :, 0])


def test_bilinear_weights_by_hand():
    weights = plain_sampling.bilinear_weights(torch.tensor([-1.0, -0.25, 0.0, 1.75, 2.5]), length=3)
    wanted = [[0, 0, 0], [0.75, 0, 0], [1, 0, 0], [0, 0.25, 0.75], [0, 0, 0.5]]
    torch.testing.assert_close(weights, torch.tensor(wanted))


ALIGNERS = [
    {},
    {"predict_scales": True},
    {"num_points": 1},
    {"num_points": 1, "predict_scales": True, "reweight": False},
    {"reweight": False},
    {"search_range": "image"},
    {"search_range": "image", "predict_scales": True, "num_points": 1},
    {"resample": "average"},
    {"resample": "maximum"},
    {"resample": "average", "reweight": False},
]


@pytest.mark.parametrize("options", ALIGNERS, ids=str)
@pytest.mark.parametrize("large", [False, True], ids=["small map", "large map"])
def test_outputs_and_gradients_equal_the_plain_formula(large, options, path, monkeypatch):
    channels, heads = 16, 4
    if large:  # what is done on maps of thousands of cells, with boxes in groups of three
        monkeypatch.setattr(plain_sampling, "POOL_FIRST", 0)
        monkeypatch.setattr(plain_sampling, "AT_ONCE", 3 * 2 * 7 * 13 * channels)
    aligner = SemanticsAligner(hidden_dim=channels, num_heads=heads, **options).double()
    for parameter in aligner.parameters():
        nn.init.normal_(parameter, std=2 * parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.5)
    boxes = torch.cat([BOXES[:8].expand(2, -1, -1), 0.1 + 0.7 * torch.rand(2, 7, 4, dtype=torch.float64)], 1)
    inputs = {
        "queries": torch.randn(2, 15, channels, dtype=torch.float64),
        "boxes": boxes,
        "features": torch.randn(2, channels, 9, 13, dtype=torch.float64),
    }
    valid_ratio = torch.tensor([[1.0, 1.0], [9 / 13, 7 / 9]], dtype=torch.float64)
    results = []
    for module in (aligner, plain(aligner)):
        leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
        aligned = module(**leaves, valid_ratio=valid_ratio)
        outputs = {name: value for name, value in vars(aligned).items() if value is not None}
        torch.manual_seed(1)  # the same random objective for both
        sum((value * torch.randn(value.shape)).sum() for value in outputs.values()).backward()
        gradients = {name: leaf.grad for name, leaf in leaves.items()}
        gradients |= {name: parameter.grad for name, parameter in module.named_parameters()}
        results.append((outputs, gradients))

    (outputs, gradients), (wanted, wanted_gradients) = results
    points = aligner.num_points if aligner.resample == "points" else 1
    assert outputs["content"].shape == (2, 15, heads if aligner.reweight else points, channels)
    assert outputs["points"].shape == (2, 15, points, 2)
    assert ("scales" in outputs) == options.get("predict_scales", False)
    # Without gates nothing depends on the old queries; points in the image do not depend on the boxes.
    ungated = {name for name, gradient in wanted_gradients.items() if gradient is None}
    assert ungated == ({"queries"} if not aligner.reweight else set()) | (
        {"boxes"} if aligner.search_range == "image" else set()
    )
    torch.testing.assert_close(outputs, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients, wanted_gradients, rtol=1e-11, atol=1e-11)


def test_nothing_of_the_size_of_points_times_cells_is_kept_for_backward(path):
    """On a map of 100 x 100 cells and 8 channels, the map itself is the largest tensor that is kept: the weights of 4
    points of 6 queries in all cells would be 240,000 numbers."""
    aligner = SemanticsAligner(hidden_dim=8, num_heads=4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        aligner(torch.randn(1, 6, 8), torch.rand(1, 6, 4), torch.randn(1, 8, 100, 100, requires_grad=True))
    assert max(kept) == 80_000


def test_without_a_valid_ratio_the_whole_map_is_image():
    aligner = SemanticsAligner(hidden_dim=8, num_heads=2, predict_scales=True)
    inputs = torch.randn(1, 5, 8), torch.rand(1, 5, 4), torch.randn(1, 8, 6, 4)
    torch.testing.assert_close(vars(aligner(*inputs)), vars(aligner(*inputs, torch.ones(1, 2))), rtol=0, atol=0)


def test_query_positions_carry_no_gradient():
    """As in the reference: the salient-point head learns through the sampled content and the prior only."""
    aligner = SemanticsAligner(hidden_dim=8, num_heads=2, reweight=False)
    boxes = torch.rand(1, 5, 4, requires_grad=True)
    assert not aligner(torch.randn(1, 5, 8), boxes, torch.randn(1, 8, 6, 4)).position.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resample": "median"}, "resample.*median"),
        ({"search_range": "map"}, "search_range.*map"),
        ({"num_points": 3}, "3"),
        ({"resample": "average", "predict_scales": True}, "average"),
        ({"hidden_dim": 10}, "hidden_dim.*10"),
    ],
)
def test_what_cannot_be_built(options, message):
    with pytest.raises(ValueError, match=message):
        SemanticsAligner(**{"hidden_dim": 16, "num_heads": 4} | options)


class PlainDecoderLayer(nn.Module):
    """A decoder layer as in DETR: one query vector, PyTorch's own attention. The aligner enters in two lines."""

    def __init__(self, hidden_dim: int, num_heads: int):
        super().__init__()
        self.self_attention = nn.MultiheadAttention(hidden_dim, num_heads, batch_first=True)
        self.aligner = SemanticsAligner(hidden_dim=hidden_dim, num_heads=1)
        self.cross_attention = nn.MultiheadAttention(hidden_dim, num_heads, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(hidden_dim, 64), nn.ReLU(), nn.Linear(64, hidden_dim))
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_dim) for _ in range(3))

    def forward(self, queries: Tensor, boxes: Tensor, features: Tensor, key_position: Tensor) -> Tensor:
        queries = self.norms[0](queries + self.self_attention(queries, queries, queries, need_weights=False)[0])
        aligned = self.aligner(queries, boxes, features)
        memory = features.flatten(2).mT
        attended, _ = self.cross_attention((aligned.content + aligned.position)[:, :, 0], memory + key_position, memory)
        queries = self.norms[1](queries + attended)
        return self.norms[2](queries + self.feed_forward(queries))


def test_stands_alone_in_front_of_another_decoder_layer():
    layer = PlainDecoderLayer(hidden_dim=32, num_heads=4)
    queries, boxes = nn.Parameter(torch.randn(2, 6, 32)), nn.Parameter(torch.rand(2, 6, 4))
    features, key_position = torch.randn(2, 32, 5, 7), torch.randn(2, 35, 32)
    wanted = torch.randn(2, 6, 32)
    optimizer = torch.optim.AdamW([*layer.parameters(), queries], lr=1e-3)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(layer(queries, boxes, features, key_position), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for name, parameter in layer.aligner.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    assert losses[-1] < 0.8 * losses[0]


NETWORK = (
    "--backbone resnet18 --backbone_level 3 --backbone_norm learned --hidden_dim 32 --nheads 4 --dim_feedforward 48 "
    "--enc_layers 1 --dec_layers 2 --num_queries 6 --dropout 0"
)


def ablations() -> list[str]:
    """Every combination of the aligner's flags that means something."""
    reweight = ("", "--no_sam_reweight")
    with_points = itertools.product(("",), ("", "--sam_points 1"), ("", "--sam_range image"), ("", "--smca"), reweight)
    without = itertools.product(("--sam_resample average", "--sam_resample maximum"), reweight)
    flags = [*with_points, *without, ("--sam_resample off",)]
    return [" ".join(filter(None, parts)) for parts in flags]


@pytest.mark.parametrize("flags", ablations())
def test_every_ablation_trains(flags):
    detector, criterion, _ = from_flags(f"{NETWORK} {flags}".split())
    # Box heads start as zeros, which would keep the boxes' gradients out of everything before them.
    for name, parameter in detector.named_parameters():
        if "box_heads" in name:
            nn.init.normal_(parameter, std=0.05)
    detector.train()
    batch = pad_images([torch.randn(3, 64, 96), torch.randn(3, 80, 64)])
    targets = [
        {"labels": torch.tensor([1, 7]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.3], [0.3, 0.6, 0.2, 0.5]])},
        {"labels": torch.tensor([90]), "boxes": torch.tensor([[0.6, 0.3, 0.5, 0.6]])},
    ]
    loss = sum(criterion.weighted(criterion(detector(batch), targets)).values())
    loss.backward()
    assert torch.isfinite(loss)
    parameters = dict(detector.named_parameters())
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        if ".aligner." in name:
            assert parameter.grad.abs().max() > 0, name
    # The flags did what they say.
    built = {
        name.removeprefix("decoder.layers.1.aligner.").split(".")[0] for name in parameters if "1.aligner." in name
    }
    has_points = "--sam_resample" not in flags
    has_gates = "--no_sam_reweight" not in flags and "off" not in flags
    assert built == ({"reduce", "point_head"} if has_points else set()) | (
        {"content_gate", "position_gate"} if has_gates else set()
    )
    if has_points:
        numbers = (1 if "--sam_points 1" in flags else 4) * (4 if "--smca" in flags else 2)
        assert parameters["decoder.layers.1.aligner.point_head.layers.3.bias"].shape == (numbers,)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--smca --sam_resample off", "--smca.*--sam_resample off"),
        ("--smca --sam_resample average", "--smca.*--sam_resample average"),
        ("--smca --sam_resample maximum", "--smca.*--sam_resample maximum"),
        ("--sam_points 3", "--sam_points 3 .*--nheads, 4"),
        ("--nheads 5", "--hidden_dim 32 cannot be divided by --nheads 5"),
        ("--hidden_dim 30 --nheads 5", "--hidden_dim 30"),
        ("--hidden_dim 48 --epochs 12", "--hidden_dim"),  # GroupNorm(32)
        ("--backbone resnet9", "resnet9"),
        ("--dilation", "--dilation"),
        ("--set_cost_class 0 --set_cost_bbox 0 --set_cost_giou 0", "--set_cost_class"),
    ],
)
def test_settings_that_cannot_be_built(flags, message):
    with pytest.raises(ValueError, match=message):
        from_flags(f"{NETWORK} {flags}".split())
