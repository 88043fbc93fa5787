"""Observation of a network by hooks, which are removed afterwards; no module has code for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from samdetr.models.attention import LevelAttention
from samdetr.models.feature_levels import valid_ratio
from samdetr.models.ops.module import MSDeformAttn

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


@contextmanager
def watch(part: nn.Module, kind: type[M], look: Callable[[M, dict[str, Any], Any], T]) -> Iterator[list[T]]:
    """Collect what `look(module, arguments, output)` returns for each call of a module of this kind in `part`.

    The order is that of the calls; `arguments` are those of its forward, by name."""
    seen: list[T] = []

    @torch.no_grad()
    def hook(module: M, inputs: tuple, named: dict[str, Any], output: Any) -> None:
        arguments = signature(module.forward).bind(*inputs, **named)
        arguments.apply_defaults()
        seen.append(look(module, arguments.arguments, output))

    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in part.modules() if isinstance(m, kind)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Sampling:
    """Where some queries of one deformable attention looked, relative to the image without its padding; on the CPU.

    `reference` (Q, levels, 2 or 4); `points` (Q, heads, levels, points, 2), x, y; `weights` (Q, heads, levels, points),
    those of a head summing to 1.
    """

    reference: Tensor
    points: Tensor
    weights: Tensor


Choose = Callable[[list[tuple[int, int]], Tensor], Tensor]


def watch_sampling(part: nn.Module, choose: Choose) -> AbstractContextManager[list[Sampling]]:
    """Collect a Sampling for each call of an MSDeformAttn in `part`, of the first image of a batch.

    All points and weights of an encoder would take too much memory (122 MB at 800 x 1066 pixels). So those of the
    queries whose indices (Q,) `choose` returns are computed again. It is given (height, width) of each level, and how
    many of its columns and rows are no padding (levels, 2).
    """

    def look(attention: MSDeformAttn, arguments: dict[str, Any], _: Tensor) -> Sampling:
        shapes, padding = arguments["level_shapes"], arguments["padding"]
        ratios = torch.ones(len(shapes), 2, device=arguments["reference"].device)
        if padding is not None:
            levels = padding[:1].split([height * width for height, width in shapes], 1)
            ratios = torch.cat([valid_ratio(level.unflatten(1, shape)) for level, shape in zip(levels, shapes)])
        cells = (ratios * ratios.new_tensor(shapes).flip(1)).round()
        chosen = choose(shapes, cells)
        query, reference = arguments["query"][:1, chosen], arguments["reference"][:1, chosen]
        points = attention.locate(query, reference, shapes)[0] / ratios[:, None]
        reference = reference[0] / ratios.repeat(1, reference.shape[-1] // 2)
        return Sampling(reference.cpu(), points.cpu(), attention.weigh(query)[0].cpu())

    return watch(part, MSDeformAttn, look)


@dataclass
class Maps:
    """Where some queries of one attention to a whole level looked: `weights` (Q, heads, H, W), those of a head summing
    to 1; `prior` (Q, heads or 1, H, W), the factors before they are scaled to this sum, if it has one; on the CPU."""

    weights: Tensor
    prior: Tensor | None


def watch_maps(part: nn.Module, queries: Tensor) -> AbstractContextManager[list[Maps]]:
    """Collect Maps for each call of a LevelAttention in `part`, of these queries (Q,) of the first image of a batch."""

    def look(attention: LevelAttention, arguments: dict[str, Any], _: Tensor) -> Maps:
        prior, level = arguments.pop("prior"), arguments["level"]
        query, key = attention.compare(**arguments)
        logits = query[0][:, queries] @ key[0].mT * query.shape[-1] ** -0.5  # (heads, Q, H * W)
        added = None if prior is None else prior.dense()[0][:, queries]
        if added is not None:
            logits = logits + added
        weights = logits.masked_fill(level.token_padding[0], -torch.inf).softmax(-1)
        size = tuple(level.features.shape[2:])

        def as_maps(values: Tensor) -> Tensor:
            return values.transpose(0, 1).unflatten(-1, size).cpu()

        return Maps(as_maps(weights), None if added is None else as_maps(added.exp()))

    return watch(part, LevelAttention, look)


def cell_of(position: tuple[float, float]) -> Choose:
    """For an encoder: chooses the cell of the first, finest level in which `position` lies, x, y in [0, 1]."""

    def choose(shapes: list[tuple[int, int]], cells: Tensor) -> Tensor:
        column, row = (min(int(x * n), int(n) - 1) for x, n in zip(position, cells[0].tolist()))
        return torch.tensor([row * shapes[0][1] + column])

    return choose
