"""Train or evaluate a detector.

python main.py --coco_path data/coco --output_dir output/run
torchrun --nproc_per_node=4 main.py --batch_size 4 --smca --epochs 12 --lr_drop 10 --output_dir output/run
python main.py --coco_path data/coco --resume output/run/checkpoint.pth --eval
python main.py --replay output/run/replay.pth
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from samdetr.cli import CommandLine, parse
from samdetr.datasets.bad_images import BadImages
from samdetr.datasets.build import build_dataset, collate, start_report
from samdetr.datasets.categories import COCO, Categories
from samdetr.datasets.coco_eval import CocoEvaluator
from samdetr.datasets.sampler import DistributedEvalSampler, TrainSampler
from samdetr.engine import evaluate
from samdetr.models.build import build_model
from samdetr.models.checkpoints import chosen_weights, load_backbone_weights, read_checkpoint
from samdetr.training import replay
from samdetr.training.checkpoints import NEWEST, CheckpointFolder
from samdetr.training.cluster.preemption import PREEMPTED, Signals, Stopped, Wish, end_now, shield_worker
from samdetr.training.cluster.wall_clock import WallClock
from samdetr.training.cluster.watchdog import Watchdog
from samdetr.training.ema import WeightAverage
from samdetr.training.guard import BadSteps, StepGuard
from samdetr.training.loop import Trainer
from samdetr.training.optim import build_scheduler, parameter_groups
from samdetr.training.profiler import StepProfiler
from samdetr.training.settings import RunSettings
from samdetr.training.state import TrainingState
from samdetr.util.checkpoint import load_weights
from samdetr.util.command_line import run_command
from samdetr.util.distributed import (
    all_gather_object,
    get_rank,
    get_world_size,
    init_distributed,
    is_main,
    main_process_first,
    shutdown,
)
from samdetr.util.logger import log, write_json

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_settings(args: argparse.Namespace) -> None:
    """Refuse values that no run can use, before anything is read or written. Raises ValueError."""
    if args.eval and not args.resume:
        raise ValueError("`eval` needs a model: pass `resume` CHECKPOINT")
    if is_auto(args.resume) and not args.output_dir:
        raise ValueError("`resume` auto looks for checkpoints in `output_dir`: pass the folder")
    if args.output_dir and not _can_be_written(Path(args.output_dir)):
        raise ValueError(f"`output_dir` {args.output_dir} is not a folder that can be written to")


def _can_be_written(folder: Path) -> bool:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def choose_device(name: str) -> torch.device:
    """Raises ValueError for a device that is not here. Touches no GPU: each process must choose its own first."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise ValueError(f"--device {name} is no device; leave it out, or pass cpu or cuda") from None
    here = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= here.get(device.type, 0):
        raise ValueError(f"--device {name} is not here ({torch.cuda.device_count()} GPUs); leave it out or pass cpu")
    return device


