"""The kernel of attention with a separable prior (cpu.cpp) as torch.ops.sam_detr.prior_attention."""

import ctypes
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from samdetr.models.ops import kernels
from samdetr.models.ops.prior_attention.plain import plain_prior_attention


@torch.library.custom_op("sam_detr::prior_attention", mutates_args=(), device_types="cpu")
def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """The output as (B, Q, N, E), and the logarithm of the sum under each softmax, (B, N, Q), for backward.

    `seed`, (1,) of int64, decides which weights are dropped. Backward draws them again; nothing else is kept.
    """
    query, key, value = _readable(query, key, value)
    rows, columns = _contiguous(rows), _contiguous(columns)
    output = query.new_zeros(*_output_shape(query, value))
    log_sums = query.new_empty(query.shape[:3])
    if output.numel() and key.numel():
        _call("forward", query, key, value, padding, rows, columns, seed, dropout, output, log_sums)
    return output, log_sums


@forward.register_fake
def _(query, key, value, padding, rows, columns, seed, dropout):
    return query.new_empty(_output_shape(query, value)), query.new_empty(query.shape[:3])


@torch.library.custom_op("sam_detr::prior_attention_backward", mutates_args=(), device_types="cpu")
def backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    output: Tensor,
    log_sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query (B, Q, N, D), key (B, L, N or 1, D), value (B, L, N, E), rows and columns; the last two are
    empty without a prior."""
    query, key, value = _readable(query, key, value)
    rows, columns = _contiguous(rows), _contiguous(columns)
    gradients = [query.new_zeros(shape) for shape in _gradient_shapes(query, key, value, rows, columns)]
    if output.numel() and key.numel():
        of_prior = gradients[3:] if rows is not None else (None, None)
        others = (output, log_sums, gradient.contiguous(), *gradients[:3], *of_prior)
        _call("backward", query, key, value, padding, rows, columns, seed, dropout, *others)
    of_query, of_key, of_value, of_rows, of_columns = gradients
    return of_query, of_key, of_value, of_rows, of_columns


@backward.register_fake
def _(gradient, query, key, value, padding, rows, columns, seed, dropout, output, log_sums):
    return tuple(query.new_empty(shape) for shape in _gradient_shapes(query, key, value, rows, columns))


@register_flop_formula(torch.ops.sam_detr.prior_attention)
def _(query: tuple, key: tuple, value: tuple, *_: Any, **__: Any) -> int:
    """The products of queries with keys, and of weights with values; all shapes."""
    return 2 * prod(query[:3]) * key[2] * (query[3] + value[3])


@register_flop_formula(torch.ops.sam_detr.prior_attention_backward)
def _(gradient: tuple, query: tuple, key: tuple, value: tuple, *_: Any, **__: Any) -> int:
    """The logits again, and two products for each of forward's."""
    return 2 * prod(query[:3]) * key[2] * (3 * query[3] + 2 * value[3])


def _readable(*tensors: Tensor) -> list[Tensor]:
    """Queries, keys and values with a contiguous last axis."""
    return [x if x.stride(3) == 1 else x.contiguous() for x in tensors]


def _contiguous(prior: Tensor | None) -> Tensor | None:
    return None if prior is None else prior.contiguous()


def _output_shape(query: Tensor, value: Tensor) -> tuple[int, ...]:
    batch, heads, number, _ = query.shape
    return batch, number, heads, value.shape[3]


def _gradient_shapes(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor | None, columns: Tensor | None
) -> list[tuple[int, ...]]:
    parts = [(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in (query, key, value)]
    return [*parts, *((0,) if x is None else tuple(x.shape) for x in (rows, columns))]


def _call(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    *others: Tensor | None,
) -> None:
    batch, heads, number, depth = query.shape
    mask = None if padding is None else query.new_zeros(padding.shape).masked_fill_(padding, -torch.inf)
    prior = (0, 0, 1) if rows is None or columns is None else (rows.shape[3], columns.shape[3], rows.shape[1])
    sizes = (batch, heads, number, key.shape[2], depth, value.shape[3], key.shape[1], *prior)
    strides = (stride for x in (query, key, value) for stride in x.stride()[:3])
    settings = (kernels.integers([*sizes, *strides]), torch.get_num_threads(), ctypes.c_double(dropout))
    pointers = map(kernels.pointer, (query, key, value, rows, columns, mask, seed, *others))
    kernels.call(f"prior_attention_{name}", query.dtype, *settings, *pointers)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.dropout = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, output, log_sums = ctx.saved_tensors
    of_query, of_key, of_value, of_rows, of_columns = backward(gradient, *inputs, ctx.dropout, output, log_sums)
    of_prior = (None, None) if inputs[4] is None else (of_rows, of_columns)
    return *(x.transpose(1, 2) for x in (of_query, of_key, of_value)), None, *of_prior, None, None


forward.register_autograd(_differentiate, setup_context=_setup_context)
kernels.first_derivatives_only(backward, "prior_attention")


def compiled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    dropout: float,
) -> Tensor:
    """As plain_prior_attention. The seed comes from PyTorch's generator: a run whose state is restored drops the
    same."""
    seed = torch.randint(2**63 - 1, (1,)) if dropout else None
    output, _ = forward(query, key, value, padding, rows, columns, seed, dropout)
    return output.transpose(1, 2)


def _examples(dtype: torch.dtype) -> list[tuple]:
    """Two heads that share a key, a map of 5 x 7 cells with padding, and a prior of each head."""
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    padding = torch.arange(35).view(1, 35) % 7 > 4
    prior = made(1, 2, 9, 5), made(1, 2, 9, 7)
    return [(made(1, 2, 9, 12), made(1, 1, 35, 12), made(1, 2, 35, 6), padding, *prior, 0.0)]


KERNELS = kernels.register(
    "prior_attention",
    compiled=compiled,
    plain=plain_prior_attention,
    examples=_examples,
    dtypes={"cpu": tuple(kernels.CPU_NAMES)},
)
