"""Dropout by the compiled kernels and by PyTorch."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from samdetr.models.dropout import Dropout, dropout, relu_dropout_
from samdetr.models.ops import kernels, plain_path


@pytest.fixture(params=["compiled", "plain"], autouse=True)
def path(request):
    if request.param == "compiled" and (reason := kernels.why_not("cpu")):
        pytest.skip(reason)
    with plain_path() if request.param == "plain" else nullcontext():
        yield request.param


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_drops_as_often_as_asked_and_keeps_the_mean(probability):
    torch.manual_seed(0)
    x = torch.full((1000, 999), 2.0, dtype=torch.float64, requires_grad=True)
    y = dropout(x, probability, training=True)
    kept = y != 0
    # Five standard deviations, over all, of a column, and of every fourth value.
    for share, number in ((kept, kept.numel()), (kept[:, 0], 1000), *((kept.flatten()[i::4], 2e5) for i in range(4))):
        assert abs(share.double().mean() - (1 - probability)) < 5 * (probability * (1 - probability) / number) ** 0.5
    # Neighbours know nothing of each other.
    centred = kept.flatten().double() - (1 - probability)
    for distance in (1, 2, 3, 4, 16, 999, 1024):
        correlation = (centred[distance:] * centred[:-distance]).mean() / (probability * (1 - probability))
        assert abs(correlation) < 5 / len(centred) ** 0.5
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 2 / (1 - probability)), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, y.detach() / 2, rtol=1e-12, atol=0)


def test_follows_the_seed_and_the_mode():
    module, x = Dropout(0.3), torch.ones(7, 13)
    torch.manual_seed(3)
    first, second = module(x), module(x)
    torch.manual_seed(3)
    assert torch.equal(first, module(x))
    assert not torch.equal(first, second)
    assert torch.equal(module.eval()(x), x)
    for probability in (0.0, 1.0, 1e-10):  # nothing, all, less than 32 bits tell
        torch.manual_seed(0)
        wanted = nn.Dropout(probability)(x)
        assert torch.equal(Dropout(probability)(x), wanted)
    assert Dropout(0.3)(torch.ones(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0, 1e-10])
@pytest.mark.parametrize("training", [False, True])
def test_relu_and_dropout_in_one(probability, training):
    """As one after the other, from the same random numbers; the gradient, too."""
    x = torch.randn(50, 31, dtype=torch.float64)
    x[0, :2] = torch.tensor([0.0, -0.0])
    weights, results = torch.randn_like(x), []
    for together in (False, True):
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        if together:
            y = relu_dropout_(leaf * 1, probability, training=training)
        else:
            y = dropout(leaf.relu(), probability, training=training)
        results.append([y, *torch.autograd.grad((y * weights).sum(), leaf)])
    torch.testing.assert_close(*results, rtol=1e-12, atol=0)


def test_any_number_of_threads_and_any_layout(path):
    x = torch.randn(300, 700).mT.requires_grad_()
    results, threads = [], torch.get_num_threads()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        torch.manual_seed(2)
        y = dropout(x, 0.2, training=True)
        z = relu_dropout_(y * 1, 0.2, training=True)
        results.append((y, z, *torch.autograd.grad(z.square().sum(), x)))
    torch.set_num_threads(threads)
    for other in results[1:] if path == "compiled" else []:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other))
    y, z, gradient = results[0]
    assert torch.equal(y != 0, (y / x).isclose(torch.tensor(1 / 0.8)))
    assert torch.equal(z != 0, (z > 0) & (z / x).isclose(torch.tensor(1 / 0.64)))
    torch.testing.assert_close(gradient, 2 * z / 0.64)


def test_kernels_keep_nothing(path):
    if path == "plain":
        pytest.skip("PyTorch keeps what it drew")
    x = torch.randn(100, 100, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        dropout(x, 0.2, training=True)
    assert saved == [1]  # the seed


def test_what_is_no_number_stays_none():
    x = torch.tensor([[torch.nan, -1.0, 2.0]]).repeat(1000, 1)
    dropped = relu_dropout_(x, 0.5, training=True)
    assert dropped[:, 0].isnan().any()
    assert (dropped[:, 1] == 0).all()
    assert set(dropped[:, 2].tolist()) == {0, 4}
