"""The training loop: epochs, checkpoints, evaluation, the log; how a run ends early."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch

from samdetr.engine import train_one_epoch
from samdetr.training import judge, learning_rate, overfit, replay
from samdetr.training.about import about
from samdetr.training.checkpoints import BEST, TIMES
from samdetr.training.cluster.preemption import INTERRUPTED, PREEMPTED, Request, Signals, Stopped, Votes
from samdetr.training.cluster.wall_clock import WallClock
from samdetr.training.console import epoch_line, start_block
from samdetr.training.ema import WeightAverage
from samdetr.training.guard import BadSteps
from samdetr.training.optim import build_scheduler
from samdetr.training.profiler import StepProfiler
from samdetr.training.resume import Resume, plan
from samdetr.training.run import Parts, build_optimizer
from samdetr.training.runs import average_precision, coco_metrics
from samdetr.training.state import TrainingState
from samdetr.training.trackers import Trackers
from samdetr.training.update import Update
from samdetr.training.validation_pictures import validation_pictures
from samdetr.util.curves import plot_training_curves
from samdetr.util.device import peak_memory
from samdetr.util.distributed import barrier, get_rank, get_world_size, is_main
from samdetr.util.files import read_json_lines, write_json
from samdetr.util.logger import MetricAverager, log
from samdetr.util.sections import timed_by
from samdetr.util.targets import TargetBatch


def train(parts: Parts, given: Mapping[str, Any], signals: Signals) -> int:
    """Train to the last epoch. `given` are the values of the flags that the user typed.

    Returns the exit status: 0, except that of `overfit`.

    Raises:
        Stopped: the run ended early, after a checkpoint.
        ValueError: a checkpoint that cannot be resumed, or too many bad steps in a row.
    """
    settings, data = parts.settings, parts.data.train
    assert data is not None
    resume = plan(parts.source, settings, given, sampler=data.sampler, folder=parts.folder)
    update = build_update(parts, resume, steps=data.sampler.steps)
    hours = settings.run.max_hours
    clock = WallClock(hours=hours) if hours else None
    saved_settings = parts.saved_settings(settings.replace(start_epoch=resume.epoch))
    state = TrainingState(
        model=parts.network,
        optimizer=update.optimizer,
        scheduler=update.scheduler,
        scaler=update.scaler,
        keep_gradients=update.keep_gradients,
        ema=update.average,
        extras={"bad_steps": update.guard, **({"clock": clock} if clock else {})},
        seed=settings.run.seed,
        batch=data.sampler.batch,
        grouping=data.sampler.grouping,
        facts={"settings": saved_settings, "categories": parts.data.categories.to_list()},
        epoch=resume.epoch,
    )
    log(start_block(parts, resume))
    if not settings.optimisation.scale_lr and (line := learning_rate.warning(settings, get_world_size())):
        log(line)
    same_random_numbers = resume.restore(state)
    earlier = resume.trim_log(parts.folder)
    if resume.epoch >= settings.optimisation.epochs:
        log(f"nothing to do up to `epochs` {settings.optimisation.epochs}; `start_epoch` 0 starts over")
    if clock and clock.is_up:
        log(f"`max_hours` {hours} are used up ({clock.seconds / 3600:.2f}); a larger number continues")
        return 0
    done = {"step": resume.epoch * data.sampler.steps + (resume.step or 0), "epoch": resume.epoch * data.sampler.steps}
    folder = parts.folder.path if parts.folder and is_main() else None
    run = settings.run
    trackers = Trackers(folder, run.track, last=done, settings=saved_settings, every=run.print_every)
    trainer = Trainer(parts, state, update, signals, clock, earlier, trackers)
    if name := settings.run.compare:
        classes = len(parts.data.categories.names)
        log(judge.introduction(settings, name=name, images_per_step=data.sampler.batch, classes=classes))
    try:
        trainer.run(same_random_numbers=same_random_numbers)
    except BadSteps as error:
        text = replay.keep(
            error, state=state, criterion=parts.criterion, device=parts.device, amp=parts.amp, folder=parts.folder
        )
        raise ValueError(text) from None
    finally:
        trackers.close()
    if not settings.run.overfit:
        return 0
    log(overfit.verdict(settings, trainer.metrics, (state.epoch + 1) * data.sampler.steps))
    return 0 if overfit.is_enough(trainer.metrics) else 1


def build_update(parts: Parts, resume: Resume, *, steps: int) -> Update:
    """What makes steps, at the position where training starts; an epoch has `steps`. Raises ValueError."""
    settings, network, device = parts.settings.optimisation, parts.network, parts.device
    optimizer = build_optimizer(network, parts.settings, device)
    scheduler = build_scheduler(
        optimizer,
        schedule=settings.lr_schedule,
        total_steps=settings.epochs * steps,
        drop_step=settings.lr_drop * steps,
        warmup_steps=settings.warmup_iters,
        first_step=resume.epoch * steps + (resume.step or 0),
    )
    amp, profile = parts.settings.speed.amp, parts.settings.speed.profile
    return Update(
        network,
        optimizer,
        scheduler,
        clip_max_norm=settings.clip_max_norm,
        max_bad_steps=settings.max_bad_steps,
        keep_gradients=settings.legacy_no_zero_grad and amp == "off",  # with --amp the published loop zeroes them
        scaler=torch.amp.GradScaler(device.type) if amp == "fp16" else None,
        average=WeightAverage(network, decay=settings.ema) if settings.ema else None,
        profiler=StepProfiler(steps=profile, device=device) if profile else None,
    )


def compiled_graphs() -> int:
    """How often torch.compile compiled. After 8 times for one piece of code it stops, and the rest runs uncompiled."""
    from torch._dynamo.utils import counters  # takes seconds to import

    return counters["stats"]["unique_graphs"]


class Trainer:
    """Trains from the position of `state` to the last epoch. `earlier` are the lines that the log has already."""

    def __init__(
        self,
        parts: Parts,
        state: TrainingState,
        update: Update,
        signals: Signals,
        clock: WallClock | None,
        earlier: Sequence[dict[str, Any]],
        trackers: Trackers,
    ) -> None:
        assert parts.data.train is not None
        self.trackers = trackers
        self.parts, self.state, self.update, self.signals, self.clock = parts, state, update, signals, clock
        self.folder, self.data, self.settings = parts.folder, parts.data.train, parts.settings.run
        self.history = [(line["epoch"], ap) for line in earlier if (ap := average_precision(line)) is not None]
        self.votes = Votes()
        self.saved_at = time.monotonic()
        self.about = about(device=parts.device, data=parts.settings.data) if self.folder and is_main() else {}
        self.metrics: list[float] | None = None  # of the last evaluation
        self._arrived = 0  # batches of this epoch
        self._tables = ""  # of the last evaluation
        # Images and seconds of this epoch, since it started or was resumed.
        self._spent: dict[str, float] = defaultdict(lambda: 0)

    def run(self, *, same_random_numbers: bool) -> None:
        """Train. The first epoch is not seeded if its random numbers were restored.

        Raises Stopped: a request ended the run early, after a checkpoint.
        """
        state, epochs = self.state, self.parts.settings.optimisation.epochs
        first, start = state.epoch, time.monotonic()
        self.saved_at = start
        for epoch in range(first, epochs):
            if self._lost_patience() or (self.settings.overfit and overfit.is_enough(self.metrics)):
                break
            if epoch > first:
                state.epoch, state.iteration, state.averager = epoch, 0, MetricAverager()
            self._spent.clear()
            if not same_random_numbers:
                # Reseed per epoch, so that resuming between epochs is exact. Resuming inside an epoch with another
                # number of processes cannot be exact; mix in the iteration, so that no draws are repeated.
                torch.manual_seed(state.seed + get_rank() + 1_000_003 * epoch + 7_919 * state.iteration)
            same_random_numbers = False
            try:
                line: dict[str, Any] = {f"train_{name}": value for name, value in self._train_one_epoch().items()}
                self._act(self.votes.result())
                if (epoch + 1) % self.settings.eval_every_epoch == 0 or epoch + 1 == epochs:
                    line |= self._evaluate()
                    self.metrics = coco_metrics(line)
            except Stopped:
                self._write_times()
                raise
            self._write_log(line)
            seconds = (time.monotonic() - start) / (epoch + 1 - first) * (epochs - epoch - 1)
            best, where = self._best(), self.folder.path / BEST if self.folder else None
            log(epoch_line(line, metrics=coco_metrics(line), best=best, where=where, epoch=epoch, seconds_left=seconds))
            if name := self.settings.compare:
                ap = average_precision(line)
                for text in judge.verdict(line if ap is None else {**line, "AP": ap}, epoch, name=name):
                    log(text)
        log(f"{self._tables}training took {timedelta(seconds=round(time.monotonic() - start))}")

    def _train_one_epoch(self) -> dict[str, float]:
        parts, state = self.parts, self.state
        self.data.sampler.set_epoch(state.epoch, state.iteration)
        self.data.images.set_epoch(state.epoch)
        self._arrived = 0
        parts.watchdog.begin_round()
        profiler = self.update.profiler
        with self._timed("train"), timed_by(profiler.section) if profiler else nullcontext():
            metrics = train_one_epoch(
                model=parts.model, criterion=parts.criterion, loader=self.data.loader, update=self.update,
                device=parts.device, epoch=state.epoch, start=state.iteration,
                accumulate=parts.settings.optimisation.accumulate, amp=parts.amp, averager=state.averager,
                on_batch=self._on_batch, on_metrics=self._on_metrics, after_step=self._after_step,
                print_every=self.settings.print_every,
            )  # fmt: skip
        if parts.settings.speed.compile:
            log(f"torch.compile: {compiled_graphs()} graphs so far")
        return metrics

    def _evaluate(self) -> dict[str, Any]:
        """Evaluate after an epoch, and keep its checkpoint if it is the best. Returns what the log gets."""
        # This epoch's checkpoint is already saved; if we are killed here, the resumed run evaluates first.
        with self._timed("test"), self.signals.nothing_to_save():
            line = {f"test_{name}": value for name, value in self._metrics().items()}
        ap, best = average_precision(line), self._best()
        if ap is None:
            return line
        if self.folder and is_main() and (best is None or ap > best[1]):
            # Before writing the log line, so that a crash in between repeats this step.
            self.folder.keep_best()
        self.history.append((self.state.epoch, ap))
        return line

    def _write_log(self, line: dict[str, Any]) -> None:
        if self.folder and is_main():
            n_parameters = sum(weight.numel() for weight in self.update.weights)
            with self.folder.writing() as folder:
                self.folder.append_log({**line, "epoch": self.state.epoch, "n_parameters": n_parameters})
                plot_training_curves(read_json_lines(folder / "log.txt"), folder / "curves.png")
        self._write_times()
        self.trackers.epoch(self._step, line)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Count the seconds of a part, "train" or "test", also if it ends early."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._spent[f"{part}_seconds"] += time.monotonic() - start

    def _write_times(self) -> None:
        """Not into the log, which is the same for a resumed run."""
        if self.folder and is_main() and self._spent:
            spent = {name: round(value, 3) for name, value in self._spent.items()}
            line = {"epoch": self.state.epoch, **spent, "peak_mib": peak_memory(self.parts.device)}
            self.folder.append_log(line, name=TIMES)

    def _metrics(self) -> dict[str, Any]:
        """Metrics of the network, and of the averaged weights if any."""
        metrics, evaluator = self.parts.evaluate()
        self._tables = f"{evaluator.table()}\n"
        if self.update.average:
            with self.update.average.in_place():
                averaged, evaluator = self.parts.evaluate()
            metrics |= {f"ema_{name}": value for name, value in averaged.items()}
            self._tables += f"and with averaged weights:\n{evaluator.table()}\n"
        self._spent["test_images"] += len(self.parts.data.val_images) * (2 if self.update.average else 1)
        if self.trackers.on:
            self.trackers.draw(self._step, validation_pictures(self.parts.data.val_images, evaluator.detections))
        if self.settings.verbose:
            log(self._tables.rstrip())
            self._tables = ""
        return metrics

    def _best(self) -> tuple[int, float] | None:
        """Epoch and AP of the best evaluation so far, the first of equal ones."""
        return max(self.history, key=lambda one: one[1]) if self.history else None

    def _on_batch(self, targets: TargetBatch | None) -> None:
        self.parts.watchdog.on_batch(targets)
        if targets is not None:
            self._arrived += 1
            self.data.bad_images.note(targets.unreadable, last=self._arrived == len(self.data.loader))

    def _lost_patience(self) -> bool:
        patience, best = self.settings.patience, self._best()
        if not patience or not best:
            return False
        since = len(self.history) - 1 - self.history.index(best)
        if since >= patience:
            log(f"stopped by `patience` {patience}: no AP of the last {since} evaluations is above {best[1]:.4f}")
        return since >= patience

    def save(self) -> None:
        """Write a checkpoint, once the last step is known to be good or skipped. Every process must call this."""
        self.update.check()
        state = self.state
        if not self.folder:
            return
        self.trackers.flush()
        content = state.capture()
        if is_main():
            with self.folder.writing() as folder:
                write_json(folder / "settings.json", {**state.facts["settings"], "about": self.about})
            every = self.settings.save_every_epoch
            whole = state.iteration == self.data.sampler.steps and (state.epoch + 1) % every == 0
            self.folder.save(content, epoch=state.epoch, iteration=None if whole else state.iteration)
        self.saved_at = time.monotonic()

    @property
    def _step(self) -> int:
        """Steps since the start of the first epoch."""
        return self.state.epoch * self.data.sampler.steps + self.state.iteration

    def _on_metrics(self, metrics: Sequence[Mapping[str, Any]]) -> None:
        self.trackers.step(self._step + 1, metrics)

    def _after_step(self) -> None:
        state = self.state
        state.iteration += 1
        state.samples_seen += state.batch
        self._spent["train_images"] += state.batch
        every = self.settings.save_every_iterations
        due = state.iteration == self.data.sampler.steps or (every and state.iteration % every == 0)
        if due:
            self.save()

        def act(request: Request) -> None:
            if request > Request.CONTINUE and not due:
                self.save()
            self._act(request)

        self.votes.agree(self._request, act)

    def _request(self) -> Request:
        """What this process asks for after a step."""
        minutes = self.settings.save_every_minutes
        late = minutes and time.monotonic() - self.saved_at >= 60 * minutes
        hours = self.clock.request() if self.clock else Request.CONTINUE
        return max(self.signals.request(), hours, Request.SAVE if late else Request.CONTINUE)

    def _act(self, request: Request) -> None:
        if request < Request.FINISH:
            return
        barrier()  # once one process ends, the launcher may end the others: the checkpoint must be written before
        log(f"stopped after step {self.state.iteration} of epoch {self.state.epoch}; `resume` auto resumes there")
        raise Stopped({Request.PREEMPT: PREEMPTED, Request.INTERRUPT: INTERRUPTED}.get(request, 0))
