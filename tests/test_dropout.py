"""ReLU and dropout in one step that keeps no mask."""

import pytest
import torch
import torch.nn.functional as F

from samdetr.models.layers import relu_dropout_


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
            y = F.dropout(leaf.relu(), probability, training)
        results.append([y, *torch.autograd.grad((y * weights).sum(), leaf)])
    torch.testing.assert_close(*results, rtol=1e-12, atol=0)


def test_keeps_the_result_alone():
    x, saved = torch.randn(100, 100, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):
        y = x * 1.0
        saved.clear()
        y = relu_dropout_(y, 0.2, training=True)
    assert saved == [y.data_ptr()]


def test_what_is_no_number_stays_none():
    x = torch.tensor([[torch.nan, -1.0, 2.0]]).repeat(1000, 1)
    dropped = relu_dropout_(x, 0.5, training=True)
    assert dropped[:, 0].isnan().any()
    assert (dropped[:, 1] == 0).all()
    assert set(dropped[:, 2].tolist()) == {0, 4}