def set_arithmetic(*, tf32: bool, deterministic: bool) -> None:
    """For the whole process. PyTorch's own default lets convolutions use TF32 and products not."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
    torch.use_deterministic_algorithms(deterministic)


def of(args: argparse.Namespace) -> RunSettings:
    return RunSettings.from_flat(vars(args))


def checkpoint_categories(checkpoint: dict[str, Any]) -> Categories | None:
    """The classes that a checkpoint was trained for; official files have none, but those of COCO are known."""
    num_classes = checkpoint["settings"].get("num_classes")
    if "categories" in checkpoint:
        return Categories.from_list(checkpoint["categories"], num_classes=num_classes)
    return COCO if checkpoint["official"] and num_classes == COCO.num_classes else None


def build_loaders(args: argparse.Namespace, train_set, val_set) -> tuple[DataLoader | None, DataLoader]:
    """Batches for training (None without a training set; incomplete last ones dropped, as published) and evaluation."""
    options = {
        "collate_fn": partial(collate, multiple=args.pad_to_multiple),
        "num_workers": args.num_workers,
        "persistent_workers": args.num_workers > 0,  # started once, not anew for each epoch
        "pin_memory": torch.cuda.is_available(),
        "worker_init_fn": shield_worker,
        # A loader draws a number when its workers start, which in a resumed run is another epoch: not from the numbers
        # that the network's dropout draws.
        "generator": torch.Generator(),
    }
    order = DistributedEvalSampler(length=len(val_set), rank=get_rank(), world_size=get_world_size())
    val_loader = DataLoader(val_set, args.batch_size, sampler=order, **options)
    if train_set is None:
        return None, val_loader
    if len(train_set) < args.batch_size * args.accumulate * get_world_size():
        times = f" --accumulate {args.accumulate}" if args.accumulate > 1 else ""
        raise ValueError(
            f"--batch_size {args.batch_size}{times} in {get_world_size()} process(es) is more than the "
            f"{len(train_set)} training images; make it smaller"
        )
    order = TrainSampler(
        length=len(train_set),
        batch=args.batch_size * args.accumulate * get_world_size(),
        rank=get_rank(),
        world_size=get_world_size(),
        seed=args.seed,
    )
    return DataLoader(train_set, args.batch_size, sampler=order, **options), val_loader


def compiled_graphs() -> int:
    """How often torch.compile compiled; it stops, and runs uncompiled what is left, at 8 for one piece of code."""
    from torch._dynamo.utils import counters  # takes seconds to import

    return counters["stats"]["unique_graphs"]


@dataclass(frozen=True)
class Run:
    """The parts of a run that both training and evaluation need."""

    args: argparse.Namespace
    given: set[str]
    device: torch.device
    checkpoint: dict[str, Any] | None
    network: nn.Module
    model: nn.Module  # the network, or DDP around it
    criterion: nn.Module
    postprocess: Callable[..., Any]
    categories: Categories
    train_loader: DataLoader | None
    bad_images: BadImages | None
    val_loader: DataLoader
    folder: CheckpointFolder | None
    watchdog: Watchdog
    own: bool  # whether training goes on with the run whose log and checkpoints are in the folder

    @property
    def settings(self) -> dict[str, Any]:
        return {**vars(self.args), "world_size": get_world_size()}

    def evaluate(self) -> tuple[dict[str, Any], CocoEvaluator]:
        """Figures of the network as it is, and what holds the detections."""
        evaluator = CocoEvaluator(self.val_loader.dataset.ground_truth, self.categories)
        stats = evaluate(
            model=self.model,
            criterion=self.criterion,
            postprocess=self.postprocess,
            loader=self.watchdog.watched(self.val_loader),
            evaluator=evaluator,
            device=self.device,
            amp=AMP[self.args.amp],
            print_every=self.args.print_every,
        )
        log(evaluator.table())
        return stats, evaluator


def place(network: nn.Module, args: argparse.Namespace, device: torch.device) -> None:
    """Put the network where it computes."""
    network.to(device)
    if args.channels_last or (args.channels_last is None and device.type == "cpu"):
        network.to(memory_format=torch.channels_last)  # convolutions run faster so; a step of the quick start by 15 %


def open_checkpoint(args: argparse.Namespace, folder: CheckpointFolder | None) -> dict[str, Any] | None:
    """What --resume says, read; `args.resume` becomes the file, or empty where "auto" finds none. Raises ValueError."""
    auto, otherwise = is_auto(args.resume), args.resume.partition(":")[2] if is_auto(args.resume) else args.resume
    newest = folder and folder.path / NEWEST
    found = path = None
    if auto or (not args.eval and newest and same_file(args.resume, newest)):
        # The main process looks, so that all processes take the same file.
        found = folder.newest_good(read_checkpoint) if is_main() else None
        path = all_gather_object(found and str(found[0]))[0]
    if path is None and auto:
        if args.eval and not otherwise:
            raise ValueError(f"--resume auto: no good checkpoint is in {folder.path}; pass a file")
        log(f"no checkpoint in {folder.path} yet; the run starts {f'from {otherwise}' if otherwise else 'afresh'}")
    args.resume = path or otherwise
    if not args.resume:
        return None
    return found[1] if found else read_checkpoint(args.resume)


def is_auto(resume: str) -> bool:
    return resume == "auto" or resume.startswith("auto:")


def same_file(one: str, other: Path) -> bool:
    return other.exists() and os.path.exists(one) and os.path.samefile(one, other)


def build(args: argparse.Namespace, given: set[str], watchdog: Watchdog) -> Run:
    """Data, network and losses, with the weights that the run starts from. Raises ValueError."""
    device = choose_device(args.device)
    folder = CheckpointFolder(args.output_dir, keep=args.keep) if args.output_dir else None
    own = is_auto(args.resume)
    checkpoint = open_checkpoint(args, folder)
    if checkpoint:
        own = "iteration" in checkpoint and folder and Path(args.resume).parent.resolve() == folder.path.resolve()
    own = bool(own) and "start_epoch" not in given
    categories = None
    if checkpoint:
        named = {name: getattr(args, name) for name in given}
        vars(args).update(of(args).with_checkpoint(checkpoint["settings"], named).flat())
        categories = checkpoint_categories(checkpoint)
        if "sampler" in checkpoint and "seed" not in given:
            args.seed = checkpoint["sampler"]["seed"]  # the order of the images goes on
    of(args).check_family(dict.fromkeys(given))
    train_set = None if args.eval else build_dataset("train", args, categories)
    categories = categories or (train_set.categories if train_set else None)
    val_set = build_dataset("val", args, categories)
    categories = categories or val_set.categories
    for line in start_report(train_set, val_set):
        log(line)
    bad_images = None
    if train_set:
        bad_images = BadImages(
            train_set, largest_share=args.max_bad_images, folder=folder and folder.path, every=args.print_every
        )
    if not checkpoint:
        args.num_classes = categories.num_classes
    elif categories.num_classes > args.num_classes:
        raise ValueError(
            f"{args.resume} has {args.num_classes} classes, but labels at {args.coco_path} go up to "
            f"{categories.num_classes - 1}; use the data set that it was trained for"
        )
    train_loader, val_loader = build_loaders(args, train_set, val_set)

    vars(args).update(of(args).with_resolved_norm().flat())
    settings = of(args)
    network, criterion, postprocess = build_model(settings.trunk, settings.family, settings.loss)
    if not args.lr_backbone:
        network.backbone.requires_grad_(False)
    if checkpoint:
        weights = chosen_weights(checkpoint, raw=args.raw_weights or not args.eval)
        if weights is not checkpoint["model"]:
            log("these are averaged weights (--ema); --raw_weights takes those that were trained")
        load_weights(network, weights, source=args.resume)
    else:
        with main_process_first():
            load_backbone_weights(network, args.backbone_weights)
        if args.backbone_weights == "none" and args.backbone_norm == "frozen":
            log("note: a random backbone whose norms and first stage stay frozen; --backbone_norm learned trains them")
    place(network, args, device)
    if args.compile:
        network.compile(dynamic=True)
    n_parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    log(f"{n_parameters:,} trainable parameters; {get_world_size()} process(es) on {device.type}")
    model: nn.Module = network
    if get_world_size() > 1:
        # Without auxiliary losses the heads of the earlier layers get no gradient.
        model = nn.parallel.DistributedDataParallel(
            network,
            find_unused_parameters=not args.aux_loss,
            broadcast_buffers=args.backbone_norm == "learned",  # frozen norms never differ
        )
    return Run(
        args=args,
        given=given,
        device=device,
        checkpoint=checkpoint,
        network=network,
        model=model,
        criterion=criterion,
        postprocess=postprocess,
        categories=categories,
        train_loader=train_loader,
        bad_images=bad_images,
        val_loader=val_loader,
        folder=folder,
        watchdog=watchdog,
        own=own,
    )


def write_evaluation(run: Run) -> None:
    """--eval: show the figures, and write them and the detections."""
    stats, evaluator = run.evaluate()
    if run.folder and is_main():
        with run.folder.writing() as output:
            write_json(output / "detections.json", evaluator.results, indent=None)
            write_json(output / "eval.json", {**stats, "resume": run.args.resume, "settings": run.settings})
        log(f"detections and figures are in {run.folder.path}")


def starting_point(run: Run, sampler: TrainSampler) -> tuple[int, int | None]:
    """The epoch to go on with, and the steps of it that are done: None where it starts as if all before were another
    run's. Raises ValueError for a checkpoint within an epoch that these settings cannot go on in."""
    args, checkpoint = run.args, run.checkpoint
    if not checkpoint or "epoch" not in checkpoint or "start_epoch" in run.given:
        return args.start_epoch, None
    epoch, done, order = checkpoint["epoch"], checkpoint.get("iteration"), checkpoint.get("sampler")
    if done is None or order["position"] + order["batch"] > len(run.train_loader.dataset):  # the epoch is through
        # Only its log line may be missing, if this is the same run.
        if run.own and done is not None and not run.folder.has_logged(epoch):
            return epoch, sampler.steps
        return epoch + 1, None
    for flag, here in (("seed", sampler.seed), ("batch", sampler.batch)):
        if order[flag] != here:
            what = "--seed" if flag == "seed" else "images a step (processes x --batch_size x --accumulate)"
            raise ValueError(
                f"{args.resume} lies in the middle of epoch {epoch} of a run with {what} {order[flag]}, here {here}: "
                "go on with the same, or from a checkpoint at an epoch's end"
            )
    return epoch, done


