"""A DataLoader whose waits end: a batch that does not come is reported with its cause and the remedy."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import multiprocessing
import multiprocessing.queues
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

SHARED_MEMORY = Path("/dev/shm")
PREFETCHED = 2  # batches of each worker, as torch has them

_full: Any = None  # set by a worker, in memory that all share, if there is no more of it
_waiting_since: float | None = None  # of the main thread, for a batch


def seconds_waited() -> float:
    """How long the main thread has waited for the batch that it waits for now; 0 if for none."""
    since = _waiting_since
    return 0.0 if since is None else time.monotonic() - since


class Loader(DataLoader):
    """Raises ValueError if no batch comes for `timeout` seconds, or if shared memory is full; the workers are ended
    then. Options as of DataLoader."""

    def __init__(self, dataset: Any, *, timeout: float, num_workers: int, **options: Any) -> None:
        global _full
        if _full is None and num_workers:
            _full = multiprocessing.RawValue("b", 0)
        super().__init__(dataset, timeout=timeout if num_workers else 0, num_workers=num_workers, **options)

    def __iter__(self) -> Any:
        with _limited(self.timeout):
            return _Batches(super().__iter__(), timeout=self.timeout)


class _Batches:
    """PyTorch's iterator, whose waits are limited."""

    def __init__(self, batches: Any, *, timeout: float) -> None:
        self._batches, self._timeout = batches, timeout

    def __iter__(self) -> _Batches:
        return self

    def __next__(self) -> Any:
        with _limited(self._timeout):
            return next(self._batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)


@contextlib.contextmanager
def _limited(timeout: float) -> Iterator[None]:
    """Around a wait for workers."""
    global _waiting_since
    _waiting_since = time.monotonic()
    try:
        yield
    except RuntimeError as error:
        reason = _reason(f"{error} {error.__cause__ or ''}", timeout=timeout)
        if reason or str(error).startswith("DataLoader worker (pid"):
            _end_workers()
        if reason is None:
            raise
        raise ValueError(reason) from None
    finally:
        _waiting_since = None


def _end_workers() -> None:
    """One that hangs would not end otherwise, and this process waits for it."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise an error for each
    for worker in multiprocessing.active_children():
        worker.kill()


def _reason(error: str, *, timeout: float) -> str | None:
    """What happened, from the words of PyTorch; None if it is neither that a batch is late nor shared memory."""
    late = error.startswith("DataLoader timed out")
    full = any(words in error for words in ("shared memory", "No space left on device", "Bus error"))
    if _full is not None and _full.value:
        full, _full.value = True, 0
    if full:
        return (
            f"a process that loads data had no space left in shared memory ({SHARED_MEMORY}: {_space()}): make it "
            "larger (docker run --shm-size=8g), or pass a smaller `num_workers` or `batch_size`; `num_workers` 0 needs "
            "none"
        )
    if late:
        return (
            f"no batch came from the processes that load data for {timeout:g} s (`timeout`); they are ended: look at "
            f"the disk or network that holds the images ({SHARED_MEMORY}: {_space()}), or pass `num_workers` 0"
        )
    return None


def _space() -> str:
    try:
        usage = shutil.disk_usage(SHARED_MEMORY)
    except OSError:
        return "not there"
    return f"{usage.free / 1e6:.0f} of {usage.total / 1e6:.0f} MB are free"


def shared_memory_warning(*, num_workers: int, batch_bytes: int) -> str | None:
    """If the batches that workers hold ready may be more than the shared memory that is free."""
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:  # another system, which has none or needs none
        return None
    need = num_workers * PREFETCHED * batch_bytes
    if need <= free:
        return None
    return (
        f"warning: batches in shared memory may need {need / 1e6:.0f} MB ({num_workers} `num_workers` x {PREFETCHED} "
        f"batches of {batch_bytes / 1e6:.1f} MB), and {SHARED_MEMORY} has {free / 1e6:.0f} MB free; make it larger "
        "(docker run --shm-size=8g) or pass a smaller `num_workers`"
    )


def guard_worker() -> None:
    """In a process that loads data: end with its parent, however and whenever that ends, and without a word; and end if
    a batch cannot be sent, for the parent would wait for it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    if sys.platform == "linux":
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
    # The parent may have ended before this line. A server that forks, if there is one, ends with the parent.
    if os.getppid() != parent.pid and multiprocessing.get_start_method() != "forkserver":
        os._exit(1)

    def closed(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not issubclass(kind, (EOFError, ConnectionError)):  # else the parent ends, a moment before this process does
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = closed  # of the thread that hands batches over; errors of the data set go to the parent

    def fail(error: BaseException, _: object) -> None:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if full and _full is not None:
            _full.value = 1
        os._exit(1)

    assert threading.current_thread() is threading.main_thread()
    # Called by the thread that sends; it would print a traceback, drop the batch and continue.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(fail)  # type: ignore[attr-defined]
