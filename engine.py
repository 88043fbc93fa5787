"""One epoch of training, one evaluation. Explicit arguments; knows no model family."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from samdetr.datasets.coco_eval import CocoEvaluator
from samdetr.training.ema import WeightAverage
from samdetr.training.guard import Step, StepGuard
from samdetr.training.profiler import StepProfiler
from samdetr.util.logger import MetricAverager, log, progress
from samdetr.util.prefetch import on_device


def train_one_epoch(
    *,
    model: nn.Module,
    criterion: nn.Module,
    loader: Iterable,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    device: torch.device,
    epoch: int,
    start: int = 0,
    averager: MetricAverager | None = None,
    after_step: Callable[[Callable[[], None]], None] | None = None,
    clip_max_norm: float,
    zero_grad: bool = True,
    accumulate: int = 1,
    amp: torch.dtype | None = None,
    scaler: GradScaler | None = None,
    guard: StepGuard | None = None,
    average: WeightAverage | None = None,
    profiler: StepProfiler | None = None,
    print_every: int,
) -> dict[str, float]:
    """Train on every batch of `loader`; `scheduler` steps after each step of the optimiser, taken or skipped.

    Nothing here waits for a GPU but the matching, once for each batch; what is shown is read when it is shown.

    Args:
        start: steps of this epoch that are already done, whose batches `loader` leaves out.
        averager: what the steps are averaged in; one that has seen those that are done, where there are some.
        after_step: called after every step, with a function to call before the state is saved: the guard's look. May
            raise to end the training.
        clip_max_norm: largest norm of all gradients together; 0 leaves them as they are.
        zero_grad: whether every step starts from gradients of zero; False adds to what the last step left, clipped.
        accumulate: batches to a step, whose gradients are those of one large batch; an incomplete rest is left out.
        amp: what the network computes in where that is safe (matching and losses stay in float32); None: as it is.
        scaler: scales the loss, so that gradients of float16 do not vanish; skips a step whose gradients overflow.
        guard: skips and counts steps that are not finite; the run's, as it counts over epochs. None: one of its own.
        average: follows the weights.
        profiler: times the first steps.
        print_every: iterations between two lines where the output is no terminal.
    Returns:
        Averages over the epoch and all processes, without bad steps: `loss`, each weighted term, each unweighted one
        with the suffix `_unscaled`, `class_error`; of all steps `lr`; and `bad_steps`, how many were bad.
    Raises:
        BadSteps, a ValueError: too many steps in a row were not finite; names the terms, epoch, iteration and images.
    """
    model.train()
    criterion.train()
    averager = averager or MetricAverager()
    network = model.module if isinstance(model, DistributedDataParallel) else model
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    guard = guard or StepGuard(network, device=device, keep_gradients=not zero_grad)
    profiler = profiler or StepProfiler(steps=0, device=device)
    total = start + len(loader) // accumulate
    batches = _timed(on_device(_timed(loader, profiler, "data"), device), profiler, "transfer")
    groups = _groups(batches, accumulate)
    steps = progress(groups, description=f"epoch {epoch}", start=start, total=total, every=print_every)
    with _timed_matching(criterion, profiler):
        for iteration, group in enumerate(steps, start):
            random = guard.begin()
            if zero_grad:
                optimizer.zero_grad(set_to_none=True)
            group = [(images, targets.unpack()) for images, targets in group]
            together = [target for _, targets in group for target in targets]
            num_boxes = criterion.count(together, torch.empty(0, device=device))
            losses, metrics = [], []
            for part, (images, targets) in enumerate(group):
                with _without_exchange(model) if part < accumulate - 1 else nullcontext():
                    with profiler.section("forward"):
                        outputs = predict(model, images, amp)
                    with profiler.section("loss"):
                        loss, terms = compute_losses(criterion, outputs, targets, num_boxes=num_boxes, parts=accumulate)
                    if part == 0:
                        guard.look()  # the matching has just waited for all of the step before
                        guard.before_backward()
                    with profiler.section("backward"):
                        (scaler.scale(loss) if scaler else loss).backward()
                losses.append(loss.detach())
                metrics.append(terms)
            lr = optimizer.param_groups[0]["lr"]
            with profiler.section("optimiser"):
                if scaler:
                    scaler.unscale_(optimizer)
                gradients = [weight.grad for weight in weights if weight.grad is not None]
                norm = nn.utils.get_total_norm(gradients)
                scale = scaler.scale(torch.ones((), device=device)) if scaler else None
                skip, bad = guard.judge(losses, norm, scale=scale)
                if clip_max_norm > 0:
                    nn.utils.clip_grads_with_norm_(weights, clip_max_norm, norm)
                guard.step(optimizer, skip)
                if average:
                    average.update(skip)
                if scaler:
                    scaler.update()
                scheduler.step()
            ids = [target["image_id"] for target in together]
            guard.end(Step(epoch, iteration, metrics, ids, num_boxes, group, random, scale))
            for terms in metrics:
                averager.update(_where_good(terms, bad))
            averager.update({"lr": lr, "good": 1 - bad})
            steps.set(loss=metrics[-1]["loss"], lr=lr)
            if table := profiler.step():
                log(table)
            if after_step:
                after_step(guard.look)
    guard.look()
    averages = averager.averages()
    good, lr = averages.pop("good"), averages.pop("lr")
    averages = {name: value / good if good else math.nan for name, value in averages.items()}
    return {**averages, "lr": lr, "bad_steps": round((1 - good) * total)}


@torch.no_grad()
def evaluate(
    *,
    model: nn.Module,
    criterion: nn.Module,
    postprocess: Callable[[dict[str, Any], Tensor], list[dict[str, Tensor]]],
    loader: Iterable,
    evaluator: CocoEvaluator,
    device: torch.device,
    amp: torch.dtype | None = None,
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
    if isinstance(model, DistributedDataParallel):
        network = model.module
        # Learned norms have seen other batches in each process. All evaluate with those of rank 0, which are saved.
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, src=0)
    batches = on_device(loader, device)
    for images, targets in progress(batches, description="evaluation", total=len(loader), every=print_every):
        targets = targets.unpack()
        outputs = predict(network, images, amp)
        averager.update(compute_losses(criterion, outputs, targets)[1])
        sizes = torch.stack([t["orig_size"] for t in targets])
        detections = postprocess(outputs, sizes)
        evaluator.update({int(t["image_id"]): d for t, d in zip(targets, detections)})
    return {**averager.averages(), "coco_eval_bbox": list(evaluator.summarize().values())}


def _groups(batches: Iterable, number: int) -> Iterator[list]:
    """Lists of so many batches; an incomplete rest is left out."""
    group = []
    for batch in batches:
        group.append(batch)
        if len(group) == number:
            yield group
            group = []


def _timed(items: Iterable, profiler: StepProfiler, section: str) -> Iterator:
    """The same, the wait for each timed."""
    iterator = iter(items)
    while True:
        with profiler.section(section):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


@contextmanager
def _timed_matching(criterion: nn.Module, profiler: StepProfiler) -> Iterator[None]:
    """Time the matcher apart from the loss that calls it."""
    matcher = criterion.matcher
    match = matcher.match_all

    def timed(*args: Any) -> Any:
        with profiler.section("matching"):
            return match(*args)

    if profiler.active:
        matcher.match_all = timed
    try:
        yield
    finally:
        matcher.match_all = match


def _without_exchange(model: nn.Module):
    """Keep the gradients of this process to itself for now."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def predict(model: nn.Module, images: Any, amp: torch.dtype | None) -> dict[str, Any]:
    """The detector's dict, in float32 at least."""
    if amp is None:
        return model(images)
    with torch.autocast(images.images.device.type, dtype=amp):
        outputs = model(images)
    return _widen(outputs)


