"""Files that are written whole or not at all, and JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


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
    the suffix of `path`, by which writers of pictures choose the format."""
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
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


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nonfinite(item) for item in value]
    return value
