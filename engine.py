"""One epoch of training, one evaluation. Explicit arguments; knows no model family."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from datasets.coco_eval import CocoEvaluator
from util.logger import MetricAverager, progress


def train_one_epoch(
    *,
    model: nn.Module,
    criterion: nn.Module,
    loader: Iterable,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    device: torch.device,
    epoch: int,
    clip_max_norm: float,
    zero_grad: bool = True,
    print_every: int,
) -> dict[str, float]:
    """Train on every batch of `loader`; `scheduler` steps after each.

    Args:
        clip_max_norm: largest norm of all gradients together; 0 leaves them as they are.
        zero_grad: whether every step starts from gradients of zero; False adds to what the last step left, clipped.
        print_every: iterations between two lines where the output is no terminal.
    Returns:
        Averages over the epoch and all processes: `loss`, each weighted term, each unweighted one with the suffix
        `_unscaled`, `class_error`, and `lr`.
    Raises:
        ValueError: a loss that is not finite; names the terms, epoch, iteration and images.
    """
    model.train()
    criterion.train()
    averager = MetricAverager()
    steps = progress(loader, description=f"epoch {epoch}", every=print_every)
    for iteration, (images, targets) in enumerate(steps):
        images = images.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True).unpack()
        loss, metrics = _losses(criterion, model(images), targets)
        if not torch.isfinite(loss):
            raise ValueError(_not_finite(metrics, targets, epoch=epoch, iteration=iteration))
        if zero_grad:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if clip_max_norm > 0:
            nn.utils.clip_grad_norm_(model.parameters(), clip_max_norm)
        lr = optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
        averager.update({**metrics, "lr": lr})
        steps.set(loss=loss, lr=lr)
    return averager.averages()


@torch.no_grad()
def evaluate(
    *,
    model: nn.Module,
    criterion: nn.Module,
    postprocess: Callable[[dict[str, Any], Tensor], list[dict[str, Tensor]]],
    loader: Iterable,
    evaluator: CocoEvaluator,
    device: torch.device,
    print_every: int,
) -> dict[str, Any]:
    """Losses, and COCO figures of the detections, on every batch of `loader`.

    Returns:
        Averages as of `train_one_epoch`, and `coco_eval_bbox`, the 12 figures in pycocotools' order. `evaluator` holds
        the detections afterwards.
    """
    model.eval()
    criterion.eval()
    averager = MetricAverager()
    # Without DDP's wrapper: the processes may have unlike numbers of batches here, and nothing is to be exchanged.
    network = model
    if isinstance(model, nn.parallel.DistributedDataParallel):
        network = model.module
        # Learned norms have seen other batches in each process. All evaluate with those of rank 0, which are saved.
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, src=0)
    for images, targets in progress(loader, description="evaluation", every=print_every):
        images = images.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True).unpack()
        outputs = network(images)
        averager.update(_losses(criterion, outputs, targets)[1])
        sizes = torch.stack([t["orig_size"] for t in targets])
        detections = postprocess(outputs, sizes)
        evaluator.update({int(t["image_id"]): d for t, d in zip(targets, detections)})
    return {**averager.averages(), "coco_eval_bbox": list(evaluator.summarize().values())}


def _losses(criterion: nn.Module, outputs: dict[str, Any], targets: list) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss to minimise, and what the log calls its parts."""
    terms = criterion(outputs, targets)
    weighted = criterion.weighted(terms)
    loss = sum(weighted.values())
    unscaled = {f"{name}_unscaled": value for name, value in terms.items()}
    return loss, {"loss": loss, **weighted, **unscaled, "class_error": terms["class_error"]}


def _not_finite(metrics: dict[str, Tensor], targets: list, *, epoch: int, iteration: int) -> str:
    terms = {name: value.item() for name, value in metrics.items() if not torch.isfinite(value)}
    bad = [f"{name} = {value}" for name, value in terms.items() if name != "loss" and not name.endswith("_unscaled")]
    images = [int(t["image_id"]) for t in targets]
    return (
        f"the loss is not finite in epoch {epoch}, iteration {iteration}: {', '.join(bad) or 'their sum'}; "
        f"image ids {images}. Try a smaller --lr, and look at these images and their boxes"
    )