def _where_good(metrics: dict[str, Tensor], bad: Tensor) -> dict[str, Tensor]:
    """The same in float64, and 0 in a bad step: what is not finite would spoil the averages of an epoch."""
    values = torch.stack([value.to(torch.float64) for value in metrics.values()])
    return dict(zip(metrics, torch.where(bad.bool(), 0, values)))


def _widen(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _widen(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_widen(part) for part in value]
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def compute_losses(
    criterion: nn.Module, outputs: dict[str, Any], targets: list, *, num_boxes: Tensor | None = None, parts: int = 1
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss to minimise, and what the log calls its parts, detached. For a batch that comes in `parts`, all divided
    by the number of boxes of the whole, the log's are as many times as large: their average is that of the batch."""
    terms = criterion(outputs, targets, num_boxes)
    weighted = criterion.weighted(terms)
    loss = sum(weighted.values())
    metrics = {"loss": loss, **weighted, **{f"{name}_unscaled": value for name, value in terms.items()}}
    metrics = {name: value.detach() for name, value in metrics.items()}
    if parts > 1:
        summed = {"loss", *weighted, *(f"{name}_unscaled" for name in weighted)}
        metrics = {name: value * parts if name in summed else value for name, value in metrics.items()}
    return loss, {**metrics, "class_error": terms["class_error"]}
