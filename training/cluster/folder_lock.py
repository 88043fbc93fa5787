"""A lock on the output folder, so that two runs do not write into it at once."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path

from samdetr.util.logger import log

NAME = ".lock"
_descriptors: list[int] = []  # of this process


class FolderLock:
    """While entered, no other run can lock `folder`; created folders that stay empty are removed at the end.

    The operating system releases the lock when the process ends, however it ends, so it cannot become stale. It is on
    the folder itself, or on a file .lock in it if the file system cannot lock folders (NFS). That file says who holds
    the lock; it means nothing else.

    Raises ValueError on entering if another run holds the lock.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._created: list[Path] = []
        self._descriptor: int | None = None
        self._on_file = False

    def __enter__(self) -> FolderLock:
        folder = self.folder.absolute()
        self._created = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = self._lock(folder, os.O_RDONLY)
            self._on_file = self._descriptor is None
            if self._on_file:
                self._descriptor = self._lock(folder / NAME, os.O_RDWR | os.O_CREAT)
        except BlockingIOError:
            raise ValueError(
                f"another run is writing into `output_dir` {self.folder}{_holder(folder / NAME)}; wait until it ends, "
                "or pass another folder"
            ) from None
        except OSError as error:
            raise ValueError(f"`output_dir` {self.folder} cannot be made: {error.strerror or error}") from None
        if self._descriptor is None:
            log(f"note: the file system of {self.folder} has no locks; start no second run in this folder")
        else:
            _descriptors.append(self._descriptor)
            with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
                since = time.strftime("%Y-%m-%d %H:%M:%S %z")
                (folder / NAME).write_text(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                if self._on_file:  # another process may have opened it and be about to lock it: the file stays
                    os.truncate(self._descriptor, 0)
                else:
                    (self.folder / NAME).unlink()
            _descriptors.remove(self._descriptor)
            os.close(self._descriptor)
        for path in self._created:
            with contextlib.suppress(OSError):
                path.rmdir()  # only if it is empty

    @staticmethod
    def _lock(path: Path, flags: int) -> int | None:
        """The descriptor that holds the lock; None if the file system cannot lock `path`. Raises BlockingIOError."""
        descriptor = os.open(path, flags, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise
            return None


def _holder(file: Path) -> str:
    """What the holder of the lock wrote, if it can be read."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if file.is_file() and (words := file.read_text()[:200].strip()).isprintable() and words:
            return f" ({words})"
    return ""


def leave_lock_to_parent() -> None:
    """In a forked process, such as one that loads data: otherwise it would hold the lock after the run has ended."""
    while _descriptors:
        os.close(_descriptors.pop())
