"""prior_attention by its kernel and by plain PyTorch, against attention with a dense prior."""

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from samdetr.models.attention import merge_heads, split_heads
from samdetr.models.ops import kernels
from samdetr.models.ops.kernels import plain_path
from samdetr.models.ops.prior_attention import prior_attention


@pytest.fixture(params=["compiled", "plain"])
def path(request):
    if request.param == "compiled" and (reason := kernels.why_not("cpu")):
        pytest.skip(reason)
    with plain_path() if request.param == "plain" else nullcontext():
        yield request.param


@pytest.fixture
def kernel():
    if reason := kernels.why_not("cpu"):
        pytest.skip(reason)


def random_inputs(
    *, batch=2, heads=4, queries=5, height=3, width=3, depth=16, value_width=6, key_heads=4, prior_heads=4, seed=0,
    dtype=torch.float64,
) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
    """In the layouts that the networks hand over: heads beside each other; the last image padded right and below."""
    generator = torch.Generator().manual_seed(seed)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    length = height * width
    inputs = {
        "query": made(batch, queries, heads, depth).transpose(1, 2),
        "key": made(batch, length, key_heads, depth).transpose(1, 2),
        "value": made(batch, length, heads, value_width).transpose(1, 2),
    }
    if prior_heads:
        inputs["rows"], inputs["columns"] = (made(batch, prior_heads, queries, size) for size in (height, width))
    padding = torch.zeros(batch, height, width, dtype=torch.bool)
    padding[-1, :, width - width // 3 :] = True
    padding[-1, height - height // 3 :] = True
    return inputs, padding.flatten(1)


def by_dense_prior(x: dict[str, Tensor], padding: Tensor | None) -> Tensor:
    batch, heads, queries = x["query"].shape[:3]
    mask = torch.zeros(batch, heads, queries, x["key"].shape[2], dtype=x["query"].dtype)
    if padding is not None:
        mask = mask.masked_fill(padding[:, None, None], -math.inf)
    if "rows" in x:
        mask = mask + (x["rows"][..., None] + x["columns"][..., None, :]).flatten(3)
    key = x["key"].expand(-1, heads, -1, -1)
    return F.scaled_dot_product_attention(x["query"], key, x["value"], attn_mask=mask)


def with_gradients(function, inputs: dict[str, Tensor], **arguments) -> list[Tensor]:
    """The output, and the gradient of every input when the output is weighted."""
    x = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    output = function(x, **arguments)
    weights = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (output * weights.to(output.dtype)).sum().backward()
    return [output, *(value.grad for value in x.values())]


def ours(x: dict[str, Tensor], *, padding: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    prior = (x["rows"], x["columns"]) if "rows" in x else None
    return prior_attention(x["query"], x["key"], x["value"], padding=padding, prior=prior, dropout=dropout)


@pytest.mark.parametrize("shared_key", [False, True])
@pytest.mark.parametrize("prior_heads", [0, 1, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_equals_a_dense_prior(shared_key, prior_heads, padded, path):
    """Values narrower than keys; gradients too."""
    inputs, padding = random_inputs(key_heads=1 if shared_key else 4, prior_heads=prior_heads)
    padding = padding if padded else None
    wanted = with_gradients(by_dense_prior, inputs, padding=padding)
    torch.testing.assert_close(with_gradients(ours, inputs, padding=padding), wanted, rtol=0, atol=1e-12)


SIZES = {  # several blocks of queries and of keys, and what does not fill a block, a tile or a vector
    "one of each": {"batch": 1, "heads": 1, "queries": 1, "height": 1, "width": 1, "depth": 1, "value_width": 1},
    "rows longer than blocks": {"queries": 101, "height": 3, "width": 299, "depth": 8, "value_width": 33},
    "rows of one cell": {"queries": 13, "height": 301, "width": 1, "depth": 5},
    "a map as published": {"batch": 1, "heads": 8, "queries": 97, "height": 20, "width": 27, "depth": 256},
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shared", [False, True])
def test_kernel_of_any_size(size, shared, kernel, monkeypatch):
    """Outputs and all gradients in float64 to 1e-12, in float32 to its own rounding; the same bits on one thread."""
    heads = SIZES[size].get("heads", 4)
    shared_by = {"key_heads": 1, "prior_heads": 1} if shared else {"key_heads": heads, "prior_heads": heads}
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        inputs, padding = random_inputs(**SIZES[size], **shared_by, dtype=dtype)
        result = with_gradients(ours, inputs, padding=padding)
        in_float64 = {name: value.double() for name, value in inputs.items()}
        for one, other in zip(result, with_gradients(by_dense_prior, in_float64, padding=padding), strict=True):
            scale = max(1.0, other.abs().max().item())
            torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance * scale)
        threads = torch.get_num_threads()
        for number in (1, 3):
            torch.set_num_threads(number)
            try:
                again = with_gradients(ours, inputs, padding=padding)
            finally:
                torch.set_num_threads(threads)
            assert all(torch.equal(one, other) for one, other in zip(result, again, strict=True))


def test_kernel_runs_where_it_should(kernel, monkeypatch):
    calls = []
    call = kernels.call
    monkeypatch.setattr(kernels, "call", lambda name, *rest: calls.append(name) or call(name, *rest))
    inputs, padding = random_inputs(dtype=torch.float32)
    with_gradients(ours, inputs, padding=padding)
    assert calls == ["prior_attention_forward", "prior_attention_backward"]
    with plain_path():
        ours(inputs)
    ours({name: value.bfloat16() for name, value in inputs.items()})
    ours({name: value.to("meta") for name, value in inputs.items()})
    empty, _ = random_inputs(queries=0)
    assert with_gradients(ours, empty)[0].shape == (2, 4, 0, 6)
    assert len(calls) == 2
    torch.compile(ours, backend="aot_eager", fullgraph=True)(inputs)
    torch._dynamo.reset()
    assert len(calls) == 3


def test_gradients_of_some_inputs(kernel):
    """As where a layer is frozen, or the prior is fixed."""
    inputs, padding = random_inputs()
    wanted = dict(zip(inputs, with_gradients(by_dense_prior, inputs, padding=padding)[1:]))
    for name in inputs:
        x = {key: value.clone().requires_grad_(key == name) for key, value in inputs.items()}
        output = ours(x, padding=padding)
        weights = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        (gradient,) = torch.autograd.grad((output * weights).sum(), x[name])
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=1e-12)


def test_large_and_non_finite_logits(path):
    """Rows whose maximum grows from block to block, priors that hide all but one key, rows without any key, and NaN."""
    inputs, _ = random_inputs(batch=1, heads=1, queries=4, height=30, width=20, depth=4, key_heads=1, prior_heads=1)
    inputs["key"] *= torch.linspace(0, 60, 600, dtype=torch.float64)[:, None]
    inputs["rows"][0, 0, 1], inputs["columns"][0, 0, 1] = -1e4, -1e4
    inputs["rows"][0, 0, 1, 17] = inputs["columns"][0, 0, 1, 3] = 0
    result, wanted = ours(inputs), by_dense_prior(inputs, None)
    torch.testing.assert_close(result, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(result[0, 0, 1], inputs["value"][0, 0, 17 * 20 + 3], rtol=0, atol=1e-12)
    nothing = with_gradients(ours, inputs, padding=torch.ones(1, 600, dtype=torch.bool))
    assert not any(x.any() for x in nothing)
    inputs["query"][0, 0, 2, 0] = math.nan
    result = ours(inputs)
    assert result[0, 0].isnan().all(1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("probability", [0.1, 0.75])
def test_dropout(probability, path):
    """Weights are dropped as often as asked, each on its own, the others scaled; backward drops the same ones."""
    queries, height, width, depth = 120, 17, 24, 3
    length = height * width
    inputs, padding = random_inputs(
        heads=2, queries=queries, height=height, width=width, depth=depth, key_heads=1, prior_heads=2
    )
    identity = torch.eye(length, dtype=torch.float64).expand(2, 2, length, length)  # so the output shows the weights
    weights = ours(inputs | {"value": identity}, padding=padding)
    torch.manual_seed(3)
    dropped = ours(inputs | {"value": identity}, padding=padding, dropout=probability)
    kept = (dropped != 0).double()
    scale = (dropped.sum() / (weights * kept).sum()).item()
    assert scale == pytest.approx(1 / (1 - probability), rel=1e-9)
    torch.testing.assert_close(dropped, weights * kept * scale, rtol=0, atol=1e-12)
    valid = ~padding[:, None, None].expand_as(kept)
    deviation = (probability * (1 - probability)) ** 0.5
    for axes in ((0, 1, 2, 3), (0, 1, 2), (0, 1, 3)):  # of all, of each key, of each query
        share = (kept * valid).sum(axes) / valid.sum(axes)
        error = (share - (1 - probability)) / deviation * valid.sum(axes).sqrt()
        assert error[valid.sum(axes) > 0].abs().max() < 5  # standard deviations
    centred = (kept - (1 - probability))[
        0
    ]  # nothing is padded there; neighbours along any axis know nothing of each other
    for one, other in (
        (centred[0], centred[1]),
        (centred[:, 1:], centred[:, :-1]),
        (centred[..., 1:], centred[..., :-1]),
    ):
        assert abs((one * other).mean().item()) < 5 * deviation**2 / one.numel() ** 0.5

    def by_hand(x: dict[str, Tensor]) -> Tensor:
        logits = (x["query"] @ x["key"].mT) * depth**-0.5 + (x["rows"][..., None] + x["columns"][..., None, :]).flatten(
            3
        )
        return (logits.masked_fill(padding[:, None, None], -math.inf).softmax(-1) * kept * scale) @ x["value"]

    torch.manual_seed(3)
    result = with_gradients(ours, inputs, padding=padding, dropout=probability)
    torch.testing.assert_close(result, with_gradients(by_hand, inputs), rtol=0, atol=1e-9)
    torch.manual_seed(4)
    assert not torch.equal(result[0], ours(inputs, padding=padding, dropout=probability))


def test_dropout_of_all_and_of_nearly_nothing(path):
    inputs, _ = random_inputs()
    torch.testing.assert_close(ours(inputs, dropout=1e-12), ours(inputs), rtol=0, atol=1e-9)
    assert (ours(inputs, dropout=1.0) == 0).all()


def test_attention_dropout_drops_weights(path):
    """A weight is 0 or doubled, and rows no longer sum to 1: values of 1 show the sum."""
    query, key, value = torch.zeros(1, 2, 500, 4), torch.zeros(1, 2, 8, 4), torch.ones(1, 2, 8, 1)
    sums = prior_attention(query, key, value, dropout=0.5).flatten()  # eight weights of 1/8 each
    assert set((4 * sums).tolist()) <= set(range(9))
    assert sums.mean().item() == pytest.approx(1, abs=0.05)  # six standard errors
    assert sums.std() > 0.2
    assert (prior_attention(query, key, value) == 1).all()


def test_kernel_keeps_little_for_backward(kernel):
    """Beside what it was given: the output and a number for each query and head."""
    inputs, padding = random_inputs(queries=50, height=20, width=20)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        x = {name: value.clone().requires_grad_() for name, value in inputs.items()}
        output = ours(x, padding=padding, dropout=0.1)
    given = {value.untyped_storage().data_ptr() for value in (*x.values(), padding, output)}
    others = sum(tensor.numel() for tensor in saved if tensor.untyped_storage().data_ptr() not in given)
    assert others == output[..., 0].numel() + 1  # the sums, the seed


def test_heads_split_and_merge():
    x = torch.arange(24).view(1, 2, 12)
    heads = split_heads(x, 3)
    assert heads.shape == (1, 3, 2, 4)
    assert heads[0, 1].tolist() == [[4, 5, 6, 7], [16, 17, 18, 19]]
    assert torch.equal(merge_heads(heads), x)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"rows": (2, 4, 5, 2)}, "prior: 2 rows and 4 columns, but 12 keys"),
        ({"rows": (1, 4, 5, 3)}, r"prior's rows: expected \(2, 4, 5, 3\) or \(2, 1, 5, 3\), got \(1, 4, 5, 3\)"),
        ({"rows": (2, 1, 5, 3)}, r"prior's columns: expected \(2, 1, 5, 4\), got \(2, 4, 5, 4\)"),
        ({"key": (2, 4, 12, 8)}, r"key: expected \(2, 4, 12, 16\) or \(2, 1, 12, 16\), got \(2, 4, 12, 8\)"),
        ({"value": (2, 1, 12, 6)}, r"value: expected \(2, 4, 12, 6\), got \(2, 1, 12, 6\)"),
        ({"padding": (2, 11)}, r"padding: expected \(2, 12\), got \(2, 11\)"),
        ({"query": (2, 5, 16)}, r"query and key: expected 4 axes each, got \(2, 5, 16\)"),
    ],
)
def test_shapes_that_do_not_fit(others, message, path):
    inputs, padding = random_inputs(height=3, width=4)
    inputs |= {name: torch.zeros(shape, dtype=torch.float64) for name, shape in others.items() if name != "padding"}
    padding = torch.zeros(others.get("padding", padding.shape), dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        ours(inputs, padding=padding)


@pytest.mark.parametrize("prior_heads", [0, 1, 4])
def test_opcheck(prior_heads, kernel):
    """Schema, autograd, fake tensors, and tracing with dynamic shapes; no queries as well as some."""
    for queries in (0, 5):
        inputs, padding = random_inputs(queries=queries, key_heads=1, prior_heads=prior_heads)
        x = {name: value.requires_grad_() for name, value in inputs.items()}
        prior = x.get("rows"), x.get("columns")
        arguments = (x["query"], x["key"], x["value"], padding, *prior, None, 0.0)
        result = torch.library.opcheck(torch.ops.sam_detr.prior_attention.default, arguments)
        assert set(result.values()) == {"SUCCESS"}, result
        detached = [value.detach() if isinstance(value, Tensor) else value for value in arguments]
        results = torch.ops.sam_detr.prior_attention(*detached)
        backward = (torch.randn_like(results[0]), *detached, *results)
        torch.library.opcheck(torch.ops.sam_detr.prior_attention_backward.default, backward)


def test_numerical_gradients(path):
    inputs, padding = random_inputs(batch=1, heads=2, queries=2, depth=3, value_width=2, key_heads=1, prior_heads=2)
    leaves = [value.clone().requires_grad_() for value in inputs.values()]
    torch.autograd.gradcheck(lambda *x: ours(dict(zip(inputs, x)), padding=padding), leaves)


def test_only_first_derivatives(kernel):
    inputs, _ = random_inputs()
    query = inputs["query"].requires_grad_()
    (first,) = torch.autograd.grad(ours(inputs).sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="prior_attention has first derivatives only"):
        first.sum().backward()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_under_vmap(path):
    inputs, padding = random_inputs()
    one = lambda x, hidden: ours({name: value[None] for name, value in x.items()}, padding=hidden[None])[0]  # noqa: E731
    torch.testing.assert_close(torch.vmap(one)(inputs, padding), ours(inputs, padding=padding))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_prior_is_as_exact_in_16_bits_as_the_logits(dtype):
    """A Gaussian around cells of a map of 100 x 134, as wide as a cell and as the map, and content that says little."""
    inputs, _ = random_inputs(batch=1, heads=2, queries=8, height=100, width=134, depth=64, key_heads=1, prior_heads=2)
    inputs["query"], inputs["key"] = inputs["query"] / 4, inputs["key"] / 4
    scale = torch.tensor([0.05, 0.5, 2.0, 20.0], dtype=torch.float64).repeat(2)
    for name, size in (("rows", 100), ("columns", 134)):
        distance = torch.arange(size) + 0.5 - size * torch.rand(1, 2, 8, 1, dtype=torch.float64)
        inputs[name] = -(scale[:, None] * distance).square() / 8
    narrow = {name: value.to(dtype) if name in ("query", "key", "value") else value for name, value in inputs.items()}
    result = ours(narrow | {name: narrow[name].float() for name in ("rows", "columns")}).double()
    wanted = by_dense_prior({name: value.double() for name, value in narrow.items()}, None)
    rounding = torch.finfo(dtype).eps
    assert (result - wanted).abs().max() < 4 * rounding * wanted.abs().max()