def build_optimizer(network: nn.Module, args: argparse.Namespace, device: torch.device) -> torch.optim.Optimizer:
    groups = parameter_groups(
        network,
        lr=args.lr,
        lr_backbone=args.lr_backbone,
        lr_linear_proj_names=args.lr_linear_proj_names,
        lr_linear_proj_mult=args.lr_linear_proj_mult,
    )
    return torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay, fused=device.type in ("cpu", "cuda"))


def train(run: Run, signals: Signals) -> None:
    """Train to the last epoch. Raises Stopped where the run ends early, ValueError."""
    args, network, checkpoint, sampler = run.args, run.network, run.checkpoint, run.train_loader.sampler
    optimizer = build_optimizer(network, args, run.device)
    epoch, done = starting_point(run, sampler)
    args.start_epoch = epoch
    scheduler = build_scheduler(
        optimizer,
        schedule=args.lr_schedule,
        total_steps=args.epochs * sampler.steps,
        drop_step=args.lr_drop * sampler.steps,
        warmup_steps=args.warmup_iters,
        first_step=epoch * sampler.steps + (done or 0),
    )
    keep_gradients = args.legacy_no_zero_grad and args.amp == "off"  # with --amp the published loop zeroes them, too
    guard = StepGuard(network, device=run.device, limit=args.max_bad_steps, keep_gradients=keep_gradients)
    average = WeightAverage(network, decay=args.ema) if args.ema else None
    clock = WallClock(hours=args.max_hours) if args.max_hours else None
    state = TrainingState(
        model=network,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=torch.amp.GradScaler(run.device.type) if args.amp == "fp16" else None,
        keep_gradients=keep_gradients,
        ema=average,
        extras={"bad_steps": guard, **({"clock": clock} if clock else {})},
        seed=args.seed,
        batch=sampler.batch,
        facts={"settings": run.settings, "categories": run.categories.to_list()},
        epoch=epoch,
    )
    alike = False
    if checkpoint:
        log(f"going on from {args.resume} with epoch {epoch}" + (f", step {done}" if done else ""))
        if checkpoint["official"] or "optimizer" not in checkpoint:
            log("the optimiser starts anew: this file has no state of it that fits our parameters")
        else:
            state.restore(checkpoint, source=args.resume)
        if average and not checkpoint.get("ema"):
            log("the average of the weights starts from these: this file has none")
        elif not average and checkpoint.get("ema"):
            log("the average of the weights is left out; --ema goes on with it")
        if done is not None:
            alike = state.restore_place(checkpoint, iteration=done)
    if run.folder and is_main():
        run.folder.clean()
        if run.own:
            run.folder.forget_log(epoch)
    # The main process reads, so that all know the same.
    earlier = all_gather_object(run.folder.logged() if run.own and is_main() else [])[0]
    if epoch >= args.epochs:
        log(f"nothing to do up to --epochs {args.epochs}; --start_epoch 0 starts over from these weights")
    if clock and clock.is_up:
        log(f"--max_hours {args.max_hours} are used up ({clock.seconds / 3600:.2f}); a larger number goes on")
        return

    def figures() -> dict[str, Any]:
        found = run.evaluate()[0]
        if average:
            log("and with averaged weights:")
            with average.in_place():
                found |= {f"ema_{name}": value for name, value in run.evaluate()[0].items()}
        return found

    def wish() -> Wish:
        if not clock or not clock.is_up:
            return Wish.GO_ON
        log(f"--max_hours {args.max_hours} are used up")
        return Wish.FINISH

    def after_epoch() -> None:
        if args.compile:
            log(f"torch.compile: {compiled_graphs()} graphs so far")

    trainer = Trainer(
        state=state,
        model=run.model,
        loader=run.train_loader,
        evaluate=figures,
        folder=run.folder,
        signals=signals,
        watched=lambda loader: run.bad_images.watch(run.watchdog.watched(loader)),
        options={
            "criterion": run.criterion,
            "device": run.device,
            "clip_max_norm": args.clip_max_norm,
            "accumulate": args.accumulate,
            "amp": AMP[args.amp],
            "guard": guard,
            "average": average,
            "profiler": StepProfiler(steps=args.profile, device=run.device),
            "print_every": args.print_every,
        },
        epochs=args.epochs,
        eval_every_epoch=args.eval_every_epoch,
        patience=args.patience,
        earlier=earlier,
        wish=wish,
        save_every_epoch=args.save_every_epoch,
        save_every_iterations=args.save_every_iterations,
        save_every_minutes=args.save_every_minutes,
    )
    try:
        trainer.run(random_numbers_go_on=alike, after_epoch=after_epoch)
    except BadSteps as error:
        text = replay.keep(
            error,
            state=state,
            criterion=run.criterion,
            device=run.device,
            amp=AMP[args.amp],
            folder=run.folder,
        )
        raise ValueError(text) from None


