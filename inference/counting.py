"""Parameters and FLOPs of a network.

FLOPs are counted as fvcore does: a multiplication with its addition is one; those of convolutions and matrix products
count, and five for each value that is normalised; what is element by element does not, nor do RoIAlign and grid_sample.
The operator of deformable attention counts four corners and one weight for each channel of a point.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from samdetr.models.detector import Detector
from samdetr.util.padded_images import PaddedImages


@dataclass(frozen=True)
class Count:
    """Of a network, or of a module of it; `flops` of one image."""

    parameters: int
    trainable: int
    flops: int


def _normalised(input_shape: tuple, *_, **__) -> int:
    return 2 * 5 * prod(input_shape)


def _sampled(value: tuple, sizes: list, locations: tuple, weights: tuple, **_) -> int:
    return 2 * 5 * prod(weights) * value[-1]


_FORMULAS = {
    torch.ops.aten.native_layer_norm: _normalised,
    torch.ops.aten.native_group_norm: _normalised,
    torch.ops.sam_detr.ms_deform_attn: _sampled,
}


def count(network: Detector, size: Sequence[int]) -> Count:
    """Of the whole network for an image of `size`, height and width. Nothing is computed: shapes suffice."""
    return by_module(network, size)[""]


def by_module(network: Detector, size: Sequence[int]) -> dict[str, Count]:
    """Of the network's children and of the decoder's, by their names, in order; the whole network is ""."""
    names = [name for name, _ in network.named_children()]
    names += [f"decoder.{name}" for name, _ in network.decoder.named_children()]
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    network.eval().requires_grad_(False)  # what counts by module follows gradients, which fake tensors lack
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
                network(_image(network, size))
    finally:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in trained)
    # Called by the class, then by the path of modules; the counter counts additions, too.
    flops = {name.partition(".")[2]: sum(found.values()) // 2 for name, found in counter.get_flop_counts().items()}
    flops[""] = counter.get_total_flops() // 2

    def of(name: str, module: nn.Module) -> int:
        """A list of modules is not called itself."""
        return flops[name] if name in flops else sum(of(f"{name}.{n}", child) for n, child in module.named_children())

    counts = {}
    for name in ["", *names]:
        module = network.get_submodule(name)
        parameters = list(module.parameters())
        of_training = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        counts[name] = Count(sum(parameter.numel() for parameter in parameters), of_training, of(name, module))
    return counts


def _image(network: Detector, size: Sequence[int]) -> PaddedImages:
    device = next(network.parameters()).device
    return PaddedImages(torch.zeros(1, 3, *size, device=device), torch.zeros(1, *size, dtype=torch.bool, device=device))


def latency(network: Detector, size: Sequence[int], *, rounds: int) -> float:
    """Seconds that one image takes: the median of some rounds, after one that warms up."""
    network.eval()
    image, times = _image(network, size), []
    with torch.inference_mode():
        for _ in range(rounds + 1):
            begin = time.perf_counter()
            outputs: dict[str, Tensor] = network(image)
            outputs["pred_logits"].sum().item()  # waits for a GPU
            times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])
