"""The network in several processes, which exchange its gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from samdetr.engine import compute_losses
from samdetr.models.criterion import SetCriterion
from samdetr.models.detector import Detector
from samdetr.training.state import random_state, set_random_state
from samdetr.util.padded_images import PaddedImages

SIDE = 64  # of the images of the first steps


def parallel(network: Detector, criterion: SetCriterion, *, sync_buffers: bool) -> DistributedDataParallel:
    """The network, which is on its device, for training in several processes.

    Every process must call this. Weights, buffers and random numbers of the main process stay as they are.

    Args:
        sync_buffers: whether all processes use the main process's statistics of norms; frozen ones never differ.
    """
    for weight in network.parameters():
        if weight.requires_grad and 1 in weight.shape:
            weight.register_hook(_Strides(weight))
    # A static graph, because parameters without gradient, such as heads of earlier layers without auxiliary losses, are
    # then looked for once and not in every step.
    model = DistributedDataParallel(network, gradient_as_bucket_view=True, static_graph=True)
    model.broadcast_buffers = sync_buffers  # PyTorch warns of the argument of this name since 2.14
    _first_steps(model, network, criterion)
    return model


def _first_steps(model: nn.Module, network: nn.Module, criterion: SetCriterion) -> None:
    """Backward on made-up images, which leaves no trace but in DistributedDataParallel.

    That notes which parameters get a gradient, then sorts them for the exchange in the order in which they get it. The
    first batches of a run will not do for this: with `accumulate` not all gradients are exchanged, and with more than
    two processes a resumed run would sum in another order than the run that was never stopped.
    """
    weight = next(network.parameters())
    device = weight.device
    random, buffers = random_state(device), [(buffer, buffer.clone()) for buffer in network.buffers()]
    model.train()
    criterion.train()
    images = weight.new_zeros(2, 3, SIDE, SIDE)
    targets = [{"labels": images.new_zeros(1, dtype=torch.int64), "boxes": images.new_full((1, 4), 0.5)}] * 2
    inputs = PaddedImages(images, torch.zeros_like(images[:, 0], dtype=torch.bool))
    for _ in range(2):  # the parameters that have a gradient; their order
        noised = criterion.noised(targets)
        outputs = model(inputs) if noised is None else model(inputs, noised)
        compute_losses(criterion, outputs, targets)[0].backward()
        network.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    set_random_state(random, device)


class _Strides:
    """Gives a gradient the strides of its parameter where they differ in dimensions of size 1 alone.

    1 x 1 convolutions have two names for one layout in memory. DistributedDataParallel would warn of the other one.
    """

    def __init__(self, weight: Tensor) -> None:
        self.wanted = weight.stride()

    def __call__(self, gradient: Tensor) -> Tensor:
        shape, found = gradient.shape, gradient.stride()
        if found == self.wanted or any(n > 1 and a != b for n, a, b in zip(shape, found, self.wanted)):
            return gradient
        return gradient.as_strided(shape, self.wanted)
