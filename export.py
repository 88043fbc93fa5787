"""Export a trained detector for other engines.

    python export.py --resume output/run/checkpoint.pth                             ONNX, images of any size
    python export.py --resume output/run/checkpoint.pth --format openvino --size 640 864
    python export.py --resume output/run/checkpoint.pth --int8 photos --annotations photos.json

The file is kept only if, in its engine, it detects what the network detects; a report is written beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from samdetr.cli import import_plugin, program_parser
from samdetr.inference.export.command import Request, export
from samdetr.inference.export.formats import FORMATS
from samdetr.util.command_line import as_flags, program_name, run_command
from samdetr.util.logger import log


def main(argv: Sequence[str] | None = None) -> int:
    parser = program_parser("export.py", __doc__)
    parser.add_argument("--resume", required=True, help="checkpoint: a file or URL, ours or an official one")
    parser.add_argument("--allow_http", action="store_true", help="fetch --resume URL over http from other machines")
    parser.add_argument("--raw_weights", action="store_true", help="not the averaged weights of --ema, if any")
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="of the file (default: onnx)")
    parser.add_argument("--output", default="", metavar="FILE", help="the file; empty: beside the checkpoint")
    parser.add_argument(
        "--size",
        nargs="+",
        default=["dynamic"],
        metavar="N",
        help="height and width of all images, or dynamic (default)",
    )
    parser.add_argument("--raw", action="store_true", help="logits and boxes of all queries, without post-processing")
    parser.add_argument("--half", action="store_true", help="products and weights in 16 bits")
    parser.add_argument("--int8", default="", metavar="IMAGES", help="products in 8 bits, scales from these images")
    parser.add_argument("--images", default="", help="images to compare on; empty: those of --int8, or drawn ones")
    parser.add_argument(
        "--annotations", default="", help="COCO file of these images: --half and --int8 report AP by it"
    )
    parser.add_argument(
        "--most_drop", default=0.02, type=float, metavar="AP", help="of --half and --int8, from 0 to 1 (default: 0.02)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    parser.add_argument("--plugin", default="", metavar="MODULE", help="module or .py file that registers the family")
    args = parser.parse_args(argv)
    return run_command("export.py", lambda: run(args), lambda text: as_flags(text.replace("`source`", "--resume")))


def run(args: argparse.Namespace) -> int:
    """Everything after the command line; the exit status. Raises ValueError."""
    if args.plugin:
        import_plugin(args.plugin)
    names = ("format", "output", "raw", "half", "int8", "images", "annotations", "most_drop", "overwrite")
    request = Request(size=parse_size(args.size), **{name: getattr(args, name) for name in names})
    report = export(args.resume, request, raw_weights=args.raw_weights, allow_http=args.allow_http)
    figures = f"{report['agreement']:.2%} of {report['detections']} detections agree"
    if "drop" in report:
        figures = f"{report['judged_by']}: a drop of {report['drop']:.4f}, at most {report['most_drop']} is allowed"
    if report["passed"]:
        log(f"{report['file']}: {figures}; report in {report['file']}.json")
        return 0
    print(
        f"{program_name('export.py')}: error: the exported network differs, no file is kept: {figures}", file=sys.stderr
    )
    return 1


def parse_size(words: Sequence[str]) -> tuple[int, int] | None:
    """HEIGHT WIDTH, or None for dynamic. Raises ValueError."""
    words = " ".join(words).split()
    if words == ["dynamic"]:
        return None
    if len(words) != 2 or not all(word.isascii() and word.isdecimal() for word in words):
        raise ValueError(f"`size` {' '.join(words)} is neither two numbers, height and width, nor dynamic")
    return int(words[0]), int(words[1])


if __name__ == "__main__":
    sys.exit(main())
