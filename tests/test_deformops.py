"""`--ops`: deformable attention by the package deformops, or by a stand-in where it is not installed."""

import importlib.util

import pytest
import torch
from helpers import TINY_DEFORMABLE, call_main, error_line, run_main

from samdetr.models.ops import kernels
from samdetr.models.ops.ms_deform_attn import by_deformops, ms_deform_attn
from samdetr.models.ops.ms_deform_attn.plain import plain_ms_deform_attn

HERE = importlib.util.find_spec("deformops") is not None
SCHEMA = (
    "msda(Tensor value, Tensor spatial_shapes, Tensor level_start_index, Tensor sampling_locations, "
    "Tensor attention_weights) -> Tensor"
)


class StandIn:
    """Registers an operator of the package's name and arguments, by which wrong ones would be seen."""

    def __init__(self):
        self.calls, self.factor = 0, 1.0
        self.library = torch.library.Library("deformops", "FRAGMENT")
        self.library.define(SCHEMA)
        self.library.impl("msda", self.msda, "CompositeImplicitAutograd")

    def msda(self, value, shapes, starts, locations, weights):
        self.calls += 1
        cells = [height * width for height, width in shapes.tolist()]
        assert starts.tolist() == [sum(cells[:level]) for level in range(len(cells))]
        assert weights.dtype == value.dtype
        return self.factor * plain_ms_deform_attn(value, shapes.flatten().tolist(), locations, weights)


@pytest.fixture
def stand_in(monkeypatch):
    if HERE:
        pytest.skip("the package itself is installed")
    one = StandIn()
    monkeypatch.setattr(by_deformops, "package", lambda: None)
    kernels.correct.cache_clear()
    yield one
    one.library._destroy()
    kernels.correct.cache_clear()


def inputs():
    torch.manual_seed(0)
    levels = [(5, 4), (2, 3)]
    value = torch.randn(2, 26, 3, 8, requires_grad=True)
    locations = (torch.rand(2, 7, 3, 2, 4, 2) * 1.4 - 0.2).requires_grad_()
    weights = torch.rand(2, 7, 3, 2, 4, requires_grad=True)
    return value, levels, locations, weights


def with_gradients(path):
    value, levels, locations, weights = inputs()
    with kernels.path(path):
        output = ms_deform_attn(value, levels, locations, weights)
        return output.detach(), *torch.autograd.grad(output.square().sum(), (value, locations, weights))


@pytest.mark.skipif(not HERE, reason="deformops is not installed (Python 3.12 or newer, PyTorch 2.11)")
def test_the_package_gives_the_same_numbers():
    for found, expected in zip(with_gradients("deformops"), with_gradients("plain"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_it_is_called_and_gives_the_same_numbers(stand_in):
    expected = with_gradients("plain")
    assert stand_in.calls == 0
    found = with_gradients("deformops")
    assert stand_in.calls == 2  # the first for the comparison with plain PyTorch
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with_gradients("deformops")
    assert stand_in.calls == 3
    with_gradients("auto")
    assert stand_in.calls == 3


def test_other_numbers_are_one_warning_and_our_own_path(stand_in):
    stand_in.factor = 1.01
    with pytest.warns(UserWarning, match="ms_deform_attn of deformops on cpu differ from plain PyTorch by 1.0e-02"):
        found = with_gradients("deformops")
    torch.testing.assert_close(found, with_gradients("plain"), rtol=1e-4, atol=1e-4)
    assert stand_in.calls == 1


def test_a_run_with_it(stand_in, shapes):
    """Another path for one run only: the next one takes the usual path again."""
    run_main(shapes, "--epochs", "1", "--ops", "deformops", network=TINY_DEFORMABLE)
    assert stand_in.calls > 2
    before = stand_in.calls
    run_main(shapes, "--epochs", "1", network=TINY_DEFORMABLE)
    assert stand_in.calls == before


def test_flags(shapes, capsys, monkeypatch):
    def refused(*flags, network=TINY_DEFORMABLE):
        assert call_main(shapes, *flags, network=network) == 2
        return error_line(capsys.readouterr().err)

    if not HERE:
        by_deformops.package.cache_clear()
        assert "--ops deformops: the package is not installed; `pip install deformops`" in refused("--ops", "deformops")
    monkeypatch.setattr(by_deformops, "package", lambda: None)
    assert "--ops deformops sums in any order, --deterministic wants one" in refused(
        "--ops", "deformops", "--deterministic"
    )
    assert "this network has no deformable attention; leave it out" in refused(
        "--ops", "deformops", network=["--backbone", "resnet18", "--hidden_dim", "32", "--nheads", "4"]
    )
    assert kernels.wanted() == "auto"  # for other programs of this process
