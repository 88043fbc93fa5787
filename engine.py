"""One epoch of training, one evaluation. Explicit arguments; knows no model family."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from datasets.coco_eval import CocoEvaluator
from util.logger import MetricAverager, log, progress
from util.prefetch import on_device
from util.profiler import StepProfiler


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
    profiler: StepProfiler | None = None,
    print_every: int,
) -> dict[str, float]:
    """Train on every batch of `loader`; `scheduler` steps after each step of the optimiser.

    Nothing here waits for a GPU but the matching, once for each batch; what is shown is read when it is shown.

    Args:
        start: steps of this epoch that are already done, whose batches `loader` leaves out.
        averager: what the steps are averaged in; one that has seen those that are done, where there are some.
        after_step: called after every step, with a function to call before the state is saved: it raises ValueError for
            a loss that was not finite since the last look. May raise to end the training.
        clip_max_norm: largest norm of all gradients together; 0 leaves them as they are.
        zero_grad: whether every step starts from gradients of zero; False adds to what the last step left, clipped.
        accumulate: batches to a step, whose gradients are those of one large batch; an incomplete rest is left out.
        amp: what the network computes in where that is safe (matching and losses stay in float32); None: as it is.
        scaler: scales the loss, so that gradients of float16 do not vanish; skips a step whose gradients overflow.
        profiler: times the first steps.
        print_every: iterations between two lines where the output is no terminal, and between looks at the loss.
    Returns:
        Averages over the epoch and all processes: `loss`, each weighted term, each unweighted one with the suffix
        `_unscaled`, `class_error`, and `lr`.
    Raises:
        ValueError: a loss that is not finite; names the terms, epoch, iteration and images.
    """
    model.train()
    criterion.train()
    averager, watch = averager or MetricAverager(), LossWatch(epoch)
    profiler = profiler or StepProfiler(steps=0, device=device)
    total = start + len(loader) // accumulate
    batches = _timed(on_device(_timed(loader, profiler, "data"), device), profiler, "transfer")
    groups = _groups(batches, accumulate)
    steps = progress(groups, description=f"epoch {epoch}", start=start, total=total, every=print_every)
    with _timed_matching(criterion, profiler):
        for iteration, group in enumerate(steps, start):
            if zero_grad:
                optimizer.zero_grad(set_to_none=True)
            group = [(images, targets.unpack()) for images, targets in group]
            together = [target for _, targets in group for target in targets]
            num_boxes = criterion.count(together, torch.empty(0, device=device)) if accumulate > 1 else None
            for part, (images, targets) in enumerate(group):
                with _without_exchange(model) if part < accumulate - 1 else nullcontext():
                    with profiler.section("forward"):
                        outputs = _predict(model, images, amp)
                    with profiler.section("loss"):
                        loss, metrics = _losses(criterion, outputs, targets, num_boxes=num_boxes, parts=accumulate)
                    with profiler.section("backward"):
                        (scaler.scale(loss) if scaler else loss).backward()
                watch.add(metrics, targets, iteration)
                averager.update(metrics)
            lr = optimizer.param_groups[0]["lr"]
            with profiler.section("optimiser"):
                if scaler:
                    scaler.unscale_(optimizer)
                if clip_max_norm > 0:
                    nn.utils.clip_grad_norm_(model.parameters(), clip_max_norm)
                if scaler:
                    scaler.step(optimizer)
                    scaler.update()
                else:
                    optimizer.step()
                scheduler.step()
            averager.update({"lr": lr})
            if (iteration + 1) % print_every == 0 or iteration + 1 == total:
                watch.check()
            steps.set(loss=metrics["loss"], lr=lr)
            if table := profiler.step():
                log(table)
            if after_step:
                after_step(watch.check)
    return averager.averages()


class LossWatch:
    """Finds losses that are not finite without waiting for each: they are looked at together, now and then."""

    def __init__(self, epoch: int):
        self.epoch = epoch
        self._seen: list[tuple[dict[str, Tensor], list, int]] = []

    def add(self, metrics: dict[str, Tensor], targets: list, iteration: int) -> None:
        self._seen.append((metrics, [t["image_id"] for t in targets], iteration))

    def check(self) -> None:
        """Raises ValueError for the first loss since the last look that is not finite."""
        if not self._seen:
            return
        losses = torch.stack([metrics["loss"] for metrics, _, _ in self._seen])
        for (metrics, images, iteration), finite in zip(self._seen, torch.isfinite(losses).tolist()):
            if not finite:
                raise ValueError(_not_finite(metrics, images, epoch=self.epoch, iteration=iteration))
        self._seen.clear()


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
        outputs = _predict(network, images, amp)
        averager.update(_losses(criterion, outputs, targets)[1])
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


def _predict(model: nn.Module, images: Any, amp: torch.dtype | None) -> dict[str, Any]:
    """The detector's dict, in float32 at least."""
    if amp is None:
        return model(images)
    with torch.autocast(images.images.device.type, dtype=amp):
        outputs = model(images)
    return _widen(outputs)


def _widen(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _widen(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_widen(part) for part in value]
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _losses(
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


def _not_finite(metrics: dict[str, Tensor], image_ids: list[Tensor], *, epoch: int, iteration: int) -> str:
    terms = {name: value.item() for name, value in metrics.items() if not torch.isfinite(value)}
    bad = [f"{name} = {value}" for name, value in terms.items() if name != "loss" and not name.endswith("_unscaled")]
    return (
        f"the loss is not finite in epoch {epoch}, iteration {iteration}: {', '.join(bad) or 'their sum'}; "
        f"image ids {[int(i) for i in image_ids]}. Try a smaller --lr, and look at these images and their boxes"
    )
