"""roi_sampling by its kernels and by plain PyTorch: equal to torchvision and grid_sample, and to each other."""

import resource

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.ops import roi_align

from samdetr.models.ops import kernels
from samdetr.models.ops.kernels import plain_path
from samdetr.models.ops.roi_sampling import binding, roi_sampling
from samdetr.models.semantics_aligner import SemanticsAligner

pytestmark = pytest.mark.skipif(bool(kernels.why_not("cpu")), reason="no compiled kernels here")
CALLS = {"roi_sampling_forward", "roi_sampling_backward"}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The kernels that ran, in order."""
    for dtype in (torch.float32, torch.float64):
        kernels.correct(binding.KERNELS.name, "cpu", None, dtype)  # which calls them, too
    names, call = [], kernels.call
    monkeypatch.setattr(kernels, "call", lambda name, *rest: (names.append(name), call(name, *rest)))
    return names


def boxes(batch: int, number: int, height: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Left, top, right, bottom in cells: of any size, each fifth over a border, each seventh empty."""
    sizes = torch.rand(batch, number, 2, dtype=dtype)
    sizes[:, ::7] = 0
    low = torch.rand(batch, number, 2, dtype=dtype) * (1 - sizes)
    low[:, ::5] -= 0.4
    low[:, 3::5] += 0.4
    return torch.cat([low, low + sizes], -1) * torch.tensor([width, height] * 2)


