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

<<<<<<< HEAD
    `features` (B, C, H, W); `padding` (B, H, W), True where padded; `position` (B, C, H, W), position encoding.
    """

    features: Tensor
    padding: Tensor
    position: Tensor

    @property
    def tokens(self) -> Tensor:
        """(B, L, C), L = H * W."""
        return self.features.flatten(2).mT

    @property
    def position_tokens(self) -> Tensor:
        """(B, L, C)."""
        return self.position.flatten(2).mT

    @property
    def token_padding(self) -> Tensor:
        """(B, L)."""
        return self.padding.flatten(1)

    @property
    def valid_ratio(self) -> Tensor:
        """(B, 2): share of the map's width and height that is image, not padding."""
        return valid_ratio(self.padding).to(coordinate_dtype(self.features))

    def with_tokens(self, tokens: Tensor) -> FeatureLevel:
        """The same level holding other features, given as (B, L, C)."""
        return replace(self, features=tokens.mT.unflatten(2, self.features.shape[2:]))


def valid_ratio(padding: Tensor) -> Tensor:
    """Share of width and height that is not padded: `padding` (B, H, W) -> (B, 2) as x, y, float32."""
    valid = (~padding).float()
    return torch.stack([valid[:, 0, :].mean(1), valid[:, :, 0].mean(1)], -1)


def join_levels(levels: Sequence[FeatureLevel]) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """All levels one after the other: tokens (B, L, C), padding (B, L), and (height, width) of each level."""
    tokens = torch.cat([level.tokens for level in levels], 1)
    padding = torch.cat([level.token_padding for level in levels], 1)
    return tokens, padding, [(level.features.shape[2], level.features.shape[3]) for level in levels]
=======
    hidden_dim: int
    num_heads: int
    feedforward_dim: int
    dropout: float
    activation: str = "relu"
>>>>>>> shrinkmodels


class GroupNorm(nn.GroupNorm):
    """PyTorch's, but a single image may have groups of one value (the coarsest map of a tiny image in a tiny network),
    which PyTorch refuses. The result is the bias."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


<<<<<<< HEAD
class InputProjection(nn.Module):
    """1 x 1 convolution of each backbone level to the model's width, with its padding and position encoding.

    Args:
        in_channels: channels of each level.
        hidden_dim: width of the model.
        norm: whether a GroupNorm of 32 groups follows.
        extra_levels: so many coarser levels than the backbone has, each at half the resolution of the one before, by
            3 x 3 convolutions: the first of the last backbone level as it comes, the others of the extra level before.
        level_embedding: whether a learned embedding of the level is added to its position encoding; None: where there
            are several levels.
        xavier: convolutions start xavier uniform with bias 0 instead of as PyTorch has them.
        temperature: of the position encoding; the periods reach up to this multiple of the shortest.
        centred: whether positions are the cells' centres, else their far corners.
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        hidden_dim: int,
        norm: bool,
        extra_levels: int = 0,
        level_embedding: bool | None = None,
        xavier: bool = False,
        temperature: float = 10000.0,
        centred: bool = True,
    ):
        super().__init__()
        if norm and hidden_dim % 32:
            raise ValueError(
                f"GroupNorm(32) after the input projection needs a width that 32 divides, not {hidden_dim}; "
                "change `hidden_dim` or use `input_proj_norm` none"
            )
        self.hidden_dim, self.temperature, self.centred = hidden_dim, temperature, centred
        convolutions = [nn.Conv2d(c, hidden_dim, 1) for c in in_channels]
        for c in [in_channels[-1], *[hidden_dim] * (extra_levels - 1)][:extra_levels]:
            convolutions.append(nn.Conv2d(c, hidden_dim, 3, stride=2, padding=1))
        self.levels = nn.ModuleList(
            nn.Sequential(convolution, *([GroupNorm(32, hidden_dim)] if norm else [])) for convolution in convolutions
        )
        if level_embedding is None:
            level_embedding = len(convolutions) > 1
        self.level_embedding = nn.Parameter(torch.randn(len(convolutions), hidden_dim)) if level_embedding else None
        if xavier:
            for convolution in convolutions:
                nn.init.xavier_uniform_(convolution.weight)
                nn.init.zeros_(convolution.get_parameter("bias"))

    def forward(self, maps: Sequence[Tensor], padding: Tensor) -> list[FeatureLevel]:
        """`maps`: (B, C_l, H_l, W_l) each; `padding` (B, H, W) at the images' size."""
        levels: list[FeatureLevel] = []
        for index, project in enumerate(self.levels):
            source = maps[min(index, len(maps) - 1)] if index <= len(maps) else levels[-1].features
            features = project(source)  # (B, C, H_l, W_l)
            level_padding = F.interpolate(padding[:, None].float(), size=features.shape[2:])[:, 0].bool()
            points = grid_points(level_padding, centred=self.centred)
            position = sine_encoding(points, num_channels=self.hidden_dim, temperature=self.temperature)
            position = position.to(features.dtype)
            if self.level_embedding is not None:
                position = position + self.level_embedding[index]
            levels.append(FeatureLevel(features, level_padding, position.permute(0, 3, 1, 2)))
        return levels


=======
>>>>>>> shrinkmodels
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
    """ModuleList of `number` independent modules that start equal, as the reference clones its layers and heads.

    Typed as Any, because a ModuleList does not know the class of its modules.
    """
    return nn.ModuleList(copy.deepcopy(module) for _ in range(number))


def start_heads(class_heads: Iterable[nn.Linear], box_heads: Iterable[MLP]) -> None:
    """Every class starts at 1 %: bias -log(99). Box heads start with a last layer of zeros."""
    for head in class_heads:
        nn.init.constant_(head.bias, -math.log(99))
    for mlp in box_heads:
        nn.init.zeros_(mlp.layers[-1].weight)
        nn.init.zeros_(mlp.layers[-1].bias)


def xavier_matrices(module: nn.Module) -> None:
    """Xavier-uniform every parameter with two or more axes (a convolution's kernel counts as one)."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
