"""The command `samdetr`: one word for each program of the project."""

from __future__ import annotations

import difflib
import runpy
import sys
from collections.abc import Sequence

import samdetr

# Command -> module, flags that come first, and a line of help.
COMMANDS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "train": ("samdetr.main", (), "train a detector (main.py)"),
    "eval": (
        "samdetr.main",
        ("--eval",),
        "evaluate a checkpoint, --resume FILE, or any COCO results, --detections FILE (main.py --eval)",
    ),
    "predict": ("samdetr.demo", (), "detect objects in images and draw them (demo.py)"),
    "export": ("samdetr.export", (), "export a detector to ONNX, OpenVINO or torch.export (export.py)"),
    "slim": ("samdetr.slim", (), "write a detector into one safetensors file: RUN.pth OUT.safetensors"),
    "report": ("samdetr.report", (), "one HTML page about runs: RUN [RUN ...] (report.py)"),
    "compare": ("samdetr.compare", (), "compare runs by their output folders: RUN [RUN ...] (compare.py)"),
    "count": ("samdetr.count", (), "count parameters and GFLOPs of any flags or checkpoint (count.py)"),
    "check": ("samdetr.datasets.check", (), "find and repair faults of a data set (python -m datasets.check)"),
    "convert": (
        "samdetr.datasets.convert",
        (),
        "write a data set of any layout in COCO's (python -m datasets.convert)",
    ),
    "doctor": ("samdetr.models.ops.doctor", (), "whether the compiled operators run on this machine, and why not"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command with the words after it. The exit status is 2 if there is no such command.

    The program runs as `__main__`, as if its file had been called, and may end the process itself.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    command = words[0] if words else "--help"
    text = None
    if command in ("--help", "-h", "help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name:{width}}  {text}\n" for name, (_, _, text) in COMMANDS.items()]
        text = (
            f"usage: samdetr COMMAND [FLAGS]\n\n{''.join(lines)}\n"
            "samdetr COMMAND --help lists the flags of a command, samdetr --version the version."
        )
    elif command == "--version":
        text = samdetr.__version__
    elif command in COMMANDS:
        module, flags, _ = COMMANDS[command]
        sys.argv = [f"samdetr {command}", *flags, *words[1:]]
        runpy.run_module(module, run_name="__main__")
    else:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"commands are {', '.join(COMMANDS)}"
        print(f"samdetr: error: {command} is no command; {hint}", file=sys.stderr)
        return 2
    if text is not None:
        try:
            print(text, flush=True)
        except BrokenPipeError:  # `| head`
            from samdetr.util.command_line import give_up_output  # seconds to import

            return give_up_output()
    return 0


if __name__ == "__main__":
    sys.exit(main())
