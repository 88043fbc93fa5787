"""Winograd's convolutions equal F.conv2d, with gradients; which convolutions are computed so; any number of threads."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from samdetr.models.backbone import Backbone
from samdetr.models.ops import kernels, plain_path, winograd

LAST = torch.channels_last


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if reason := kernels.why_not("cpu"):
        pytest.skip(f"no compiled kernel: {reason}")


def inputs(batch: int, channels: int, outputs: int, height: int, width: int, *, dtype: torch.dtype) -> list[Tensor]:
    """A map, weights, scale and shift."""
    generator = torch.Generator().manual_seed(0)
    x, weight, scale, shift = (
        torch.randn(*shape, generator=generator, dtype=dtype)
        for shape in ((batch, channels, height, width), (outputs, channels, 3, 3), (outputs,), (outputs,))
    )
    return [x.to(memory_format=LAST), weight / (3 * channels**0.5), scale, shift]


def direct(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, *, dilation: int, relu: bool) -> Tensor:
    y = F.conv2d(x, weight * scale[:, None, None, None], shift, padding=dilation, dilation=dilation)
    return y.relu() if relu else y


def with_gradients(function, tensors: list[Tensor], **options) -> list[Tensor]:
    x, weight = (tensor.detach().requires_grad_() for tensor in tensors[:2])
    output = function(x, weight, *tensors[2:], **options)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [output.detach(), *torch.autograd.grad(output, [x, weight], gradient.to(output.dtype))]


def assert_close(ours: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    """In units of the largest number."""
    for actual, expected in zip(ours, wanted, strict=True):
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    ("batch", "channels", "outputs", "height", "width", "dilation"),
    [
        (2, 64, 64, 23, 37, 1),  # neither side a multiple of 4
        (2, 64, 64, 23, 37, 2),  # nor, interleaved, of equal parts
        (1, 48, 80, 9, 5, 1),  # channels and outputs that fill no panel
        (1, 32, 64, 8, 12, 3),
        (1, 64, 32, 1, 2, 1),  # one tile, mostly outside
        (1, 256, 384, 20, 27, 2),  # many weights, in several parts
        (4, 512, 256, 21, 26, 1),
        (2, 128, 32, 80, 108, 1),  # many tiles, in several parts
    ],
)
def test_equals_the_direct_convolution(batch, channels, outputs, height, width, dilation, relu):
    tensors = inputs(batch, channels, outputs, height, width, dtype=torch.float64)
    options = {"dilation": dilation, "relu": relu}
    ours = with_gradients(winograd.winograd, tensors, **options)
    assert_close(ours, with_gradients(direct, tensors, **options), 1e-10)
    assert ours[0].is_contiguous(memory_format=LAST)
    if relu or dilation > 2:
        return
    in_32_bits = with_gradients(winograd.winograd, [tensor.float() for tensor in tensors], **options)
    assert_close([tensor.double() for tensor in in_32_bits], ours, 1e-5)


def test_any_layout():
    tensors = inputs(2, 64, 48, 11, 13, dtype=torch.float64)
    wanted = with_gradients(direct, tensors, dilation=1, relu=True)
    x, weight = tensors[:2]
    maps = (x.contiguous(), x.transpose(2, 3).contiguous().transpose(2, 3), F.pad(x, (1, 1))[..., 1:-1])
    weights = (weight.to(memory_format=LAST), weight.transpose(2, 3).contiguous().transpose(2, 3))
    for some_map in maps:
        assert_close(with_gradients(winograd.winograd, [some_map, *tensors[1:]], dilation=1, relu=True), wanted, 1e-10)
    for some_weight in weights:
        ours = with_gradients(winograd.winograd, [x, some_weight, *tensors[2:]], dilation=1, relu=True)
        assert_close(ours, wanted, 1e-10)


@pytest.mark.parametrize("shape", [(1, 64, 64, 40, 50), (1, 256, 256, 20, 27)])
def test_any_number_of_threads_gives_the_same_bits(shape):
    tensors = inputs(*shape, dtype=torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(with_gradients(winograd.winograd, tensors, dilation=2, relu=True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_only_wanted_gradients_are_computed(monkeypatch):
    x, weight, scale, shift = inputs(1, 32, 32, 8, 8, dtype=torch.float32)
    called = []
    call = kernels.call
    monkeypatch.setattr(kernels, "call", lambda name, *rest: (called.append(name), call(name, *rest)))
    for leaf, expected in ((x, "winograd_forward"), (weight, "winograd_weights")):
        called.clear()
        leaf.requires_grad_()
        winograd.winograd(x, weight, scale, shift, dilation=1, relu=True).sum().backward()
        assert called == ["winograd_forward", expected]
        leaf.requires_grad_(False)


def test_which_convolutions():
    x = torch.randn(1, 64, 16, 16)

    def applies(x: Tensor = x, channels: int = 64, outputs: int = 64, kernel: int = 3, **options) -> bool:
        options = {"padding": 1, **options}
        return winograd.applies(x, nn.Conv2d(channels, outputs, kernel, **options).to(x.dtype))

    assert applies()
    assert applies(padding=2, dilation=2)
    assert applies(x.double())
    assert not applies(stride=2)
    assert not applies(padding=0)
    assert not applies(kernel=1, padding=1)
    assert not applies(padding=2, dilation=(2, 1))
    assert not applies(groups=2)
    assert not applies(outputs=40)
    assert not applies(channels=16)
    assert not applies(padding_mode="reflect")
    assert not applies(torch.randn(1, 64, 3, 3))
    assert not applies(torch.randn(0, 64, 16, 16))
    assert not applies(x.to(torch.bfloat16))
    with plain_path():
        assert not applies()
    with torch.autocast("cpu"):
        assert not applies()
    convolution = nn.Conv2d(64, 64, 3, padding=1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert not winograd.applies(torch.randn(1, 64, 16, 16), convolution)


@pytest.mark.parametrize("dilation", [False, True])
def test_of_a_resnet(dilation, monkeypatch):
    """All of 16 but the three of stride 2, or two where C5 is dilated; the first stage is frozen."""
    torch.manual_seed(0)
    network = Backbone(name="resnet50", levels=(3, 5), dilation=dilation).double().to(memory_format=LAST)
    with torch.no_grad():  # as if pretrained: otherwise maps grow from block to block
        for name, value in network.named_buffers():
            value.copy_(torch.rand_like(value) + (0.5 if "var" in name else 0))
    images = torch.randn(1, 3, 262, 270, dtype=torch.float64)
    calls = []
    original = winograd.winograd
    monkeypatch.setattr(winograd, "winograd", lambda *args, **kw: (calls.append(0), original(*args, **kw))[1])

    def work() -> dict[str, Tensor]:
        network.zero_grad()
        maps = network(images)
        sum(m.square().mean() for m in maps).backward()
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        return {"C3": maps[0].detach(), "C5": maps[1].detach(), **gradients}

    ours = work()
    assert len(calls) == (14 if dilation else 13)
    with plain_path():
        wanted = work()
    assert ours.keys() == wanted.keys()
    assert_close(list(ours.values()), list(wanted.values()), 1e-9)
