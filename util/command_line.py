"""Bad input ends a command with one line and exit status 2, no traceback."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from samdetr.util.distributed import get_rank

WRAPPED = "DataLoader worker process"
_PROJECT = Path(__file__).resolve().parents[1]


def as_flags(text: str) -> str:
    """A message with the arguments that it names in backticks as flags: `top_k` -> --top_k."""
    return re.sub(r"`([a-z][a-z0-9_]*)`", r"--\1", text)


def run_command(program: str, function: Callable[[], int | None], describe: Callable[[str], str] = as_flags) -> int:
    """Call `function` and return the exit status: its own or 0, or 2 after one line on stderr about what is wrong.

    A ValueError raised in this project means bad input; `describe` turns names of arguments into flags. A ValueError of
    another package is a bug and keeps its traceback. A data loading worker that was killed is reported in one line,
    too, with status 1.
    """
    try:
        return function() or 0
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        reason = " ".join(str(error).split("\n")[0].split()).rstrip(".")
        hint = "if memory ran out, pass a smaller `num_workers`; `resume` auto resumes from the last checkpoint"
        text, status = f"{reason}; {describe(hint)}", 1
    except ValueError as error:
        if not _is_ours(error):
            raise
        # A DataLoader puts the traceback of its worker into the message.
        reason = str(error).rsplit("ValueError: ", 1)[-1] if WRAPPED in str(error) else str(error)
        text, status = describe(" ".join(reason.split())), 2
    who = f"rank {get_rank()}: " if get_rank() else ""
    print(f"{program}: error: {who}{text}", file=sys.stderr)
    return status


def _is_ours(error: ValueError) -> bool:
    if WRAPPED in str(error):
        return True
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    # A checkout may hold a virtual environment.
    return raised_in.is_relative_to(_PROJECT) and "site-packages" not in raised_in.relative_to(_PROJECT).parts
