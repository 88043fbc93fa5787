"""Bad input ends a command with one line and exit status 2, no traceback."""

from __future__ import annotations

import os
import re
import select
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from samdetr.util.distributed import get_rank
from samdetr.util.logger import printable

_PROJECT = Path(__file__).resolve().parents[1]
_IN_WORKER = "DataLoader worker process"
_NOBODY_READS = 141  # as of shells: 128 + SIGPIPE


def as_flags(text: str, spelled: Mapping[str, str] = MappingProxyType({})) -> str:
    """A message with the arguments that it names in backticks as flags: `top_k` -> --top_k, or as in `spelled`."""
    return re.sub(r"`([a-z][a-z0-9_]*)`", lambda found: spelled.get(found[1], f"--{found[1]}"), text)


def program_name(file: str) -> str:
    """What the user typed: "samdetr train" if that command runs the program, else its `file`."""
    return sys.argv[0] if sys.argv[0].startswith("samdetr ") else file


def run_command(file: str, function: Callable[[], int | None], describe: Callable[[str], str] = as_flags) -> int:
    """Call `function` and return the exit status: its own or 0, or 2 after one line on stderr about what is wrong.

    A ValueError raised in this project means bad input; `describe` turns names of arguments into flags. A ValueError of
    another package is a bug and keeps its traceback. A data loading worker that was killed, and memory that ran
    out, are reported in one line, too, with status 1. If nobody reads the output any more (`| head`), the status is
    141.
    """
    for stream in (sys.stdout, sys.stderr):  # names in files may hold what the terminal's encoding lacks
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return function() or 0
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        output = select.poll()
        output.register(sys.stdout, 0)
        if not any(event & select.POLLERR for _, event in output.poll(0)):
            raise  # another pipe is broken
        return give_up_output()
    except RecursionError:
        _print_error(file, "the data or settings are nested too deeply to be read or written")
        return 2
    except MemoryError as error:
        _print_error(file, f"out of memory ({error or 'Python'}); {describe('pass a smaller `batch_size`')}")
        return 1
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        reason = " ".join(str(error).split("\n")[0].split()).rstrip(".")
        hint = "if memory ran out, pass a smaller `num_workers`; `resume` auto resumes from the last checkpoint"
        _print_error(file, f"{reason}; {describe(hint)}")
        return 1
    except ValueError as error:
        if not _is_ours(error):
            raise
        # A DataLoader wraps what its workers raise into the text of their traceback.
        text = str(error).rsplit("ValueError: ", 1)[-1] if _IN_WORKER in str(error) else str(error)
        _print_error(file, describe(" ".join(text.split())))
        return 2


def give_up_output() -> int:
    """After nobody reads stdout any more. Returns the exit status."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at the end
    return _NOBODY_READS


def _print_error(file: str, message: str) -> None:
    rank = f"rank {get_rank()}: " if get_rank() else ""
    print(f"{program_name(file)}: error: {rank}{printable(message)}", file=sys.stderr)


def _is_ours(error: ValueError) -> bool:
    if _IN_WORKER in str(error):
        return True
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    # A checkout may hold a virtual environment.
    return raised_in.is_relative_to(_PROJECT) and "site-packages" not in raised_in.relative_to(_PROJECT).parts
