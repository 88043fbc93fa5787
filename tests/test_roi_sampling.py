"""The compiled kernels of RoIAlign and of sampling between its bins: equal to torchvision and to the tensor code."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.ops import roi_align

from samdetr.models.ops import kernels, plain_path
from samdetr.models.ops import roi_sampling as compiled
from samdetr.models.sam_detr.roi_sampling import Regions, roi_align_weights
from samdetr.models.sam_detr.roi_sampling import roi_align as ours
from samdetr.models.semantics_aligner import SemanticsAligner

pytestmark = pytest.mark.skipif(bool(kernels.why_not("cpu")), reason="no compiled kernels here")
KERNELS = {"weigh", "pool", "pool_backward", "sample", "sample_backward_cells", "sample_backward_positions"}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The kernels that ran, in order."""
    names, call = [], compiled._call
    monkeypatch.setattr(compiled, "_call", lambda name, *rest: (names.append(name), call(name, *rest)))
    return names


def boxes(batch: int, number: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Left, top, right, bottom as shares of the map: of any size, each fifth over a border, each seventh empty."""
    sizes = torch.rand(batch, number, 2, dtype=dtype)
    sizes[:, ::7] = 0
    low = torch.rand(batch, number, 2, dtype=dtype) * (1 - sizes)
    low[:, ::5] -= 0.4
    low[:, 3::5] += 0.4
    return torch.cat([low, low + sizes], -1)


def weights(edges: Tensor, height: int, width: int, num_bins: int = 7) -> tuple[Tensor, Tensor]:
    rows = roi_align_weights(edges[..., 1] * height, edges[..., 3] * height, length=height, num_bins=num_bins)
    return rows, roi_align_weights(edges[..., 0] * width, edges[..., 2] * width, length=width, num_bins=num_bins)


def with_gradients(function, *leaves: Tensor) -> list[Tensor]:
    """What it returns, and the gradients of a random objective."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    output = function(*leaves)
    torch.manual_seed(5)
    objective = (output * torch.randn(output.shape, dtype=output.dtype)).sum()
    return [output.detach(), *torch.autograd.grad(objective, leaves)]


# Channels: less than a register, one and a rest, blocks of several. Maps of one cell, a line, a column, and usual ones.
@pytest.mark.parametrize("channels", [1, 3, 16, 71, 256, 325])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (11, 1), (3, 2), (20, 27)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-4)])
def test_both_paths_agree(height, width, channels, dtype, tolerance, calls):
    cells, edges = torch.randn(2, height, width, channels, dtype=dtype), boxes(2, 15, dtype)
    offsets = 2.4 * torch.rand(2, 15, 4, 2, dtype=dtype) - 1.2  # beyond the edges, too

    def run() -> list[Tensor]:
        rows, columns = weights(edges, height, width)
        pooled = with_gradients(lambda cells: ours(cells, rows, columns), cells)
        sampled = with_gradients(
            lambda cells, offsets: Regions(cells, rows, columns, points=4).at(offsets), cells, offsets
        )
        return [rows, columns, *pooled, *sampled]

    fast = run()
    assert set(calls) == KERNELS
    calls.clear()
    with plain_path():
        wanted = run()
    assert not calls
    torch.testing.assert_close(fast, wanted, rtol=0, atol=tolerance)


def sample_pooled(map: Tensor, positions: Tensor, edges: Tensor, num_bins: int) -> Tensor:
    """torchvision's RoIAlign, then PyTorch's grid_sample: (B, H, W, C), (B, Q, P, 2) -> (B, Q, P, C)."""
    height, width = map.shape[1:3]
    in_cells = list(edges * torch.tensor([width, height] * 2))
    pooled = roi_align(map.permute(0, 3, 1, 2), in_cells, output_size=num_bins, sampling_ratio=-1, aligned=True)
    grid = ((positions + 0.5) * (2 / num_bins) - 1).flatten(0, 1)[:, None]  # (B Q, 1, P, 2)
    sampled = F.grid_sample(pooled, grid, padding_mode="zeros", align_corners=False)[:, :, 0]  # (B Q, C, P)
    return sampled.mT.unflatten(0, positions.shape[:2])


@pytest.mark.parametrize("num_bins", [1, 7, 8])
def test_samples_and_gradients_equal_torchvision_and_grid_sample(num_bins):
    """Of 8 bins, positions at their centres are exact in both: gradients agree at these, too, and beyond the bins."""
    cells, edges = torch.randn(2, 13, 21, 19, dtype=torch.float64), boxes(2, 15)
    positions = (num_bins + 2) * torch.rand(2, 15, 6, 2, dtype=torch.float64) - 1.5
    if num_bins == 8:
        positions[:, :, ::2] = torch.randint(-2, 10, (2, 15, 3, 2)).double()
        positions[:, :, 1, 0] = 3
    rows, columns = weights(edges, 13, 21, num_bins)
    fast = with_gradients(lambda c, p: compiled.SampleBetweenBins.apply(c, rows, columns, p), cells, positions)
    wanted = with_gradients(lambda c, p: sample_pooled(c, p, edges, num_bins), cells, positions)
    assert fast[2].abs().amax((0, 1)).min() > 0.01
    torch.testing.assert_close(fast, wanted, rtol=0, atol=1e-11)


