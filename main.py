"""Train or evaluate a detector.

python main.py --coco_path data/coco --output_dir output/run
torchrun --nproc_per_node=4 main.py --batch_size 4 --smca --epochs 12 --lr_drop 10 --output_dir output/run
python main.py --coco_path data/coco --resume output/run/checkpoint.pth --eval
python main.py --eval --detections results.json --annotations instances_val2017.json
python main.py --replay output/run/replay.pth

Exit status: 0, or 1 for a --replay that is not finite, 2 after one line about wrong input, 75 if the run asks to be
started again, 130 after Ctrl-C, 141 if nobody reads the output any more.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":
    # Read when PyTorch is imported. Threads that spin while they wait slow each other down on a busy machine.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback if Ctrl-C comes while the imports run

from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch

from samdetr.cli import CommandLine, parse
from samdetr.models.ops import kernels
from samdetr.training import replay, trackers
from samdetr.training.cluster.folder_lock import FolderLock
from samdetr.training.cluster.preemption import INTERRUPTED, PREEMPTED, Signals, Stopped, end_now
from samdetr.training.cluster.watchdog import Watchdog
from samdetr.training.console import notes, start_block
from samdetr.training.evaluation import evaluate_file, write_evaluation
from samdetr.training.loop import train
from samdetr.training.run import build, check_settings
from samdetr.util.command_line import run_command
from samdetr.util.device import choose_device, set_arithmetic
from samdetr.util.distributed import init_distributed, is_main, shutdown
from samdetr.util.logger import describe_by, log


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program on the words of a command line, `sys.argv` if None. Returns the exit status."""
    command: CommandLine | None = None

    def program() -> int:
        nonlocal command
        command = parse(argv)
        describe_by(command.with_flags)
        return run(command)

    try:
        return run_command("main.py", program, lambda text: command.with_flags(text) if command else text)
    finally:
        shutdown()


def run(command: CommandLine) -> int:
    """Train, evaluate or replay. Returns the exit status. Raises ValueError, which names arguments in backticks."""
    settings = command.settings
    check_settings(settings)
    if settings.run.detections:
        evaluate_file(settings)
        return 0
    device = choose_device(settings.run.device)
    if settings.run.replay:
        return replay.run(settings.run.replay, device=device)
    set_arithmetic(tf32=settings.speed.tf32, deterministic=settings.speed.deterministic)
    ranks = init_distributed(
        dist_url=settings.run.dist_url,
        world_size=settings.run.world_size,
        device=device.type,
        timeout=timedelta(seconds=settings.run.timeout),
    )
    torch.manual_seed(settings.run.seed + ranks.rank)
    try:
        with (
            kernels.path(settings.speed.ops),
            Watchdog(timeout=settings.run.timeout, describe=command.with_flags) as watchdog,
        ):
            saves = bool(settings.run.output_dir) and not settings.run.eval and not settings.run.overfit
            with (
                Signals(watchdog.report, saves=saves) as signals,
                FolderLock(Path(settings.run.output_dir)) if saves and is_main() else nullcontext(),
            ):
                for line in notes(settings, command.given):
                    log(line)
                with signals.nothing_to_save():
                    parts = build(settings, command.given, watchdog=watchdog)
                if settings.run.eval:
                    log(start_block(parts, None))
                    write_evaluation(parts)
                else:
                    return train(parts, command.given, signals)
    except Stopped as stopped:
        return stopped.status or int(bool(settings.run.overfit))  # one that ended early has shown nothing
    return 0


if __name__ == "__main__":
    status = main()
    # At once: the launcher ends the others as soon as one has ended, and the package of a lost tracker may hang.
    if status in (PREEMPTED, INTERRUPTED) or trackers.LOST:
        end_now(status)
    sys.exit(status)
