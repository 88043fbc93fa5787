"""Opening files whose names others wrote: only regular ones, because a pipe would block and a device has no end."""

from __future__ import annotations

import os
import stat
from typing import BinaryIO

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


class NotRegular(ValueError):
    """What a path leads to is no regular file."""


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading, without waiting for writers of pipes.

    Raises:
        NotRegular: a folder, named pipe, device or socket, or a link to one.
        FileNotFoundError: no such file; the message tells a link that leads nowhere.
        OSError, ValueError: whatever else the system refuses.
    """
    try:
        _require_regular(os.stat(path).st_mode)  # before opening, which can act on a device
    except FileNotFoundError:
        if os.path.islink(path):
            raise FileNotFoundError(f"it is a link to {os.readlink(os.fspath(path))!r}, which does not exist") from None
        raise
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _require_regular(os.fstat(file).st_mode)  # it may have been replaced in between
        return open(file, "rb")
    except BaseException:
        os.close(file)
        raise


def _require_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise NotRegular(f"it is {_KINDS.get(stat.S_IFMT(mode), 'a special file')}, not a regular file")
