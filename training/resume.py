"""Where a run starts. It is decided once; everything is restored in this order:

1. `find_checkpoint`: the file that `resume` means. With "auto" the main process looks for it, and all take the same.
2. `Source.applied`: what the file decides: the settings of the network and its input, the order of the images.
3. `claim_folder`: another run's files in the output folder are refused or set aside, before anything is written.
4. The weights, into the network, before DistributedDataParallel wraps it and the optimiser refers to its parameters
   (training.run).
5. `plan`: the epoch, and how many of its steps are done. This depends on the number of images.
6. The learning rates, which follow from settings and position alone (training.optim.build_scheduler).
7. `Resume.restore`: optimiser, kept gradients, loss scale, averages, counters, last the sums for the log and the random
   numbers, because everything above may draw some.
8. `Resume.trim_log`: lines of epochs that come again leave the log.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samdetr.datasets.sampler import TrainSampler
from samdetr.models.checkpoints import INPUT_SETTINGS, read_checkpoint
from samdetr.training.checkpoints import NEWEST, CheckpointFolder
from samdetr.training.settings import RunSettings
from samdetr.training.state import TrainingState, check_state
from samdetr.util.checkpoint import check_weights
from samdetr.util.distributed import from_main, get_world_size, is_main
from samdetr.util.logger import log
from samdetr.util.schema import number

# Settings that an evaluation takes from the run that made the file, so that it repeats the figures of that run.
AS_TRAINED = ("batch_size", "pad_to_multiple", "amp")
# Settings of that run which are read, beside those of the network: the rates say how its optimiser's state is grouped.
READ_LATER = (*AS_TRAINED, "lr", "lr_backbone", "lr_linear_proj_names", "lr_linear_proj_mult")

# What the order of images within an epoch follows from, as a checkpoint holds it.
ORDER = {
    "seed": "`seed`",
    "batch": "images per step (processes x `batch_size` x `accumulate`)",
    "buckets": "`size_buckets`",
    "group": "batches of like images (`size_buckets`) of `batch_size`",
}


@dataclass(frozen=True)
class Source:
    """The checkpoint that a run starts from.

    `same_run`: training continues the run whose log and checkpoints are in the output folder. `in_folder`: the file is
    in the output folder, and training starts where it ends.
    """

    path: str  # or URL; "" if there is none
    checkpoint: dict[str, Any] | None  # its content, of `read_checkpoint`
    same_run: bool
    in_folder: bool = False

    def applied(self, settings: RunSettings, given: Mapping[str, Any]) -> RunSettings:
        """The settings with what the checkpoint decides. `given`: values of the flags that the user typed.

        Raises ValueError.
        """
        if not self.checkpoint:
            return settings.replace(resume=self.path)
        saved: dict[str, Any] = {}
        if "sampler" in self.checkpoint:
            order = self.checkpoint["sampler"]
            saved |= {"seed": order["seed"], "size_buckets": order.get("buckets", 0)}
        if settings.run.eval:
            found = self.checkpoint["run_settings"]
            saved |= {name: found[name] for name in AS_TRAINED if name in found}
        saved = {name: value for name, value in saved.items() if name not in given}
        return settings.with_checkpoint(self.checkpoint["settings"], given).replace(**saved, resume=self.path)

    def evaluating_processes(self, given: Mapping[str, Any]) -> int:
        """The number of processes whose batches an evaluation repeats."""
        if not self.checkpoint or "batch_size" in given:
            return get_world_size()
        return self.checkpoint["run_settings"].get("world_size", get_world_size())


@dataclass(frozen=True)
class Resume:
    """Where training starts: at `epoch`, counted from 0, of which `step` steps are done, all if only its evaluation is
    missing. None: the epoch starts from its first step, and random numbers are seeded."""

    source: Source
    epoch: int
    step: int | None

    def restore(self, state: TrainingState) -> bool:
        """Restore everything except weights and learning rates. Returns whether the random numbers are those of the
        checkpoint; otherwise they must be seeded. Raises ValueError."""
        checkpoint, path = self.source.checkpoint, self.source.path
        if not checkpoint:
            return False
        log(f"resuming from {path} at epoch {self.epoch}" + (f", step {self.step}" if self.step else ""))
        if checkpoint.get("ema"):
            check_weights(state.model, checkpoint["ema"]["model"], source=f"{path}: the average of the weights")
        if checkpoint["official"] or "optimizer" not in checkpoint:
            log("the optimiser starts anew: this file has no state of it that fits our parameters")
        else:
            state.restore(checkpoint, source=path)
        if state.ema and not checkpoint.get("ema"):
            log("the average of the weights starts from these: this file has none")
        elif not state.ema and checkpoint.get("ema"):
            log("the average of the weights in this file is left out; `ema` continues it")
        return self.step is not None and state.restore_place(checkpoint, iteration=self.step)

    def trim_log(self, folder: CheckpointFolder | None) -> list[dict[str, Any]]:
        """Remove temporary files of a killed run, and log lines of epochs that come again. Returns the lines that stay
        if this is the same run; the same in every process."""
        if folder and is_main():
            folder.clean()
            if self.source.same_run:
                folder.forget_log(self.epoch)
        return from_main(lambda: folder.logged() if folder and self.source.same_run else [])


def is_auto(resume: str) -> bool:
    return resume == "auto" or resume.startswith("auto:")


def find_checkpoint(settings: RunSettings, given: Mapping[str, Any], folder: CheckpointFolder | None) -> Source:
    """The checkpoint that `resume` means, read. Raises ValueError."""
    resume, evaluate = settings.run.resume, settings.run.eval
    auto = is_auto(resume)
    otherwise = resume.partition(":")[2] if auto else resume
    found = path = None
    if folder and (auto or (not evaluate and _same_file(resume, folder.path / NEWEST))):
        found = folder.newest_good(_read) if is_main() else None
        path = from_main(lambda: str(found[0]) if found else None)
    if path is None and auto and folder:
        if evaluate and not otherwise:
            raise ValueError(f"`resume` auto: no good checkpoint is in {folder.path}; pass a file")
        log(f"no checkpoint in {folder.path} yet; the run starts {f'from {otherwise}' if otherwise else 'afresh'}")
    path = path or otherwise
    follows = "start_epoch" not in given
    if not path:
        return Source(path, None, same_run=auto and follows)
    checkpoint = found[1] if found else _read(path, allow_http=settings.run.allow_http)
    in_folder = follows and folder is not None and Path(path).parent.resolve() == folder.path.resolve()
    # Early files lack the iteration.
    return Source(path, checkpoint, same_run=in_folder and "iteration" in checkpoint, in_folder=in_folder)


def _read(path: str, *, allow_http: bool = False) -> dict[str, Any]:
    """A checkpoint whose values a run can use. Raises ValueError."""
    checkpoint = read_checkpoint(path, allow_http=allow_http)
    check_state(checkpoint, source=path)
    saved = {name: value for name, value in checkpoint["run_settings"].items() if name in READ_LATER}
    inputs = {name: value for name, value in checkpoint["settings"].items() if name in INPUT_SETTINGS}
    try:
        RunSettings.from_flat({**saved, **inputs, "model": checkpoint["settings"]["model"]})
        number(least=1, most=10**6)(checkpoint["run_settings"].get("world_size", 1), "'world_size'")
    except ValueError as error:
        raise ValueError(f"`resume` {path} has settings that no run has: {error}; pass another checkpoint") from None
    return checkpoint


def claim_folder(source: Source, folder: CheckpointFolder, *, overwrite: bool) -> None:
    """Before training writes into the folder: protect another run's files in it. Raises ValueError: there are some, and
    neither does training continue that run nor is `overwrite` given."""

    def claim() -> None:
        names = folder.holds_run()
        if not names or source.same_run or source.in_folder:
            return
        if not overwrite:
            raise ValueError(
                f"`output_dir` {folder.path} holds a run ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}); "
                "pass `resume` auto to continue it, `overwrite` to start anew (its files move to a subfolder), or "
                "another folder"
            )
        log(f"the files of the run in {folder.path} are now in {folder.set_aside()}")

    from_main(claim)


def plan(
    source: Source,
    settings: RunSettings,
    given: Mapping[str, Any],
    *,
    sampler: TrainSampler,
    folder: CheckpointFolder | None,
) -> Resume:
    """The position to train from.

    Raises:
        ValueError: the checkpoint is inside an epoch, and these settings have another order of images or batch.
    """
    checkpoint = source.checkpoint
    if not checkpoint or "epoch" not in checkpoint or "start_epoch" in given:
        return Resume(source, settings.run.start_epoch, None)
    epoch, step, order = checkpoint["epoch"], checkpoint.get("iteration"), checkpoint.get("sampler", {})
    if step is None or order["position"] + order["batch"] > sampler.length:  # the epoch is complete
        # Except for its log line, if the same run was interrupted while it evaluated.
        unlogged = from_main(lambda: folder is not None and source.same_run and not folder.has_logged(epoch))
        if unlogged and step is not None:
            return Resume(source, epoch, sampler.steps)
        return Resume(source, epoch + 1, None)
    grouped = {"buckets": 0, "group": settings.optimisation.batch_size}
    here = {"seed": sampler.seed, "batch": sampler.batch, **grouped, **sampler.grouping}
    there = {**grouped, **order}
    for name, what in ORDER.items():
        if there[name] != here[name]:
            raise ValueError(
                f"{source.path} is in the middle of epoch {epoch} of a run with {what} {there[name]}, here "
                f"{here[name]}: resume with the same, or from a checkpoint at the end of an epoch"
            )
    return Resume(source, epoch, step)


def _same_file(one: str, other: Path) -> bool:
    return other.exists() and os.path.exists(one) and os.path.samefile(one, other)
