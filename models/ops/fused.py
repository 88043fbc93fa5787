"""torch.ops.sam_detr.ms_deform_attn_fused: deformable attention on the CPU from what its projections give.

Softmax and locations are computed one query at a time inside the kernel and never written out; backward computes them
again. For a map of 80 x 108 and two coarser ones, softmax over rows of 12 and the arithmetic of locations took longer
than the attention itself. There is no plain path here: ask `usable` first, and go through `locate` and `weigh` of the
module else.
"""

import torch
from torch import Tensor

from samdetr.models.ops import kernels
from samdetr.models.ops.registration import LIBRARY, compiled, differentiate_twice

FORWARD, BACKWARD = "sam_detr::ms_deform_attn_fused", "sam_detr::ms_deform_attn_fused_backward"
INPUTS = "Tensor value, SymInt[] sizes, Tensor reference, Tensor offsets, Tensor logits, Tensor? padding"
LIBRARY.define(f"ms_deform_attn_fused({INPUTS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.define(
    f"ms_deform_attn_fused_backward(Tensor grad_output, {INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def usable(sizes: list[int], *tensors: Tensor) -> bool:
    """Whether all are of one type that the kernel has, on a CPU, and the kernel is there and wanted. What is compiled
    or cast keeps the operator that every device and type has."""
    first = tensors[0]
    if any(x.device.type != "cpu" or x.dtype != first.dtype for x in tensors) or first.dtype not in kernels.CPU_NAMES:
        return False
    return not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu") and compiled(first, sizes)


def ms_deform_attn_fused(
    value: Tensor, sizes: list[int], reference: Tensor, offsets: Tensor, logits: Tensor, padding: Tensor | None
) -> Tensor:
    """Multi-scale deformable attention (Zhu et al., Deformable DETR, ICLR 2021, eq. 3), differentiable once.

    Args:
        value: (B, L, heads, channels), the levels' cells in rows, one level after the other.
        sizes: height and width of each level, one after the other.
        reference: (B, Q, levels, 2), x and y as fractions of the level, offsets being in its cells; or
            (B, Q, levels, 4), with width and height, offsets being in halves of the box, divided by the points.
        offsets: (B, Q, heads, levels, points, 2).
        logits: (B, Q, heads, levels * points), whose softmax says how much each point counts.
        padding: (B, L), True at cells that count as zeros.
    Returns:
        (B, Q, heads * channels).
    """
    return torch.ops.sam_detr.ms_deform_attn_fused(value, sizes, reference, offsets, logits, padding)


@torch.library.impl(LIBRARY, "ms_deform_attn_fused", "CPU")
def forward(
    value: Tensor, sizes: list[int], reference: Tensor, offsets: Tensor, logits: Tensor, padding: Tensor | None
) -> Tensor:
    output = value.new_empty(*offsets.shape[:2], value.shape[2] * value.shape[3])
    _call("forward", sizes, value, reference, offsets, logits, padding, output)
    return output


@torch.library.impl(LIBRARY, "ms_deform_attn_fused_backward", "CPU")
def backward(
    grad_output: Tensor,
    value: Tensor,
    sizes: list[int],
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    padding: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradients = tuple(x.new_empty(x.shape) for x in (value, reference, offsets, logits))
    _call("backward", sizes, value, reference, offsets, logits, padding, grad_output.contiguous(), *gradients)
    return gradients


def _call(
    name: str,
    sizes: list[int],
    value: Tensor,
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    padding: Tensor | None,
    *others: Tensor,
) -> None:
    """`others` are contiguous."""
    inputs = (value, padding, reference, offsets, logits)
    tensors = [None if x is None else x.contiguous() for x in inputs]
    pointers = map(kernels.pointer, (*tensors, *others))
    settings = (kernels.dimensions(value, offsets), reference.shape[-1], torch.get_num_threads())
    kernels.call(f"ms_deform_attn_fused_{name}", value.dtype, kernels.integers(sizes), *settings, *pointers)


@torch.library.register_fake(FORWARD, lib=LIBRARY)
def fake_forward(
    value: Tensor, sizes: list[int], reference: Tensor, offsets: Tensor, logits: Tensor, padding: Tensor | None
) -> Tensor:
    return value.new_empty(value.shape[0], offsets.shape[1], value.shape[2] * value.shape[3])


@torch.library.register_fake(BACKWARD, lib=LIBRARY)
def fake_backward(
    grad_output: Tensor,
    value: Tensor,
    sizes: list[int],
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    padding: Tensor | None,
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (value, reference, offsets, logits))


def setup_context(ctx, inputs, output) -> None:
    value, ctx.sizes, reference, offsets, logits, padding = inputs
    ctx.save_for_backward(value, reference, offsets, logits, padding)


def differentiate(ctx, grad_output: Tensor):
    value, reference, offsets, logits, padding = ctx.saved_tensors
    of_value, *others = torch.ops.sam_detr.ms_deform_attn_fused_backward(
        grad_output, value, ctx.sizes, reference, offsets, logits, padding
    )
    return of_value, None, *others, None


torch.library.register_autograd(FORWARD, differentiate, setup_context=setup_context, lib=LIBRARY)
torch.library.register_autograd(BACKWARD, differentiate_twice, lib=LIBRARY)
