"""Parts of transformer layers and prediction heads."""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from samdetr.models.mlp import MLP


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """What the transformer layers of a network have in common. `activation` is that of the feed-forward branch, "relu",
    or "prelu" with a learned slope."""

    hidden_dim: int
    num_heads: int
    feedforward_dim: int
    dropout: float
    activation: str = "relu"


class GroupNorm(nn.GroupNorm):
    """PyTorch's, but a single image may have groups of one value (the coarsest map of a tiny image in a tiny network),
    which PyTorch refuses. The result is the bias."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class FeedForward(nn.Module):
    """The two-layer branch of a transformer layer, with dropout inside."""

    def __init__(self, sizes: LayerSizes):
        super().__init__()
        self.linear1 = nn.Linear(sizes.hidden_dim, sizes.feedforward_dim)
        self.activation = {"relu": nn.ReLU, "prelu": nn.PReLU}[sizes.activation]()
        self.dropout = nn.Dropout(sizes.dropout)
        self.linear2 = nn.Linear(sizes.feedforward_dim, sizes.hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.activation, nn.ReLU):
            return self.linear2(relu_dropout_(self.linear1(x), self.dropout.p, training=self.training))
        return self.linear2(self.dropout(self.activation(self.linear1(x))))

    def added_to(self, x: Tensor, *, norm: nn.LayerNorm, dropout: nn.Dropout) -> Tensor:
        """norm(x + dropout(self(x))), the end of every transformer layer: (B, L, C) in and out."""
        return norm(x + dropout(self(x)))


def relu_dropout_(x: Tensor, probability: float, *, training: bool) -> Tensor:
    """dropout(relu(x)), which overwrites x.

    Backward needs the result alone, in which negative and dropped values are both 0. PyTorch's dropout would store a
    mask as well, of the widest map of the layer.
    """
    if not training or probability == 0 or torch.compiler.is_compiling():
        return F.dropout(x.relu_(), probability, training)
    return _ReluDropout_.apply(x, probability)


class _ReluDropout_(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float) -> Tensor:
        ctx.mark_dirty(x)
        F.dropout(x.relu_(), probability, inplace=True)
        ctx.scale = 1 / (1 - probability) if probability < 1 else 0.0
        ctx.save_for_backward(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (result,) = ctx.saved_tensors
        return result.sign().mul_(ctx.scale).mul_(gradient), None


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of x, finite at 0 and 1: x and 1 - x are clamped to at least eps."""
    x = x.clamp(0, 1)
    return x.clamp(min=eps).log() - (1 - x).clamp(min=eps).log()


def copies(module: nn.Module, number: int) -> Any:
    """A ModuleList of `number` independent modules that start equal, as the reference clones its layers and heads.

    Any, because a ModuleList does not know the class of its modules.
    """
    return nn.ModuleList(copy.deepcopy(module) for _ in range(number))


def start_heads(class_heads: Iterable[nn.Linear], box_heads: Iterable[MLP]) -> None:
    """Every class starts at 1 %: bias -log(99). Box heads start with a last layer of zeros."""
    for head in class_heads:
        nn.init.constant_(head.bias, -math.log(99))
    for mlp in box_heads:
        *_, weight, bias = mlp.parameters()
        nn.init.zeros_(weight)
        nn.init.zeros_(bias)


def xavier_matrices(module: nn.Module) -> None:
    """Xavier-uniform every parameter with two or more axes (a convolution's kernel counts as one)."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
