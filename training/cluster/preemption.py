"""Signals that ask a run to make room, and how its processes agree when to do so."""

from __future__ import annotations

import contextlib
import enum
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import distributed

from samdetr.util.distributed import get_world_size

PREEMPTED = 75  # exit status "start me again" (sysexits.h: temporary failure); scripts_slurm/launch.sh knows it
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # of clusters that preempt; of slurm's --signal=USR1@120
_ONE_SIGNAL = 0.1  # seconds: launchers forward a signal that the cluster has also sent to every process


class Request(enum.IntEnum):
    """What a process asks for after a step. All processes do the largest request of any."""

    CONTINUE = 0
    SAVE = 1
    FINISH = 2  # save and end; the run is done
    PREEMPT = 3  # save and end with the status that asks to be started again


class Stopped(Exception):
    """Ends training after a checkpoint. `status` is the exit status of the program."""

    def __init__(self, status: int) -> None:
        super().__init__(f"exit status {status}")
        self.status = status


class Signals:
    """While entered, the first SIGTERM or SIGUSR1 sets `received`; a second one ends the process at once.

    A thread waits for them, because Python's handlers do not run while the main thread waits for other processes.

    Args:
        announce: called with a message before this process ends by itself, to inform the others.
    """

    def __init__(self, announce: Callable[[str], None] = lambda message: None) -> None:
        self.announce = announce
        self.received: signal.Signals | None = None
        self._nothing_to_save = False
        self._lock = threading.Lock()

    def __enter__(self) -> Signals:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._old_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        self._writer.close()  # ends the thread

    def request(self) -> Request:
        """To end with the status that asks to be started again, once a signal was received."""
        return Request.PREEMPT if self.received else Request.CONTINUE

    @contextlib.contextmanager
    def nothing_to_save(self) -> Iterator[None]:
        """While the body runs, a signal ends the process at once: the files on the disk are up to date."""
        with self._lock:
            self._nothing_to_save = True
            if self.received:
                self._leave()
        try:
            yield
        finally:
            with self._lock:
                self._nothing_to_save = False

    def _listen(self) -> None:
        first = 0.0
        while number := self._reader.recv(1):
            if number[0] not in SIGNALS:  # the pipe reports every signal, such as that of a child that ended
                continue
            with self._lock:
                if not self.received:
                    self.received, first = signal.Signals(number[0]), time.monotonic()
                    if self._nothing_to_save:
                        self._leave()
                elif time.monotonic() - first > _ONE_SIGNAL:
                    end_now(128 + number[0])
        self._reader.close()

    def _leave(self) -> None:
        assert self.received is not None
        self.announce(f"{self.received.name}: nothing to save; exit status {PREEMPTED}")
        end_now(PREEMPTED)


def end_now(status: int) -> None:
    """End this process, without waiting for other threads and processes."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def shield_worker(_: int) -> None:
    """Let processes that load data ignore the cluster's signals, which reach every process but are for the one that
    trains: it still needs the data. A signal that comes from it, when it ends, ends them as usual."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo(SIGNALS).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class Votes:
    """After every step each process casts a request and learns the largest of all: at once if it is alone, otherwise
    one step later.

    The exchange runs between CPUs during the next step: nothing waits for it, nor for a GPU.
    """

    def __init__(self) -> None:
        self._group: Any = distributed.new_group(backend="gloo") if get_world_size() > 1 else None
        self._cast: tuple[torch.Tensor, distributed.Work] | None = None

    def cast(self, request: Request) -> None:
        ballot = torch.tensor(int(request))
        work = distributed.all_reduce(ballot, distributed.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._cast = ballot, work

    def result(self) -> Request:
        """Of the last cast, once."""
        if self._cast is None:
            return Request.CONTINUE
        (ballot, work), self._cast = self._cast, None
        work.wait()
        return Request(int(ballot))

    def agree(self, request: Callable[[], Request], act: Callable[[Request], None]) -> None:
        """Call `act` with the request of all; `request` is called when this process's request counts."""
        if self._group is None:
            act(request())
            return
        act(self.result())
        self.cast(request())