def with_gradients(function, *leaves: Tensor) -> list[Tensor]:
    """What it returns, and the gradients of a random objective."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    output = function(*leaves)
    torch.manual_seed(5)
    objective = (output * torch.randn(output.shape, dtype=output.dtype)).sum()
    return [output.detach(), *torch.autograd.grad(objective, leaves)]


def both(cells: Tensor, edges: Tensor, points: Tensor) -> list[Tensor]:
    """Bins and samples, with their gradients."""
    pooled = with_gradients(lambda cells: roi_sampling(cells, edges), cells)
    return [*pooled, *with_gradients(lambda cells, points: roi_sampling(cells, edges, points), cells, points)]


# Channels: less than a register, one and a rest, blocks of several. Maps of one cell, a line, a column, and usual ones.
@pytest.mark.parametrize("channels", [1, 3, 16, 71, 256, 325])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (11, 1), (3, 2), (20, 27)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-4)])
def test_both_paths_agree(height, width, channels, dtype, tolerance, calls):
    cells, edges = torch.randn(2, height, width, channels, dtype=dtype), boxes(2, 15, height, width, dtype)
    points = 2.4 * torch.rand(2, 15, 4, 2, dtype=dtype) - 1.2  # beyond the edges, too
    fast = both(cells, edges, points)
    assert set(calls) == CALLS
    calls.clear()
    with plain_path():
        wanted = both(cells, edges, points)
    assert not calls
    torch.testing.assert_close(fast, wanted, rtol=0, atol=tolerance)


def sample_pooled(map: Tensor, points: Tensor, edges: Tensor, bins: int) -> Tensor:
    """torchvision's RoIAlign, then PyTorch's grid_sample: (B, H, W, C), (B, Q, P, 2) -> (B, Q, P, C)."""
    pooled = roi_align(map.permute(0, 3, 1, 2), list(edges), output_size=bins, sampling_ratio=-1, aligned=True)
    grid = points.flatten(0, 1)[:, None]  # (B Q, 1, P, 2)
    sampled = F.grid_sample(pooled, grid, padding_mode="zeros", align_corners=False)[:, :, 0]  # (B Q, C, P)
    return sampled.mT.unflatten(0, points.shape[:2])


@pytest.mark.parametrize("bins", [1, 7, 8])
def test_samples_and_gradients_equal_torchvision_and_grid_sample(bins):
    """Of 8 bins, points at their centres are exact in both: gradients agree at these, too, and beyond the bins."""
    cells, edges = torch.randn(2, 13, 21, 19, dtype=torch.float64), boxes(2, 15, 13, 21)
    points = 2.6 * torch.rand(2, 15, 6, 2, dtype=torch.float64) - 1.3
    if bins == 8:
        points[:, :, ::2] = (torch.randint(-2, 10, (2, 15, 3, 2)).double() + 0.5) / 4 - 1
        points[:, :, 1, 0] = 3.5 / 4 - 1
    fast = with_gradients(lambda c, p: roi_sampling(c, edges, p, bins=bins), cells, points)
    wanted = with_gradients(lambda c, p: sample_pooled(c, p, edges, bins), cells, points)
    assert fast[2].abs().amax((0, 1)).min() > 0.01
    torch.testing.assert_close(fast, wanted, rtol=0, atol=1e-11)


def test_any_layout_of_the_inputs():
    """Maps that are a part of the tokens of several levels, channels first, one image for all, boxes transposed."""
    edges, points = boxes(2, 9, 5, 6), torch.rand(2, 9, 3, 2, dtype=torch.float64)
    tokens = torch.randn(2, 50, 24, dtype=torch.float64)
    part = tokens[:, 10:40].unflatten(1, (5, 6))
    layouts = [part, part.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), part[:1].expand(2, -1, -1, -1)]
    assert [cells.is_contiguous() for cells in layouts] == 3 * [False]
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (edges, points)]
    for cells in layouts:
        fast = both(cells, *strided)
        with plain_path():
            wanted = both(cells, edges, points)
        torch.testing.assert_close(fast, wanted, rtol=0, atol=1e-11)


def test_any_number_of_threads_gives_the_same_bits(calls):
    cells, edges, points = torch.randn(2, 21, 26, 64), boxes(2, 200, 21, 26, torch.float32), torch.rand(2, 200, 4, 2)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results.append(both(cells, edges, 2 * points - 1))
    finally:
        torch.set_num_threads(threads)
    assert calls.count("roi_sampling_forward") == 6
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_the_aligner_uses_the_kernels(calls):
    aligner = SemanticsAligner(hidden_dim=32, num_heads=4, predict_scales=True)
    features = torch.randn(2, 32, 6, 7, requires_grad=True)
    aligner(torch.randn(2, 5, 32), torch.rand(2, 5, 4), features).content.sum().backward()
    assert calls == 2 * ["roi_sampling_forward"] + 2 * ["roi_sampling_backward"]


@pytest.mark.parametrize(("batch", "queries", "points"), [(2, 0, 3), (0, 4, 3), (2, 4, 0)])
def test_empty_sets(batch, queries, points):
    cells, edges = torch.randn(batch, 5, 6, 8, requires_grad=True), boxes(batch, queries, 5, 6, torch.float32)
    assert roi_sampling(cells, edges).shape == (batch, queries, 7, 7, 8)
    offsets = torch.rand(batch, queries, points, 2, requires_grad=True)
    content = roi_sampling(cells, edges, offsets)
    assert content.shape == (batch, queries, points, 8)
    content.sum().backward()
    assert not cells.grad.any()
    assert offsets.grad.shape == offsets.shape


def test_only_gradients_that_are_asked_for_are_computed(monkeypatch):
    kinds, call = [], kernels.call
    monkeypatch.setattr(
        kernels, "call", lambda name, *rest: (kinds.append([x is not None for x in rest[-2:]]), call(name, *rest))
    )
    cells, points, edges = torch.randn(1, 5, 6, 8), torch.rand(1, 3, 2, 2), boxes(1, 3, 5, 6, torch.float32)
    roi_sampling(cells.requires_grad_(), edges, points).sum().backward()
    assert kinds[-1] == [True, False]
    roi_sampling(cells.detach(), edges, points.requires_grad_()).sum().backward()
    assert kinds[-1] == [False, True]


@pytest.mark.parametrize("plain", [False, True])
def test_boxes_get_no_gradient(plain, monkeypatch):
    monkeypatch.setattr(kernels, "_wanted", "plain" if plain else "auto")
    edges = boxes(1, 3, 5, 6, torch.float32).requires_grad_()
    cells, points = torch.randn(1, 5, 6, 8, requires_grad=True), torch.rand(1, 3, 2, 2)
    (roi_sampling(cells, edges).sum() + roi_sampling(cells, edges, points).sum()).backward()
    assert edges.grad is None


def test_where_there_is_nothing_to_read_or_less_than_32_bits(calls):
    aligner = SemanticsAligner(hidden_dim=32, num_heads=4)
    inputs = torch.randn(2, 5, 32), torch.rand(2, 5, 4), torch.randn(2, 32, 6, 7)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert aligner(*map(mode.from_tensor, inputs)).content.shape == (2, 5, 4, 32)
    meta = SemanticsAligner(hidden_dim=32, num_heads=4).to("meta")
    assert meta(*(x.to("meta") for x in inputs)).content.shape == (2, 5, 4, 32)
    aligner.bfloat16()(*(x.bfloat16() for x in inputs))
    assert not calls


def test_numbers_that_are_not_finite_stay_visible():
    """A box without a place has no numbers; a point without one takes nothing."""
    cells, edges = torch.randn(1, 4, 4, 3, dtype=torch.float64), torch.tensor([[[0.0, 0, 3, 3]] * 3]).double()
    edges[0, 1, 0], edges[0, 2, 2] = torch.nan, torch.inf
    found = roi_sampling(cells, edges)[0]
    assert found[0].isfinite().all()
    assert found[1:].isnan().all()
    points = torch.tensor([torch.nan, torch.inf], dtype=torch.float64).expand(1, 1, 1, 2)
    assert not roi_sampling(cells, edges[:, :1], points).any()


def test_opcheck():
    """Schema, autograd, fake tensors, and tracing with dynamic shapes; no boxes as well as some."""
    for queries, with_points in ((0, True), (5, True), (5, False)):
        cells, edges = torch.randn(2, 5, 6, 8, requires_grad=True), boxes(2, queries, 5, 6, torch.float32)
        positions = (7 * torch.rand(2, queries, 3, 2)).requires_grad_() if with_points else None
        result = torch.library.opcheck(torch.ops.sam_detr.roi_sampling.default, (cells, edges, positions, 7))
        assert set(result.values()) == {"SUCCESS"}, result
        given = torch.randn_like(torch.ops.sam_detr.roi_sampling(cells, edges, positions, 7))
        detached = None if positions is None else positions.detach()
        arguments = (given, cells.detach(), edges, detached, 7, True, with_points)
        torch.library.opcheck(torch.ops.sam_detr.roi_sampling_backward.default, arguments)


@pytest.mark.parametrize("plain", [False, True])
def test_numerical_gradients(plain, monkeypatch):
    monkeypatch.setattr(kernels, "_wanted", "plain" if plain else "auto")
    cells, edges = torch.randn(1, 4, 5, 3, dtype=torch.float64, requires_grad=True), boxes(1, 6, 4, 5)
    points = (2.4 * torch.rand(1, 6, 2, 2, dtype=torch.float64) - 1.2).requires_grad_()
    torch.autograd.gradcheck(lambda cells: roi_sampling(cells, edges), cells)
    torch.autograd.gradcheck(lambda *x: roi_sampling(x[0], edges, x[1]), (cells, points), eps=1e-7, atol=1e-5)


def test_only_first_derivatives():
    cells = torch.randn(1, 4, 5, 3, requires_grad=True)
    output = roi_sampling(cells, boxes(1, 6, 4, 5, torch.float32))
    (first,) = torch.autograd.grad(output.square().sum(), cells, create_graph=True)
    with pytest.raises(NotImplementedError, match="roi_sampling has first derivatives only"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 4, 5), (1, 6, 4), None), r"cells and boxes: expected \(B, H, W, C\) and .* got \(1, 4, 5\)"),
        (((1, 4, 5, 3), (2, 6, 4), None), r"cells and boxes: .* got \(1, 4, 5, 3\) and \(2, 6, 4\)"),
        (((1, 4, 5, 3), (1, 6, 4), (1, 5, 2, 2)), r"points: expected \(1, 6\) .* got \(1, 5, 2, 2\)"),
    ],
)
def test_shapes_that_do_not_fit(shapes, message):
    tensors = [None if shape is None else torch.zeros(shape) for shape in shapes]
    with pytest.raises(ValueError, match=message):
        roi_sampling(*tensors)


def test_out_of_memory_is_an_exception():
    """Not the end of the process: a kernel that needs 560 MB where 200 MB are left. Afterwards it works again."""
    cells, of_all = torch.rand(1, 20_000, 1, 1), boxes(1, 1000, 20_000, 1, torch.float32)
    assert binding.forward(cells, of_all[:, :3], None, 7).shape == (1, 3, 7, 7, 1)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000, before[1]))
    try:
        with pytest.raises(MemoryError, match="roi_sampling_forward on the CPU ran out of memory"):
            binding.forward(cells, of_all, None, 7)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert binding.forward(cells, of_all[:, :9], None, 7).isfinite().all()
