"""The average of the weights against a loop in float64."""

import copy
import io

import pytest
import torch
from torch import nn

from samdetr.training.ema import WeightAverage


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3), nn.Linear(3, 3))
    model[3].requires_grad_(False)
    model.append(model[0])  # shared
    return model


def wander(model: nn.Module) -> None:
    """As a step of training does."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += torch.randn_like(weight)
        model[1].running_mean += 1


@pytest.mark.parametrize("decay", [0.5, 0.9998])
def test_average_equals_a_loop_in_float64(decay):
    model = network()
    average = WeightAverage(model, decay=decay)
    wanted = {name: weight.detach().double() for name, weight in model.named_parameters()}
    taken = 0
    for step in range(40):
        wander(model)
        skip = step % 5 == 3  # a step that is not taken changes no weight; here they move, so that it would show
        average.update(torch.tensor(float(skip)))
        if not skip:
            d = min(decay, (1 + taken) / (10 + taken))
            taken += 1
            for name, weight in model.named_parameters():
                wanted[name] = d * wanted[name] + (1 - d) * weight.detach().double()
    weights = average.weights()
    assert list(weights) == list(model.state_dict())
    for name, value in wanted.items():
        torch.testing.assert_close(weights[name].double(), value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights["4.weight"], weights["0.weight"], rtol=0, atol=0)
    assert torch.equal(weights["1.running_mean"], model[1].running_mean)  # of the network, not averaged
    assert not torch.allclose(weights["0.weight"], model[0].weight)
    assert average.state_dict()["updates"] == 32
    nn.init.ones_(model[3].weight)  # frozen, so never averaged
    assert torch.equal(average.weights()["3.weight"], torch.ones(3, 3))


def test_decay_by_hand():
    """From 0 towards 1: shares of 9/10, 9/11, 9/12 of the new weights leave 1/10 x 2/11 x 3/12 of the start."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = WeightAverage(model, decay=0.9998)
    nn.init.ones_(model.weight)
    for _ in range(3):
        average.update()
    assert average.weights()["weight"].item() == pytest.approx(1 - 0.1 * 2 / 11 * 0.25, abs=1e-6)
    average.updates.fill_(50_000)  # 9 / 50,010 is less than 1 - 0.9998
    before = average.weights()["weight"].item()
    average.update()
    assert average.weights()["weight"].item() == pytest.approx(before + 2e-4 * (1 - before), abs=1e-7)


def test_network_computes_with_the_average_and_gets_its_weights_back():
    model = network().eval()
    average = WeightAverage(model, decay=0.9)
    wander(model)
    average.update()
    own, x = copy.deepcopy(model.state_dict()), torch.randn(2, 3)
    other = network().eval()
    other.load_state_dict(average.weights())
    with average.in_place():
        torch.testing.assert_close(model(x), other(x), rtol=0, atol=0)
    torch.testing.assert_close(model.state_dict(), own, rtol=0, atol=0)
    assert not torch.allclose(model(x), other(x))
    with pytest.raises(KeyboardInterrupt), average.in_place():
        raise KeyboardInterrupt
    torch.testing.assert_close(model.state_dict(), own, rtol=0, atol=0)


def test_goes_on_bit_by_bit():
    model, file = network(), io.BytesIO()
    average = WeightAverage(model, decay=0.9)
    for step in range(6):
        if step == 3:
            torch.save(
                {"model": model.state_dict(), "ema": average.state_dict(), "random": torch.get_rng_state()}, file
            )
        wander(model)
        average.update()
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = network()
    resumed.load_state_dict(saved["model"])
    again = WeightAverage(resumed, decay=0.9)
    again.load_state_dict(saved["ema"])
    torch.set_rng_state(saved["random"])
    for _ in range(3):
        wander(resumed)
        again.update()
    torch.testing.assert_close(again.state_dict(), average.state_dict(), rtol=0, atol=0)
