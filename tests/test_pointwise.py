"""1x1 convolutions with what follows them equal PyTorch's, with gradients; which are computed so; threads."""

import pytest
import torch
import torch.nn.functional as F
from test_winograd import LAST, assert_close
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from samdetr.models.backbone import Backbone
from samdetr.models.ops import kernels, plain_path, pointwise


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if reason := kernels.why_not("cpu"):
        pytest.skip(f"no compiled kernel: {reason}")


def inputs(batch: int, channels: int, outputs: int, height: int, width: int, *, dtype: torch.dtype) -> list[Tensor]:
    """A map, a residual, weights, scale and shift."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, channels, height, width), (batch, outputs, height, width), (outputs, channels, 1, 1))
    x, residual, weight, scale, shift = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in (*shapes, (outputs,), (outputs,))
    )
    return [x.to(memory_format=LAST), residual.to(memory_format=LAST), weight / channels**0.5, scale, shift]


def plain(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, *, relu: bool, residual: Tensor | None) -> Tensor:
    y = F.conv2d(x, weight * scale[:, None, None, None], shift)
    y = y if residual is None else y + residual
    return y.relu() if relu else y


def with_gradients(function, tensors: list[Tensor], *, relu: bool, add: bool) -> list[Tensor]:
    x, residual, weight = (tensor.detach().requires_grad_() for tensor in tensors[:3])
    output = function(x, weight, *tensors[3:], relu=relu, residual=residual if add else None)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaves = [x, weight, residual] if add else [x, weight]
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient.to(output.dtype))]


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", [(2, 64, 256, 23, 37), (1, 48, 80, 9, 5), (1, 16, 16, 1, 1), (3, 512, 64, 7, 11)])
def test_equals_pytorch(shape, relu, add):
    tensors = inputs(*shape, dtype=torch.float64)
    ours = with_gradients(pointwise.pointwise, tensors, relu=relu, add=add)
    assert_close(ours, with_gradients(plain, tensors, relu=relu, add=add), 1e-11)
    assert ours[0].is_contiguous(memory_format=LAST)
    if not relu:
        single = with_gradients(pointwise.pointwise, [tensor.float() for tensor in tensors], relu=relu, add=add)
        assert_close([tensor.double() for tensor in single], ours, 1e-5)


@pytest.mark.parametrize("shape", [(2, 64, 32, 23, 38), (1, 16, 48, 1, 2)])
def test_strides(shape):
    x, _, *rest = inputs(*shape, dtype=torch.float64)
    x.requires_grad_()
    results = []
    for output in (
        pointwise.pointwise(x, *rest, stride=2, relu=True),
        F.conv2d(x, rest[0] * rest[1][:, None, None, None], rest[2], stride=2).relu(),
    ):
        results.append([output.detach(), *torch.autograd.grad(output.square().sum(), x)])
    assert_close(*results, 1e-11)


def test_any_layout():
    tensors = inputs(2, 64, 48, 11, 13, dtype=torch.float64)
    wanted = with_gradients(plain, tensors, relu=True, add=True)
    turned = [tensor.mT.contiguous().mT for tensor in tensors[:2]]
    weight = tensors[2].transpose(0, 1).contiguous().transpose(0, 1)
    for some in ([t.contiguous() for t in tensors], [*turned, *tensors[2:]], [*tensors[:2], weight, *tensors[3:]]):
        assert_close(with_gradients(pointwise.pointwise, some, relu=True, add=True), wanted, 1e-11)


def test_any_number_of_threads_gives_the_same_bits():
    tensors = inputs(1, 256, 128, 40, 50, dtype=torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            with torch.no_grad():
                x, residual, *rest = tensors
                results.append(pointwise.pointwise(x, *rest, relu=True, residual=residual.clone()))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_the_residual_is_overwritten_only_without_gradients():
    x, residual, weight, scale, shift = inputs(1, 32, 32, 8, 8, dtype=torch.float32)
    kept = residual.clone()
    for leaf in (x, weight, residual):
        leaf.requires_grad_()
        output = pointwise.pointwise(x, weight, scale, shift, relu=True, residual=residual)
        assert output.data_ptr() != residual.data_ptr()
        assert torch.equal(residual, kept)
        leaf.requires_grad_(False)
    assert pointwise.pointwise(x, weight, scale, shift, relu=True, residual=residual).data_ptr() == residual.data_ptr()
    assert torch.equal(residual, output)


def test_which_convolutions():
    x = torch.randn(1, 64, 16, 16)

    def applies(x: Tensor = x, channels: int = 64, outputs: int = 64, kernel: int = 1, **options) -> bool:
        return pointwise.applies(x, nn.Conv2d(channels, outputs, kernel, **options).to(x.dtype))

    assert applies()
    assert applies(x.double())
    assert applies(stride=2)
    assert not applies(stride=(1, 2))
    assert not applies(padding=1)
    assert not applies(kernel=3)
    assert not applies(groups=2)
    assert not applies(outputs=40)
    assert not applies(torch.randn(0, 64, 16, 16))
    assert not applies(x.to(torch.bfloat16))
    with plain_path():
        assert not applies()
    convolution = nn.Conv2d(64, 64, 1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert not pointwise.applies(torch.randn(1, 64, 16, 16), convolution)


def test_of_a_resnet(monkeypatch):
    """36 of 1x1, three of them of stride 2. The maps it returns are not overwritten by the stages after them."""
    torch.manual_seed(0)
    network = Backbone(name="resnet50", levels=(3, 4, 5)).double().to(memory_format=LAST)
    with torch.no_grad():
        for name, value in network.named_buffers():
            value.copy_(torch.rand_like(value) + (0.5 if "var" in name else 0))
    images = torch.randn(1, 3, 70, 101, dtype=torch.float64)
    calls = []
    original = pointwise.pointwise
    monkeypatch.setattr(pointwise, "pointwise", lambda *args, **kw: (calls.append(0), original(*args, **kw))[1])
    ours = [m.detach() for m in network(images)]
    assert len(calls) == 36
    with torch.no_grad():
        without_gradients = network(images)
    with plain_path(), torch.no_grad():
        wanted = network(images)
    assert_close(ours, wanted, 1e-11)
    assert_close(without_gradients, wanted, 1e-11)


def test_what_another_graph_needs_is_kept():
    """A residual that gradients flow through is not overwritten under no_grad, as where blocks are checkpointed; one
    that was saved for backward is missed there."""
    x, residual, *rest = inputs(1, 16, 16, 4, 5, dtype=torch.float64)
    before = residual.clone()
    with torch.no_grad():
        pointwise.pointwise(x, *rest, relu=True, residual=residual.requires_grad_())
    assert torch.equal(residual.detach(), before)
    residual = residual.detach()
    product = residual * torch.ones(1, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        pointwise.pointwise(x, *rest, relu=True, residual=residual)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_other_channels_are_left_to_pytorch():
    x = torch.randn(1, 32, 8, 8)
    assert not pointwise.applies(x, nn.Conv2d(64, 32, 1))
    assert pointwise.applies(x, nn.Conv2d(32, 64, 1))
