"""torch.ops.sam_detr.ms_deform_attn: the operator that PyTorch sees, with its rules for autograd, compile and autocast.

One operator for every device and path. Which path runs is decided inside, at run time, so that torch.compile, export
and saved graphs carry the operator and not the decision.
"""

import torch
from torch import Tensor

from samdetr.models.ops import kernels
from samdetr.models.ops.plain import coordinate_dtype, plain_backward, plain_ms_deform_attn

LIBRARY = torch.library.Library("sam_detr", "DEF")
FORWARD, BACKWARD = "sam_detr::ms_deform_attn", "sam_detr::ms_deform_attn_backward"
LIBRARY.define(
    "ms_deform_attn(Tensor value, SymInt[] sizes, Tensor locations, Tensor weights) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] sizes, Tensor locations, Tensor weights)"
    " -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def compiled(value: Tensor, sizes: list[int]) -> bool:
    if value.is_cuda and len(sizes) > 2 * kernels.MAX_CUDA_LEVELS:
        return False
    return kernels.wanted(value.device.type, value.device.index)


def same_width(value: Tensor, *coordinates: Tensor) -> list[Tensor]:
    """Contiguous, and locations and weights as wide as the sums."""
    return [value.contiguous(), *(tensor.to(coordinate_dtype(value)).contiguous() for tensor in coordinates)]


@torch.library.impl(LIBRARY, "ms_deform_attn", "CompositeExplicitAutograd")
def forward(value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    if not compiled(value, sizes):
        return plain_ms_deform_attn(value, sizes, locations, weights)
    value, locations, weights = same_width(value, locations, weights)
    return kernels.forward(value, sizes, locations, weights)


@torch.library.impl(LIBRARY, "ms_deform_attn_backward", "CompositeExplicitAutograd")
def backward(
    grad_output: Tensor, value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if not compiled(value, sizes):
        return plain_backward(grad_output, value, sizes, locations, weights)
    wide = same_width(value, locations, weights)
    grad_output = grad_output.to(value.dtype).contiguous()
    grad_value, grad_locations, grad_weights = kernels.backward(grad_output, wide[0], sizes, *wide[1:])
    return grad_value, grad_locations.to(locations.dtype), grad_weights.to(weights.dtype)


@torch.library.register_fake(FORWARD, lib=LIBRARY)
def fake_forward(value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


@torch.library.register_fake(BACKWARD, lib=LIBRARY)
def fake_backward(grad_output: Tensor, value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (value, locations, weights))


def setup_context(ctx, inputs, output) -> None:
    value, ctx.sizes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def differentiate(ctx, grad_output: Tensor):
    value, locations, weights = ctx.saved_tensors
    gradients = torch.ops.sam_detr.ms_deform_attn_backward(grad_output, value, ctx.sizes, locations, weights)
    return gradients[0], None, *gradients[1:]


def differentiate_twice(ctx, *gradients):
    raise NotImplementedError("ms_deform_attn has first derivatives only, as grid_sample has in PyTorch")


torch.library.register_autograd(FORWARD, differentiate, setup_context=setup_context, lib=LIBRARY)
torch.library.register_autograd(BACKWARD, differentiate_twice, lib=LIBRARY)


def register_autocast(device_type: str) -> None:
    """Under autocast the value takes its type; locations and weights stay wide (see coordinate_dtype).

    torch.library.register_autocast knows only one type for all arguments, fixed when the operator is made.
    """

    def kernel(value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
        if value.dtype != torch.float64:
            value = value.to(torch.get_autocast_dtype(device_type))
        with torch.autocast(device_type, enabled=False):
            return torch.ops.sam_detr.ms_deform_attn(value, sizes, locations, weights)

    LIBRARY.impl("ms_deform_attn", kernel, f"Autocast{device_type.upper()}")


for _device_type in ("cpu", "cuda"):
    register_autocast(_device_type)
