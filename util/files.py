"""Files that are written whole or not at all, and JSON."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_HOST = socket.gethostname().replace(".", "_")
_TEMPORARY = re.compile(r"\.(\d+)(?:@([^.]+))?\.(.+)")  # process, host and name, of `whole_file`


def append_json_line(path: str | os.PathLike, record: Mapping[str, Any]) -> None:
    """Append `record` as one line of JSON; non-finite numbers become null."""
    line = json.dumps(_without_nonfinite(record), allow_nan=False).encode() + b"\n"
    with open(path, "ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a run was killed while it wrote: do not spoil this line as well
                line = b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
    """What `append_json_line` wrote; a line that a killed run left unfinished is skipped."""
    records = []
    for line in Path(path).read_text().splitlines():
        with suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def write_json(path: str | os.PathLike, value: Any, *, indent: int | None = 2) -> None:
    """Write `value` as JSON, whole or not at all; non-finite numbers become null. One line if `indent` is None."""
    text = json.dumps(_without_nonfinite(value), allow_nan=False, indent=indent) + "\n"
    with whole_file(path) as temporary:
        temporary.write_text(text)


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path, whose file replaces `path` in one step when the body ends, and is removed if it fails. It keeps
    the suffix of `path`, by which writers of pictures choose the format. Its name says whose it is: `remove_leftovers`
    removes those of processes that have ended."""
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}@{_HOST}.{path.name}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # so that the new name survives a loss of power
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """As `whole_file`, a temporary folder in place of `path`, which is not there yet or is an empty folder."""
    temporary = path.with_name(f".{os.getpid()}@{_HOST}.{path.name}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path, names: re.Pattern, *, of_other_hosts: bool = False) -> None:
    """Remove what `whole_file` left in a folder when its process was killed, of files whose names match `names`.

    Of processes on other hosts nothing is known: their files go only if `of_other_hosts`, which the holder of a lock on
    the folder may say.
    """
    for path in folder.iterdir():
        match = _TEMPORARY.fullmatch(path.name)
        if match and names.fullmatch(match[3]):
            here = match[2] in (None, _HOST)
            if not _lives(int(match[1])) if here else of_other_hosts:
                with suppress(OSError):
                    path.unlink()


def _lives(process: int) -> bool:
    """Whether there is such a process on this machine; a number that was given again counts as the old one."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return process != os.getpid()


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nonfinite(item) for item in value]
    return value
