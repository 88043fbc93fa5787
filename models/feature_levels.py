"""Feature maps on their way through a detector, from the projection of the backbone's to the decoder."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samdetr.models.layers import GroupNorm
from samdetr.models.ops.ms_deform_attn.plain import coordinate_dtype
from samdetr.models.position_encoding import grid_points, sine_encoding


@dataclass
class FeatureLevel:
    """One feature map: `features` (B, C, H, W); `padding` (B, H, W), True where padded; `position` (B, C, H, W), its
    encoding."""

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

    def with_tokens(self, tokens: Tensor) -> "FeatureLevel":
        """The same level holding other features, given as (B, L, C)."""
        return replace(self, features=tokens.mT.unflatten(2, self.features.shape[2:]))


def valid_ratio(padding: Tensor) -> Tensor:
    """Share of width and height that is not padded: `padding` (B, H, W) -> (B, 2) as x, y, float32."""
    valid = (~padding).float()
    return torch.stack([valid[:, 0, :].mean(1), valid[:, :, 0].mean(1)], -1)


class JoinedLevels(NamedTuple):
    """All levels concatenated: `tokens` (B, L, C), `padding` (B, L); `shapes` (H, W) of each level, and `ratios`
    (B, levels, 2), the share of each that is image."""

    tokens: Tensor
    padding: Tensor
    shapes: list[tuple[int, int]]
    ratios: Tensor


def join_levels(levels: Sequence[FeatureLevel]) -> JoinedLevels:
    return JoinedLevels(
        torch.cat([level.tokens for level in levels], 1),
        torch.cat([level.token_padding for level in levels], 1),
        [(level.features.shape[2], level.features.shape[3]) for level in levels],
        torch.stack([level.valid_ratio for level in levels], 1),
    )


def cell_centres(height: int, width: int, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Centres of the cells of a map as x, y in cells: (height, width, 2); PyTorch's default type unless given."""
    y, x = (torch.arange(n, dtype=dtype, device=device) + 0.5 for n in (height, width))
    return torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1)


class InputProjection(nn.Module):
    """1 x 1 convolution of each backbone level to the model's width, with its padding and position encoding.

    Args:
        in_channels: channels of each level.
        hidden_dim: width of the model.
        norm: whether a GroupNorm of 32 groups follows.
        extra_levels: number of levels beyond the backbone's, each of half the resolution, by 3 x 3 convolutions: the
            first of the last backbone level, the others of the extra level before.
        level_embedding: whether a learned embedding of the level is added to its position encoding; None: if there
            are several levels.
        xavier: convolutions start xavier uniform with bias 0 instead of PyTorch's default.
        temperature: of the position encoding: ratio of the longest to the shortest period, nearly.
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
