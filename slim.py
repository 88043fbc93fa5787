"""Write a detector into one safetensors file, to keep it or to pass it on.

    samdetr slim output/run/checkpoint.pth detector.safetensors

Weights, settings and classes; what only training needs is left out. The file has a quarter of the size of a checkpoint
with averages of the weights, which it then holds, and a third of one without; --half halves it. `samdetr.load`,
--resume and --pretrained read it. Needs the package safetensors.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from samdetr.cli import import_plugin
from samdetr.inference.share import slim
from samdetr.util.command_line import as_flags, run_command
from samdetr.util.logger import log


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "samdetr slim", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", metavar="RUN.pth", help="checkpoint: a file or URL, ours or an official one")
    parser.add_argument("path", metavar="OUT.safetensors", help="the file to write")
    parser.add_argument("--raw_weights", action="store_true", help="not the averaged weights of --ema, if any")
    parser.add_argument("--half", action="store_true", help="matrices and kernels in 16 bits: half the size")
    parser.add_argument("--allow_http", action="store_true", help="fetch a URL over http from other machines, too")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.safetensors if it is there")
    parser.add_argument("--plugin", default="", metavar="MODULE", help="module or .py file that registers the family")
    args = parser.parse_args(argv)

    def run() -> None:
        if args.plugin:
            import_plugin(args.plugin)
        options = {"raw": args.raw_weights, "half": args.half, "overwrite": args.overwrite}
        size = slim(args.source, args.path, allow_http=args.allow_http, **options).stat().st_size
        source = Path(args.source)
        share = f", {size / source.stat().st_size:.0%} of {source}" if source.is_file() else ""
        log(f"{args.path}: {size / 1e6:.1f} MB{share}")

    return run_command("slim.py", run, lambda text: as_flags(text.replace("`source` ", "")))


if __name__ == "__main__":
    sys.exit(main())