def test_any_layout_of_the_inputs():
    """Maps that are a part of the tokens of several levels, channels first, one image for all, weights transposed."""
    edges, offsets = boxes(2, 9), torch.rand(2, 9, 3, 2, dtype=torch.float64)
    rows, columns = weights(edges, 5, 6)
    tokens = torch.randn(2, 50, 24, dtype=torch.float64)
    part = tokens[:, 10:40].unflatten(1, (5, 6))
    layouts = [part, part.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), part[:1].expand(2, -1, -1, -1)]
    assert [cells.is_contiguous() for cells in layouts] == 3 * [False]
    strided = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (rows, columns, offsets)]

    def sampled(cells: Tensor, rows: Tensor, columns: Tensor, offsets: Tensor) -> Tensor:
        regions = Regions(cells, rows, columns, points=3)
        return regions.at(offsets).flatten(2).sum(-1) + regions.pooled(lambda x: x).flatten(2).sum(-1)

    for cells in layouts:
        fast = with_gradients(lambda c, o: sampled(c, *strided[:2], o), cells, strided[2])
        with plain_path():
            wanted = with_gradients(lambda c, o: sampled(c, rows, columns, o), cells, offsets)
        torch.testing.assert_close(fast, wanted, rtol=0, atol=1e-11)


def test_any_number_of_threads_gives_the_same_bits(calls):
    cells, edges = torch.randn(2, 21, 26, 64), boxes(2, 200, torch.float32)
    offsets = 2 * torch.rand(2, 200, 4, 2) - 1
    rows, columns = weights(edges, 21, 26)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            pooled = with_gradients(lambda cells: ours(cells, rows, columns), cells)
            regions = lambda cells, offsets: Regions(cells, rows, columns, points=4).at(offsets)  # noqa: E731
            results.append([*pooled, *with_gradients(regions, cells, offsets)])
    finally:
        torch.set_num_threads(threads)
    assert calls.count("pool") == 3
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_the_aligner_uses_every_kernel(calls):
    aligner = SemanticsAligner(hidden_dim=32, num_heads=4, predict_scales=True)
    features = torch.randn(2, 32, 6, 7, requires_grad=True)
    aligner(torch.randn(2, 5, 32), torch.rand(2, 5, 4), features).content.sum().backward()
    assert set(calls) == KERNELS
    calls.clear()
    for resample in ("average", "maximum"):
        SemanticsAligner(hidden_dim=32, num_heads=4, resample=resample)(
            torch.randn(2, 5, 32), torch.rand(2, 5, 4), features
        )
    assert calls == 4 * ["weigh"] + ["pool"]


@pytest.mark.parametrize(("batch", "queries", "points"), [(2, 0, 3), (0, 4, 3), (2, 4, 0)])
def test_empty_sets(batch, queries, points):
    cells = torch.randn(batch, 5, 6, 8, requires_grad=True)
    rows, columns = weights(boxes(batch, queries, torch.float32), 5, 6)
    assert ours(cells, rows, columns).shape == (batch, queries, 7, 7, 8)
    offsets = torch.rand(batch, queries, points, 2, requires_grad=True)
    content = Regions(cells, rows, columns, points=points).at(offsets)
    assert content.shape == (batch, queries, points, 8)
    content.sum().backward()
    assert not cells.grad.any()
    assert offsets.grad.shape == offsets.shape


def test_only_gradients_that_are_asked_for_are_computed(calls):
    cells, offsets = torch.randn(1, 5, 6, 8), torch.rand(1, 3, 2, 2)
    rows, columns = weights(boxes(1, 3, torch.float32), 5, 6)
    Regions(cells.requires_grad_(), rows, columns, points=2).at(offsets).sum().backward()
    assert calls[-2:] == ["sample", "sample_backward_cells"]
    Regions(cells.detach(), rows, columns, points=2).at(offsets.requires_grad_()).sum().backward()
    assert calls[-2:] == ["sample", "sample_backward_positions"]


def test_weights_that_need_a_gradient_get_it(calls):
    """From the tensor code."""
    cells, offsets, edges = torch.randn(1, 5, 6, 8), torch.rand(1, 3, 2, 2), boxes(1, 3, torch.float32)
    edges.requires_grad_()
    rows, columns = weights(edges, 5, 6)
    Regions(cells, rows, columns, points=2).at(offsets).sum().backward()
    ours(cells, *weights(edges, 5, 6)).sum().backward()
    assert edges.grad.any()
    assert not calls


def test_where_there_is_nothing_to_read_or_less_than_32_bits(calls):
    aligner = SemanticsAligner(hidden_dim=32, num_heads=4)
    inputs = torch.randn(2, 5, 32), torch.rand(2, 5, 4), torch.randn(2, 32, 6, 7)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert aligner(*map(mode.from_tensor, inputs)).content.shape == (2, 5, 4, 32)
    meta = SemanticsAligner(hidden_dim=32, num_heads=4).to("meta")
    assert meta(*(x.to("meta") for x in inputs)).content.shape == (2, 5, 4, 32)
    aligner.bfloat16()(*(x.bfloat16() for x in inputs))
    assert not calls
    with torch.autocast("cpu", torch.bfloat16):
        aligner.float()(*inputs)
    assert not calls


def test_numbers_that_are_not_finite_stay_visible():
    """A box without a place has no weights that look like some; a point without one takes nothing."""
    low, high = torch.tensor([0.0, torch.nan, 1.0]), torch.tensor([3.0, 2.0, torch.inf])
    found = roi_align_weights(low, high, length=4, num_bins=7)
    assert found[0].isfinite().all()
    assert found[1:].isnan().all()
    rows, columns = weights(boxes(1, 2), 4, 5)
    positions = torch.tensor([torch.nan, torch.inf], dtype=torch.float64).expand(1, 2, 1, 2)
    cells = torch.randn(1, 4, 5, 3, dtype=torch.float64)
    assert not compiled.SampleBetweenBins.apply(cells, rows, columns, positions).any()
