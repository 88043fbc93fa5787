"""Dropout as we draw it on a CPU."""

import pytest
import torch
from torch import nn

from models.dropout import Dropout, dropout, relu_dropout_


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_drops_as_often_as_asked_and_keeps_the_mean(probability):
    torch.manual_seed(0)
    x = torch.full((1000, 999), 2.0, dtype=torch.float64, requires_grad=True)
    y = dropout(x, probability, training=True)
    kept = y != 0
    # Five standard deviations, over all, and of rows and of every fourth column (the four values that share a draw).
    for share, number in ((kept, kept.numel()), (kept[:, 0], 1000), *((kept.flatten()[i::4], 2e5) for i in range(4))):
        assert abs(share.double().mean() - (1 - probability)) < 5 * (probability * (1 - probability) / number) ** 0.5
    # Neighbours know nothing of each other.
    centred = kept.flatten().double() - (1 - probability)
    for distance in (1, 2, 3, 4, 999):
        correlation = (centred[distance:] * centred[:-distance]).mean() / (probability * (1 - probability))
        assert abs(correlation) < 5 / len(centred) ** 0.5
    threshold = round(probability * 2**16) / 2**16
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 2 / (1 - threshold)), rtol=1e-12, atol=0)
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
    for probability in (0.0, 1.0, 1e-9):  # nothing, all, less than 16 bits tell
        torch.manual_seed(0)
        wanted = nn.Dropout(probability)(x)
        assert torch.equal(Dropout(probability)(x), wanted)
    assert Dropout(0.3)(torch.ones(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0, 1e-9])
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
