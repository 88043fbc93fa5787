"""The training loop: epochs, checkpoints, evaluation, the log; how a run goes on, and how it ends early."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from samdetr.engine import train_one_epoch
from samdetr.training.checkpoints import CheckpointFolder
from samdetr.training.cluster.preemption import PREEMPTED, Signals, Stopped, Votes, Wish
from samdetr.training.state import TrainingState
from samdetr.util.curves import plot_training_curves
from samdetr.util.distributed import barrier, get_rank, is_main
from samdetr.util.logger import MetricAverager, log, read_json_lines, write_json


def average_precision(line: dict[str, Any]) -> float | None:
    """What a line of the log says the AP is: that of averaged weights where there are some; None without any."""
    figures = line.get("test_ema_coco_eval_bbox") or line.get("test_coco_eval_bbox")
    return figures[0] if figures else None


class Trainer:
    """Trains from where `state` is to the last epoch, as `train_one_epoch` does each.

    Args:
        evaluate: figures of the network as it is now, for the log; every process comes here.
        folder: where checkpoints and the log go; None: nowhere.
        signals: asks whether the run is to make room for others.
        watched: wraps the loader, so that others see how far it is.
        options: further arguments of `train_one_epoch`.
        patience: evaluations in a row without a higher AP that end the training; 0: none do.
        earlier: lines of the log that this run has written before.
        save_every_epoch: epochs between two checkpoints that are named by their epoch alone.
        save_every_iterations, save_every_minutes: between two others; 0: none.
        wish: what this process wants after a step, beside what signals and the clock want.
    """

    def __init__(
        self,
        *,
        state: TrainingState,
        model: nn.Module,
        loader: DataLoader,
        evaluate: Callable[[], dict[str, Any]],
        folder: CheckpointFolder | None,
        signals: Signals,
        watched: Callable[[DataLoader], Iterable] = lambda loader: loader,
        options: dict[str, Any],
        epochs: int,
        eval_every_epoch: int,
        save_every_epoch: int,
        patience: int = 0,
        earlier: Sequence[dict[str, Any]] = (),
        save_every_iterations: int = 0,
        save_every_minutes: float = 0,
        wish: Callable[[], Wish] = lambda: Wish.GO_ON,
    ) -> None:
        self.state, self.model, self.loader, self.evaluate = state, model, loader, evaluate
        self.folder, self.signals, self.options = folder, signals, options
        self.epochs, self.eval_every_epoch, self.save_every_epoch = epochs, eval_every_epoch, save_every_epoch
        self.save_every_iterations, self.save_every_minutes = save_every_iterations, save_every_minutes
        self.wish, self.watched = wish, watched
        self.patience = patience
        self.history = [ap for ap in map(average_precision, earlier) if ap is not None]
        self.votes = Votes()
        self.saved_at = time.monotonic()

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return self.loader.sampler.steps

    def run(self, *, random_numbers_go_on: bool = False, after_epoch: Callable[[], None] = lambda: None) -> None:
        """Raises Stopped after a checkpoint, where a signal or a wish ended the run early.

        Args:
            random_numbers_go_on: from where they are, in the first epoch, as `restore_place` told.
            after_epoch: called between an epoch's training and its evaluation.
        """
        state = self.state
        start = time.time()
        self.saved_at = time.monotonic()
        n_parameters = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
        for epoch in range(state.epoch, self.epochs):
            if self._lost_patience():
                break
            if epoch > state.epoch:
                state.epoch, state.iteration, state.averager = epoch, 0, MetricAverager()
            if not random_numbers_go_on:
                # Each epoch draws its own numbers, so that a run that is resumed at its start goes on as if never
                # interrupted; in the middle of one, where other processes go on, others than from its start.
                torch.manual_seed(state.seed + get_rank() + 1_000_003 * epoch + 7_919 * state.iteration)
            random_numbers_go_on = False
            self.loader.sampler.set_epoch(epoch, state.iteration)
            self.loader.dataset.set_epoch(epoch)
            train_stats = train_one_epoch(
                model=self.model,
                loader=self.watched(self.loader),
                optimizer=state.optimizer,
                scheduler=state.scheduler,
                scaler=state.scaler,
                epoch=epoch,
                start=state.iteration,
                averager=state.averager,
                after_step=self._after_step,
                zero_grad=not state.keep_gradients,
                **self.options,
            )
            after_epoch()
            self._act(self.votes.result())
            line = {f"train_{name}": value for name, value in train_stats.items()}
            if (epoch + 1) % self.eval_every_epoch == 0 or epoch + 1 == self.epochs:
                # The checkpoint of this epoch is there, and a run that goes on from it evaluates.
                with self.signals.nothing_to_save() if self.folder else nullcontext():
                    line |= {f"test_{name}": value for name, value in self.evaluate().items()}
                ap = average_precision(line)
                if self.folder and is_main() and ap > max(self.history, default=-math.inf):
                    # Before the log tells of it: a run that is killed here evaluates, and comes here, again.
                    self.folder.keep_best()
                self.history.append(ap)
            if self.folder and is_main():
                with self.folder.writing() as folder:
                    self.folder.append_log({**line, "epoch": epoch, "n_parameters": n_parameters})
                    plot_training_curves(read_json_lines(folder / "log.txt"), folder / "curves.png")
        log(f"training took {timedelta(seconds=round(time.time() - start))}")

    def _lost_patience(self) -> bool:
        if not self.patience or not self.history:
            return False
        best = max(self.history)
        since = len(self.history) - 1 - self.history.index(best)
        if since >= self.patience:
            log(f"stopped by --patience {self.patience}: no AP of the last {since} evaluations is above {best:.4f}")
        return since >= self.patience

    def save(self) -> None:
        """Write a checkpoint. Every process has to come here."""
        state = self.state
        if not self.folder:
            return
        content = state.capture()
        if is_main():
            with self.folder.writing() as folder:
                write_json(folder / "settings.json", state.facts["settings"])
            whole = state.iteration == self.steps and (state.epoch + 1) % self.save_every_epoch == 0
            self.folder.save(content, epoch=state.epoch, iteration=None if whole else state.iteration)
        self.saved_at = time.monotonic()

    def _after_step(self, check: Callable[[], None]) -> None:
        state = self.state
        state.iteration += 1
        state.samples_seen += state.batch
        every = self.save_every_iterations
        due = state.iteration == self.steps or (every and state.iteration % every == 0)
        if due:
            check()
            self.save()

        def act(wish: Wish) -> None:
            if wish > Wish.GO_ON and not due:
                check()
                self.save()
            self._act(wish)

        self.votes.agree(self._wish, act)

    def _act(self, wish: Wish) -> None:
        if wish < Wish.FINISH:
            return
        barrier()  # where one process ends, the launcher may end the others: not before the checkpoint is written
        log(f"stopped after step {self.state.iteration} of epoch {self.state.epoch}; --resume auto goes on from there")
        raise Stopped(PREEMPTED if wish == Wish.PREEMPT else 0)

    def _wish(self) -> Wish:
        """Of this process."""
        late = self.save_every_minutes and time.monotonic() - self.saved_at >= 60 * self.save_every_minutes
        return max(
            Wish.PREEMPT if self.signals.received else Wish.GO_ON, Wish.SAVE if late else Wish.GO_ON, self.wish()
        )
