"""What follows each operation of PyTorch's sees tensor code, not a kernel that would be a hole in it."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import FrozenBatchNorm2d

from samdetr.models.attention import attend
from samdetr.models.backbone import folded
from samdetr.models.dropout import Dropout
from samdetr.models.layers import FeedForward
from samdetr.models.ops import kernels, plain_path


class Network(nn.Module):
    """One of each kernel of evaluation: (B, 32, 16, 16) -> (B, 1, 256, 32)."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(32, 32, 1, bias=False), nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.fixed, self.norm = FrozenBatchNorm2d(32), nn.LayerNorm(32)
        self.branch = FeedForward(hidden_dim=32, feedforward_dim=48, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = folded(self.first, self.fixed, x, relu=True)
        x = folded(self.second, self.fixed, x).flatten(2).mT
        x = self.branch.added_to(x, norm=self.norm, dropout=Dropout(0.0))[:, None]
        return attend(x, x, x)


def grad(network: Network, x: Tensor) -> Tensor:
    return torch.func.grad(lambda x: network(x).square().sum())(x)


def by_autograd(network: Network, x: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(network(leaf).square().sum(), leaf)[0]


def jvp(network: Network, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(network(forward_ad.make_dual(x, x.sin()))).tangent


def by_differences(network: Network, x: Tensor) -> Tensor:
    step = 1e-6 * x.sin()
    return (network(x + step) - network(x - step)) / 2e-6


def counted(network: Network, x: Tensor) -> Tensor:
    with FlopCounterMode(display=False) as counter:
        network(x)
    return torch.tensor(counter.get_total_flops())


def counted_by_hand(network: Network, x: Tensor) -> Tensor:
    products = 32 * 32 * 256 * (1 + 9) + 2 * 32 * 48 * 256 + 2 * 256 * 256 * 32
    return torch.tensor(2 * len(x) * products)


def plainly(network: Network, x: Tensor) -> Tensor:
    with plain_path():
        return network(x)


FOLLOWERS = {  # what follows, what it must give, and how near
    # 1e-6: what follows from sizes has float32 there.
    "torch.jit.trace": (lambda f, x: torch.jit.trace(f, x.flip(0), check_trace=False)(x), plainly, 1e-6),
    "make_fx": (lambda f, x: make_fx(f)(x.flip(0))(x), plainly, 1e-12),
    "export": (lambda f, x: torch.export.export(f, (x.flip(0),)).module()(x), plainly, 1e-12),
    "vmap": (lambda f, x: torch.vmap(lambda one: f(one[None])[0])(x), plainly, 1e-12),
    "grad": (grad, by_autograd, 1e-12),
    "forward differentiation": (jvp, by_differences, 1e-7),
    "counter": (counted, counted_by_hand, 0),
}


@pytest.mark.filterwarnings("ignore")  # of what PyTorch thinks about its own tracing
@pytest.mark.parametrize("follower", FOLLOWERS)
def test_followers_see_tensor_code(follower, monkeypatch):
    if reason := kernels.why_not("cpu"):
        pytest.skip(reason)
    torch.manual_seed(0)
    network, x = Network().double(), torch.randn(2, 32, 16, 16, dtype=torch.float64)
    calls, call = [], kernels.call
    monkeypatch.setattr(kernels, "call", lambda name, *rest: calls.append(name) or call(name, *rest))
    with torch.no_grad():
        network(x)
        assert calls == ["pointwise", "winograd_forward", "feed_forward", "attention_forward"]
        follow, wanted, tolerance = FOLLOWERS[follower]
        seen = follow(network, x)
        assert len(calls) == 4
        torch.testing.assert_close(seen, wanted(network, x), rtol=tolerance, atol=tolerance)
