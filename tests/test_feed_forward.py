"""The compiled end of a transformer layer in evaluation, against its modules."""

import pytest
import torch
from torch import nn

from samdetr.models.dropout import Dropout
from samdetr.models.layers import FeedForward
from samdetr.models.ops import kernels, plain_path


@pytest.fixture
def calls(monkeypatch):
    if reason := kernels.why_not("cpu"):
        pytest.skip(reason)
    calls, call = [], kernels.call
    monkeypatch.setattr(kernels, "call", lambda name, *rest: calls.append(name) or call(name, *rest))
    return calls


def layer(channels: int, units: int, *, dtype: torch.dtype, activation: str = "relu"):
    torch.manual_seed(0)
    branch = FeedForward(hidden_dim=channels, feedforward_dim=units, dropout=0.1, activation=activation).to(dtype)
    norm = nn.LayerNorm(channels, eps=1e-3, dtype=dtype)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return branch.eval(), {"norm": norm, "dropout": Dropout(0.1).eval()}


@pytest.mark.parametrize(("rows", "channels", "units"), [(257, 36, 50), (601, 256, 1024), (300, 64, 7), (1031, 8, 33)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_modules(rows, channels, units, dtype, calls):
    """Sizes that fill no tile or vector, from memory with gaps, on any number of threads."""
    branch, rest = layer(channels, units, dtype=dtype)
    x = torch.randn(2, rows, 2 * channels, dtype=dtype)[..., ::2]
    threads = torch.get_num_threads()
    with torch.no_grad():
        results = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(branch.added_to(x, **rest))
        torch.set_num_threads(threads)
        with plain_path():
            wanted = branch.double().added_to(x.double(), norm=rest["norm"].double(), dropout=rest["dropout"])
    assert calls == ["feed_forward"] * 3
    assert results[0].dtype == dtype
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(results[0].double(), wanted, rtol=tolerance, atol=tolerance)


def test_where_it_does_not_run(calls):
    """With gradients or dropout, for few rows, in 16 bits, with another activation, for a compiler."""
    x = torch.randn(1, 300, 16)
    branch, rest = layer(16, 32, dtype=torch.float32)
    branch.added_to(x, **rest)
    with torch.no_grad():
        branch.added_to(x[:, :5], **rest)
        assert branch.added_to(x[:, :0], **rest).shape == (1, 0, 16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            branch.added_to(x, **rest)
        branch.train()
        branch.added_to(x, **rest)
        other, rest = layer(16, 32, dtype=torch.float32, activation="prelu")
        other.added_to(x, **rest)
        torch.compile(branch.eval().added_to, backend="eager", fullgraph=True)(x, **rest)
        torch._dynamo.reset()
    assert "feed_forward" not in calls


def test_what_is_no_number_stays_none(calls):
    branch, rest = layer(16, 32, dtype=torch.float32)
    x = torch.randn(1, 300, 16)
    x[0, 7, 3] = torch.nan
    with torch.no_grad():
        assert branch.added_to(x, **rest).isnan().all(2).nonzero().tolist() == [[0, 7]]
    assert calls == ["feed_forward"]


def test_other_shapes_are_left_to_pytorch(calls):
    """The kernel would read where nothing is."""
    branch, rest = layer(32, 48, dtype=torch.float32)
    bare = nn.LayerNorm(32, elementwise_affine=False)
    with torch.no_grad():
        with pytest.raises(RuntimeError):
            branch.added_to(torch.randn(1, 300, 16), **rest)
        with pytest.raises(RuntimeError):
            branch.added_to(torch.randn(1, 300, 32), **rest | {"norm": nn.LayerNorm(16)})
        x = torch.randn(1, 300, 32)
        torch.testing.assert_close(branch.added_to(x, **rest | {"norm": bare}), bare(x + branch(x)))
    assert calls == []