def repeat_step(source: str, device: torch.device) -> int:
    """--replay: what the step gives here; 0 where it is finite, 1 where it is not. Raises ValueError."""
    content = replay.read(source)
    full = RunSettings.from_flat(content["settings"])
    settings = argparse.Namespace(**full.flat())
    set_arithmetic(tf32=settings.tf32, deterministic=settings.deterministic)
    network, criterion, _ = build_model(full.trunk, full.family, full.loss)
    if not settings.lr_backbone:
        network.backbone.requires_grad_(False)
    load_weights(network, content["model"], source=source)
    place(network, settings, device)
    optimizer = build_optimizer(network, settings, device)
    optimizer.load_state_dict(content["optimizer"])
    log(f"epoch {content['epoch']}, iteration {content['iteration']}, image ids {replay.image_ids(content)}")
    repeated = replay.repeat(content, network=network, criterion=criterion, device=device, amp=AMP[settings.amp])
    for line in repeated.lines():
        log(line)
    if repeated.finite:
        log(f"the step is finite; {replay.take(network, optimizer, clip_max_norm=settings.clip_max_norm)}")
    return 0 if repeated.finite else 1


def run(args: argparse.Namespace, given: set[str]) -> int:
    """Everything after the command line; the exit status. `given` are the names of the flags that the user passed.
    Raises ValueError."""
    check_settings(args)
    if args.replay:
        return repeat_step(args.replay, choose_device(args.device))
    set_arithmetic(tf32=args.tf32, deterministic=args.deterministic)
    ranks = init_distributed(
        dist_url=args.dist_url,
        world_size=args.world_size,
        device=choose_device(args.device).type,
        timeout=timedelta(seconds=args.timeout),
    )
    torch.manual_seed(args.seed + ranks.rank)
    try:
        with Watchdog(timeout=args.timeout) as watchdog:
            if args.eval:
                write_evaluation(build(args, given, watchdog))
                return 0
            signals = Signals(announce=lambda message: watchdog.tell(message, status=PREEMPTED))
            with signals if args.output_dir else nullcontext():  # where nothing can be saved they end it, as ever
                with signals.nothing_to_save():
                    parts = build(args, given, watchdog)
                train(parts, signals)
    except Stopped as stopped:
        return stopped.status
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 1 for a --replay that is not finite, 2 after one line about what is wrong with the input, 75
    where the run is to be started again."""
    command: list[CommandLine] = []

    def program() -> int:
        command.append(parse(argv))
        settings = argparse.Namespace(**command[0].settings.flat())
        return run(settings, set(command[0].given))

    try:
        return run_command("main.py", program, describe=lambda text: command[0].with_flags(text) if command else text)
    finally:
        shutdown()


if __name__ == "__main__":
    status = main()
    if status == PREEMPTED:  # at once: the launcher ends the other processes as soon as one has ended
        end_now(status)
    sys.exit(status)
