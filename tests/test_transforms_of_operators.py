"""What transforms or records operations gets the same numbers of an operator with a kernel as of plain PyTorch."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from samdetr.models.ops import kernels
from samdetr.models.ops.kernels import plain_path
from samdetr.models.ops.ms_deform_attn import ms_deform_attn
from samdetr.models.ops.prior_attention import prior_attention
from samdetr.models.ops.roi_sampling import roi_sampling

pytestmark = pytest.mark.skipif(bool(kernels.why_not("cpu")), reason="no compiled kernels here")

LEVELS = [(4, 6), (2, 3)]
BOXES = torch.tensor([[[0.3, 0.7, 5.1, 3.2], [1.2, 0.1, 3.3, 3.9], [2.2, 1.3, 2.9, 1.9]]], dtype=torch.float64)


def made(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


LOCATIONS, WEIGHTS = made(2, 3, 2, 2, 2, 2), made(2, 3, 2, 2, 2)

# Functions of a tensor (B, 30, 8) of float64.
OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "prior_attention": lambda x: prior_attention(x[:, None], x[:, None], x[:, None]),
    "roi_sampling": lambda x: roi_sampling(x[:, :24].unflatten(1, (4, 6)), BOXES.expand(len(x), -1, -1)),
    "ms_deform_attn": lambda x: ms_deform_attn(x.unflatten(2, (2, 4)), LEVELS, LOCATIONS[: len(x)], WEIGHTS[: len(x)]),
}


def by_autograd(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(f(leaf).square().sum(), leaf)[0]


def jvp(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    # PyTorch's fused attention has no forward derivative.
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.sin()))).tangent


def by_differences(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    step = 1e-6 * x.sin()
    return (f(x + step) - f(x - step)) / 2e-6


def plainly(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with plain_path():
        return f(x)


TRANSFORMS = {  # what it gives, what it must give, and how near
    "torch.jit.trace": (lambda f, x: torch.jit.trace(f, x.flip(0), check_trace=False)(x), plainly, 1e-6),
    "make_fx": (lambda f, x: make_fx(f)(x.flip(0))(x), plainly, 1e-12),
    "vmap": (lambda f, x: torch.vmap(lambda one: f(one[None])[0])(x[:1]), lambda f, x: plainly(f, x[:1]), 1e-12),
    "grad": (lambda f, x: torch.func.grad(lambda y: f(y).square().sum())(x), by_autograd, 1e-12),
    "forward differentiation": (jvp, by_differences, 1e-7),
}


def test_counter_of_operations():
    x = torch.randn(2, 1, 30, 8, requires_grad=True)
    prior_attention(x, x, x)  # the kernel's check of itself is counted, too
    with FlopCounterMode(display=False) as counter:
        prior_attention(x, x, x).sum().backward()
    product = 2 * 2 * 30 * 30 * 8  # two images; a multiplication and an addition
    assert counter.get_total_flops() == (2 + 5) * product


# PyTorch's grid_sample has no forward derivative, and torch.func.grad takes no checkpoints.
WITHOUT = {("ms_deform_attn", "grad"), ("ms_deform_attn", "forward differentiation")}
PAIRS = [pair for pair in product(OPERATORS, TRANSFORMS) if pair not in WITHOUT]


@pytest.mark.filterwarnings("ignore")  # of what PyTorch thinks about its own tracing
@pytest.mark.parametrize(("operator", "transform"), PAIRS)
def test_same_numbers_under_a_transform(operator, transform, monkeypatch):
    f, x = OPERATORS[operator], torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    f(x)  # the kernel's check of itself calls it, too
    calls, call = [], kernels.call
    monkeypatch.setattr(kernels, "call", lambda name, *rest: calls.append(name) or call(name, *rest))
    f(x)
    assert calls == [f"{operator}_forward"]
    apply, wanted, tolerance = TRANSFORMS[transform]
    torch.testing.assert_close(apply(f, x), wanted(f, x), rtol=tolerance, atol=tolerance)
