"""Deformable attention from what its projections give, in one compiled pass: as the formulas of the module have it."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from samdetr.models.ops import MSDeformAttn, kernels, plain_path
from samdetr.models.ops import test as checks
from samdetr.models.ops.fused import ms_deform_attn_fused
from samdetr.models.ops.plain import plain_ms_deform_attn

SIZES = [7, 5, 4, 3, 1, 2, 1, 1]
SHAPES = list(zip(SIZES[::2], SIZES[1::2]))
LENGTH = sum(height * width for height, width in SHAPES)


@pytest.fixture(autouse=True)
def _compiled():
    if reason := kernels.why_not("cpu"):
        pytest.skip(f"no compiled kernel: {reason}")


def example(
    *, columns: int = 2, channels: int = 8, padded: bool = True, queries: int = 70, points: int = 3, dtype=torch.float64
) -> tuple[list[Tensor], Tensor | None]:
    """Value, reference, offsets and logits of two images and two heads, and padding of the first image. About a third
    of the points are at a border or outside."""
    torch.manual_seed(10 * channels + columns)
    levels = len(SHAPES)
    value = torch.randn(2, LENGTH, 2, channels, dtype=torch.float64)
    reference = torch.rand(2, queries, levels, columns, dtype=torch.float64)
    offsets = 2 * torch.randn(2, queries, 2, levels, points, 2, dtype=torch.float64)
    logits = 2 * torch.randn(2, queries, 2, levels * points, dtype=torch.float64)
    padding = torch.rand(2, LENGTH) < torch.tensor([[0.3], [0.0]])
    return [x.to(dtype) for x in (value, reference, offsets, logits)], padding if padded else None


def by_formula(value: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor, padding: Tensor | None) -> Tensor:
    if padding is not None:
        value = value.masked_fill(padding[..., None, None], 0)
    reference, points = reference[:, :, None, :, None], offsets.shape[4]
    if reference.shape[-1] == 2:
        sizes = torch.tensor([(width, height) for height, width in SHAPES], dtype=value.dtype)
        locations = reference + offsets / sizes[:, None]
    else:
        locations = reference[..., :2] + offsets / points * reference[..., 2:] * 0.5
    return plain_ms_deform_attn(value, SIZES, locations, logits.softmax(-1).unflatten(-1, (len(SHAPES), points)))


def fused(value: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor, padding: Tensor | None) -> Tensor:
    return ms_deform_attn_fused(value, SIZES, reference, offsets, logits, padding)


def run(function, inputs: list[Tensor], padding: Tensor | None) -> list[Tensor]:
    """Output and all gradients."""
    return checks.with_gradients(lambda *leaves: function(*leaves, padding), inputs)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("columns", [2, 4])
@pytest.mark.parametrize("channels", [1, 8, 32, 71, 104])
def test_outputs_and_gradients(channels, columns, padded):
    inputs, padding = example(channels=channels, columns=columns, padded=padded)
    expected = run(by_formula, inputs, padding)
    for actual, wanted in zip(run(fused, inputs, padding), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)
    narrow = run(fused, [x.float() for x in inputs], padding)
    for actual, wanted in zip(narrow, expected, strict=True):
        assert actual.dtype == torch.float32
        assert checks.error(actual, wanted) < 2e-5
    if padded:
        assert not narrow[1][padding].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("points", [1, 4, 5])
def test_any_number_of_points(points, dtype):
    """From lists shorter than a register to some with a part of one left."""
    inputs, padding = example(points=points, queries=3, dtype=dtype)
    wanted = run(by_formula, [x.double() for x in inputs], padding)
    for actual, expected in zip(run(fused, inputs, padding), wanted, strict=True):
        assert checks.error(actual, expected) < checks.TOLERANCE[dtype]


def weights_of(logits: Tensor) -> Tensor:
    """Softmax of (Q, points) as the kernel computes it: each point looks at the centre of a cell of its own."""
    queries, points = logits.shape
    value = torch.eye(points, dtype=logits.dtype)[None, :, None]  # (1, L, 1, C)
    reference = torch.tensor([0.0, 0.5], dtype=logits.dtype).expand(1, queries, 1, 2)
    across = torch.arange(points, dtype=logits.dtype) + 0.5
    offsets = torch.stack([across, torch.zeros_like(across)], -1).expand(1, queries, 1, 1, points, 2)
    return ms_deform_attn_fused(value, [1, points], reference, offsets, logits[None, :, None], None)[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 4e-7), (torch.float64, 1e-14)])
def test_softmax_is_accurate(dtype, tolerance):
    """In relation to each weight, also to the smallest. The largest logit is 0, so that no difference is rounded."""
    torch.manual_seed(0)
    logits = torch.cat([-85 * torch.rand(5000, 12), torch.randn(5000, 12), 1e4 * torch.rand(50, 12)]).to(dtype)
    logits = logits - logits.amax(1, keepdim=True)
    wanted = logits.double().softmax(-1)
    actual = weights_of(logits).double()
    normal = wanted > 1e-37
    assert ((actual - wanted).abs() / wanted)[normal].max() < tolerance
    assert actual[~normal].max() <= 1e-37


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_that_are_not_finite(dtype):
    """As PyTorch's softmax: minus infinity is a weight of 0, infinity and no number make the row no number."""
    for special in (-torch.inf, torch.inf, torch.nan):
        for place in (0, 3, 11):
            logits = torch.randn(2, 12, dtype=dtype)
            logits[1, place] = special
            torch.testing.assert_close(weights_of(logits), logits.softmax(-1), equal_nan=True)
    assert weights_of(torch.full((1, 3), -torch.inf, dtype=dtype)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("place", [1e30, -3e38, torch.inf, -torch.inf, torch.nan])
def test_points_that_are_nowhere(place, dtype):
    """Count as 0 and get no gradient."""
    inputs, padding = example(dtype=dtype)
    inputs[2] = torch.full_like(inputs[2], place)
    for tensor in run(fused, inputs, padding):
        assert not tensor.any()


def test_padded_cells_may_hold_anything():
    inputs, padding = example()
    expected = run(fused, inputs, padding)
    for filling in (1e30, torch.nan):
        changed = [inputs[0].masked_fill(padding[..., None, None], filling), *inputs[1:]]
        assert all(torch.equal(a, b) for a, b in zip(run(fused, changed, padding), expected, strict=True))


def test_any_layout_of_the_inputs():
    inputs, padding = example(columns=4)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    assert not any(x.is_contiguous() for x in strided)
    expected = run(fused, inputs, padding)
    actual = run(fused, strided, padding.T.contiguous().T)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("columns", [2, 4])
def test_any_number_of_threads_gives_the_same_bits(columns):
    inputs, padding = example(columns=columns, channels=32, queries=400, dtype=torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(fused, inputs, padding))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_no_queries_and_no_images():
    for batch, queries in ((2, 0), (0, 5)):
        (value, *rest), padding = example()
        inputs = [value[:batch], *(x[:batch, :queries] for x in rest)]
        output, *gradients = run(fused, inputs, padding[:batch])
        assert output.shape == (batch, queries, 16)
        assert [g.shape for g in gradients] == [i.shape for i in inputs]
        assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    """Schema, autograd, fake tensors, and tracing with dynamic shapes; no queries as well as some."""
    for queries in (0, 5):
        (value, *rest), padding = example(queries=queries, dtype=dtype)
        inputs = (value.requires_grad_(), SIZES, *(x.requires_grad_() for x in rest), padding)
        result = torch.library.opcheck(torch.ops.sam_detr.ms_deform_attn_fused.default, inputs)
        assert set(result.values()) == {"SUCCESS"}, result
        detached = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
        grad = torch.randn(2, queries, 16, dtype=dtype)
        torch.library.opcheck(torch.ops.sam_detr.ms_deform_attn_fused_backward.default, (grad, *detached))


def test_only_first_derivatives():
    (value, reference, offsets, logits), padding = example(queries=3)
    output = fused(value, reference, offsets.requires_grad_(), logits, padding)
    (first,) = torch.autograd.grad(output.sum(), offsets, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        first.sum().backward()


# The module


@pytest.fixture
def calls(monkeypatch) -> Counter:
    """How often the kernels are called."""
    counter, call = Counter(), kernels.call
    monkeypatch.setattr(kernels, "call", lambda name, *rest: (counter.update([name]), call(name, *rest))[1])
    return counter


def module_and_inputs(columns: int, dtype: torch.dtype):
    torch.manual_seed(columns)
    module = MSDeformAttn(hidden_dim=32, num_levels=len(SHAPES), num_heads=4, num_points=2).to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    inputs = [torch.randn(2, 9, 32, dtype=dtype), torch.rand(2, 9, len(SHAPES), columns, dtype=dtype)]
    return module, [*inputs, torch.randn(2, LENGTH, 32, dtype=dtype)], torch.rand(2, LENGTH) < 0.3


def work(module: MSDeformAttn, inputs: list[Tensor], padding: Tensor | None) -> list[Tensor]:
    """Output, and gradients of query, reference, value and all parameters."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = module(*leaves, SHAPES, padding)
    return [output, *torch.autograd.grad(output.square().sum(), [*leaves, *module.parameters()])]


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("columns", [2, 4])
def test_the_module_takes_it_and_gives_the_same(columns, padded, calls):
    module, inputs, padding = module_and_inputs(columns, torch.float64)
    padding = padding if padded else None
    actual = work(module, inputs, padding)
    assert calls == {"ms_deform_attn_fused_forward": 1, "ms_deform_attn_fused_backward": 1}
    with plain_path():
        expected = work(module, inputs, padding)
    assert sum(calls.values()) == 2
    for ours, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


def test_where_the_module_takes_the_operator_instead(calls):
    """Under autocast, compiled, in 16 bits; and on the meta device."""
    module, inputs, padding = module_and_inputs(2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        module(*inputs, SHAPES, padding)
    torch.compile(module, backend="aot_eager")(*inputs, SHAPES, padding)
    module.bfloat16()(*(x.bfloat16() for x in inputs), SHAPES, padding)
    assert calls == {"ms_deform_attn_forward": 3}
    with torch.device("meta"):
        module, inputs, padding = module_and_inputs(2, torch.float32)
        assert module(*inputs, SHAPES, padding).is_meta
    assert calls == {"ms_deform_attn_forward": 3}
