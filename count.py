"""Count the parameters and GFLOPs of a network, and measure how long it takes for an image.

    samdetr count --smca
    samdetr count --resume output/run/checkpoint.pth --size 640 864 --latency 5

All flags of `samdetr train` that shape a network have their effect; none of the data is read, so there are 91 classes
unless a checkpoint says otherwise.

GFLOPs are of one image, by the rules of fvcore, which published figures follow: a multiplication with its addition is
one FLOP; convolutions, matrix products and normalisations count, what is element by element does not. The table has
those of the network as published, whose kernels compute some things twice; the line below it those computed here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from samdetr.cli import parse, program_parser, with_flags
from samdetr.inference.counting import by_module, count, latency
from samdetr.inference.plain import plain
from samdetr.models.checkpoints import check_network
from samdetr.models.detector import Detector
from samdetr.training.checkpoints import CheckpointFolder
from samdetr.training.resume import find_checkpoint
from samdetr.training.run import build_network, check_settings
from samdetr.training.settings import RunSettings
from samdetr.util.command_line import program_name, run_command
from samdetr.util.device import choose_device, place, set_arithmetic
from samdetr.util.logger import log


def side(text: str) -> int:
    if not text.isdecimal() or not 32 <= int(text) <= 2**14:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 32 to {2**14}")
    return int(text)


def rounds(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10**6:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 to a million")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    usage = f"{program_name('count.py')} [--size HEIGHT WIDTH] [--latency N] [FLAGS of samdetr train]"
    parser = program_parser("count.py", __doc__, usage=usage)
    parser.add_argument(
        "--size",
        type=side,
        nargs=2,
        default=[800, 1120],
        metavar=("HEIGHT", "WIDTH"),
        help="of the image (default: 800 1120, as COCO's are on average)",
    )
    parser.add_argument(
        "--latency", type=rounds, metavar="N", help="also the median time of N images, one after another"
    )
    own, words = parser.parse_known_args(argv)
    return run_command("count.py", lambda: show(words, own.size, own.latency), with_flags)


def show(words: Sequence[str], size: Sequence[int], images: int | None) -> None:
    """Print what the network of these flags has. Raises ValueError."""
    command = parse(words)
    settings = command.settings
    device = choose_device(settings.run.device)  # before anything takes time
    set_arithmetic(tf32=settings.speed.tf32, deterministic=False)
    network, about = build(settings, command.given)
    title = f"{about}, one image of {size[0]} x {size[1]}"
    counts = by_module(plain(network), size)
    width = max(map(len, counts))
    log(f"{title}\n{'':{width}} {'parameters':>12} {'trainable':>12} {'GFLOPs':>8}")
    for name in [*filter(None, counts), ""]:
        found = counts[name]
        row = f"{name or 'all':{width}} {found.parameters:12,} {found.trainable:12,} {found.flops / 1e9:8.1f}"
        log(row)
    log(f"a multiplication with its addition is one FLOP; this program computes {count(network, size).flops / 1e9:.1f}")
    if images:
        place(network, device, channels_last=settings.speed.channels_last)
        seconds = latency(network, size, rounds=images)
        what = "GPU" if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
        log(f"{1e3 * seconds:.1f} ms for an image ({what}, float32, median of {images}), post-processing left out")


def build(settings: RunSettings, given: Mapping[str, Any]) -> tuple[Detector, str]:
    """The network of these settings, and what to call it. `given` are the values of the flags that the user typed.
    Raises ValueError."""
    if settings.run.pretrained:
        raise ValueError("`pretrained` starts a training: pass the file with `resume` to count its network")
    settings = settings.replace(eval=bool(settings.run.resume))
    check_settings(settings)
    folder = CheckpointFolder(settings.run.output_dir) if settings.run.output_dir else None
    source = find_checkpoint(settings, given, folder)
    settings = source.applied(settings, given)
    settings.check_family(given)
    settings = settings.with_resolved_norm()
    if source.checkpoint:
        check_network(settings.trunk, settings.family, source.checkpoint["model"], source=source.path)
    network = build_network(settings)[0]
    return network, f"{source.path or settings.trunk.model}, {settings.trunk.num_classes} classes"


if __name__ == "__main__":
    sys.exit(main())
