"""One epoch of training, one evaluation. Explicit arguments; knows no model family."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from samdetr.datasets.coco_eval import CocoEvaluator
from samdetr.models.criterion import SetCriterion
from samdetr.models.denoising import Noised
from samdetr.util.cuda_graphs import GraphedNetwork
from samdetr.util.distributed import all_gather_object
from samdetr.util.logger import MetricAverager, MovingMean, log, progress
from samdetr.util.prefetch import on_device
from samdetr.util.sections import section
from samdetr.util.targets import TargetBatch

Batch = tuple[Any, TargetBatch]
Targets = list[dict[str, Tensor]]


def ignore(*_: Any) -> None:
    """The callback that does nothing."""


def train_one_epoch(
    *,
    model: nn.Module,
    criterion: SetCriterion,
    loader: DataLoader,
    update: Any,
    device: torch.device,
    epoch: int,
    start: int = 0,
    accumulate: int = 1,
    amp: torch.dtype | None = None,
    averager: MetricAverager | None = None,
    on_batch: Callable[[TargetBatch | None], None] = ignore,
    on_metrics: Callable[[Sequence[Mapping[str, Any]]], None] = ignore,
    after_step: Callable[[], None] = ignore,
    print_every: int,
) -> dict[str, float]:
    """Train on every batch of `loader`.

    The host waits for a GPU once in each batch, in the matching; metrics are read when they are shown.

    Args:
        update: training.update.Update, which makes a step of the gradients.
        start: steps of this epoch that are already done; `loader` leaves their batches out.
        accumulate: batches per step, whose gradients are those of one large batch; an incomplete rest is left out.
        amp: autocast dtype of the network; matching and losses stay float32. None: no autocast.
        averager: averages the metrics; it has seen the steps that are already done.
        on_batch: called with the targets of each batch that arrives, and with None after the last.
        on_metrics: called after every step with the metrics of its parts, on the device.
        after_step: called after every step. May raise to end the training.
    Returns:
        Averages over the epoch and all processes, without bad steps: `loss`, each weighted term, each unweighted one
        with the suffix `_unscaled`, `class_error`; of all steps `lr`; and `bad_steps`, the number of bad steps.
    Raises:
        ValueError: training.guard.BadSteps, which see.
    """
    model.train()
    criterion.train()
    averager = averager or MetricAverager()
    total = start + len(loader) // accumulate
    groups = _groups(on_device(loader, device), accumulate, on_batch)
    steps = progress(groups, description=f"epoch {epoch}", start=start, total=total, every=print_every)
    shown = MovingMean()
    for iteration, group in enumerate(steps, start):
        parts = [(images, targets.unpack()) for images, targets in group]
        together = [target for _, targets in parts for target in targets]
        num_boxes = criterion.count(together, torch.empty(0, device=device))
        with update.step(parts, epoch=epoch, iteration=iteration, num_boxes=num_boxes) as step:
            for number, (images, targets) in enumerate(parts, 1):
                # The processes exchange gradients in the last part of a step only.
                ddp = model if isinstance(model, DistributedDataParallel) and number < accumulate else None
                with ddp.no_sync() if ddp else nullcontext():
                    noised = criterion.noised(targets)
                    with section("forward"):
                        outputs = predict(model, images, amp, noised)
                    with section("loss"):
                        loss, terms = compute_losses(criterion, outputs, targets, num_boxes=num_boxes, parts=accumulate)
                    step.backward(loss, terms)
        for metrics in step.metrics:
            averager.update(metrics)
        on_metrics(step.metrics)
        steps.set(loss=shown.update(terms["loss"]), lr=step.lr)
        after_step()
    update.check()
    return _averages(averager, total)


@torch.no_grad()
def evaluate(
    *,
    model: nn.Module,
    criterion: SetCriterion,
    postprocess: Callable[[dict[str, Any], Tensor], list[dict[str, Tensor]]],
    loader: DataLoader,
    evaluator: CocoEvaluator,
    device: torch.device,
    amp: torch.dtype | None = None,
    cuda_graphs: bool = False,
    on_batch: Callable[[TargetBatch | None], None] = ignore,
    print_every: int,
) -> dict[str, Any]:
    """Losses, and COCO metrics of the detections, on every batch of `loader`. Arguments as of `train_one_epoch`.

    Args:
        cuda_graphs: record the network for the sizes of batches, on a GPU.
    Returns:
        Averages as of `train_one_epoch`, and `coco_eval_bbox`, the 12 metrics in pycocotools' order. `evaluator` holds
        the detections afterwards. If outputs of images are not finite, `nonfinite_images` is their number.
    """
    model.eval()
    criterion.eval()
    averager = MetricAverager()
    nonfinite: list[int] = []  # ids of images with outputs that are not finite
    # Without DDP's wrapper: the processes may have different numbers of batches, and must not exchange anything.
    network = model
    if isinstance(model, DistributedDataParallel):
        network = model.module
        # Learned norms have seen other batches in each process. All evaluate with those of rank 0, which are saved.
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, src=0)
    if cuda_graphs:
        network = GraphedNetwork(network)
    groups = _groups(on_device(loader, device), 1, on_batch)
    for ((images, packed),) in progress(groups, description="evaluation", total=len(loader), every=print_every):
        targets = packed.unpack()
        outputs = predict(network, images, amp)
        averager.update(compute_losses(criterion, outputs, targets)[1])
        sizes = torch.stack([t["orig_size"] for t in targets])
        nonfinite += [int(t["image_id"]) for t, good in zip(targets, _finite_images(outputs)) if not good]
        detections = postprocess(outputs, sizes)
        evaluator.update({int(t["image_id"]): d for t, d in zip(targets, detections)})
    metrics = {**averager.averages(), "coco_eval_bbox": list(evaluator.summarize().values())}
    if images := sorted(i for found in all_gather_object(nonfinite) for i in found):
        metrics["nonfinite_images"] = len(images)
        log(f"warning: outputs of {len(images)} images are not finite, which detect nothing; image ids {images[:10]}")
    return metrics


def _finite_images(outputs: dict[str, Any]) -> list[bool]:
    """Whether all predictions of an image are finite, for each image of a batch."""
    parts = [outputs[name].isfinite().flatten(1).all(1) for name in ("pred_logits", "pred_boxes")]
    return (parts[0] & parts[1]).tolist()


def _groups(
    batches: Iterable[Batch], number: int, on_batch: Callable[[TargetBatch | None], None]
) -> Iterator[list[Batch]]:
    """Lists of `number` batches; an incomplete rest is left out."""
    group = []
    for batch in batches:
        on_batch(batch[1])
        group.append(batch)
        if len(group) == number:
            yield group
            group = []
    on_batch(None)


def _averages(averager: MetricAverager, total: int) -> dict[str, float]:
    averages = averager.averages()
    good, lr = averages.pop("good"), averages.pop("lr")
    averages = {name: value / good if good else math.nan for name, value in averages.items()}
    return {**averages, "lr": lr, "bad_steps": round((1 - good) * total)}


def predict(model: nn.Module, images: Any, amp: torch.dtype | None, noised: Noised | None = None) -> dict[str, Any]:
    """The detector's dict, in float32 at least. `noised`: of `SetCriterion.noised`."""
    inputs = (images,) if noised is None else (images, noised)
    if amp is None:
        return model(*inputs)
    with torch.autocast(images.images.device.type, dtype=amp):
        outputs = model(*inputs)

    def widen(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: widen(part) for name, part in value.items()}
        if isinstance(value, list):
            return [widen(part) for part in value]
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value

    return widen(outputs)


def compute_losses(
    criterion: SetCriterion,
    outputs: dict[str, Any],
    targets: Targets,
    *,
    num_boxes: Tensor | None = None,
    parts: int = 1,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss to minimise, and the metrics for the log, detached.

    If the batch is one of several `parts` of a step, `num_boxes` is that of all parts. The metrics that are divided by
    it are then multiplied by `parts`, so that their average over the parts is that of the whole.
    """
    terms = criterion(outputs, targets, num_boxes)
    weighted = criterion.weighted(terms)
    loss = reduce(torch.add, weighted.values())
    metrics = {"loss": loss, **weighted, **{f"{name}_unscaled": value for name, value in terms.items()}}
    metrics = {name: value.detach() for name, value in metrics.items()}
    if parts > 1:
        summed = {"loss", *weighted, *(f"{name}_unscaled" for name in weighted)}
        metrics = {name: value * parts if name in summed else value for name, value in metrics.items()}
    return loss, {**metrics, "class_error": terms["class_error"]}
