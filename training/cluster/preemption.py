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

import torch
from torch import distributed

from samdetr.util.distributed import get_world_size

PREEMPTED = 75  # exit status: start me again, I go on (sysexits.h: temporary failure); scripts_slurm/launch.sh knows it
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # of clusters that preempt; what slurm's --signal=USR1@120 sends
_ONE_SIGNAL = 0.1  # seconds: launchers pass a signal on that the cluster has sent to every process, too


class Wish(enum.IntEnum):
    """What a process wants to do after a step; what all do is the largest wish of any."""

    GO_ON = 0
    SAVE = 1
    FINISH = 2  # save and end, the run being done
    PREEMPT = 3  # save and end with the status that asks to be started again


class Stopped(Exception):
    """Ends training after a checkpoint was written. `status` is what the program exits with."""

    def __init__(self, status: int) -> None:
        super().__init__(f"exit status {status}")
        self.status = status


class Signals:
    """While entered, the first SIGTERM or SIGUSR1 sets `received`; a second one ends the process at once.

    A thread waits for them, because Python's own handlers do not run while the main thread waits for other processes.

    Args:
        announce: called before the process ends by itself, to tell the others.
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

    @contextlib.contextmanager
    def nothing_to_save(self) -> Iterator[None]:
        """For a body during which a signal ends the process at once, what is on the disk being up to date."""
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
            if number[0] not in SIGNALS:  # the pipe tells of every signal, such as that of a child that ended
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
        self.announce(f"{self.received.name}: nothing to save; exit status {PREEMPTED}")
        end_now(PREEMPTED)


def end_now(status: int) -> None:
    """End this process, without waiting for other threads and processes."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def shield_worker(_: int) -> None:
    """For processes that load data: the cluster's signals, which reach every process, are for the one that trains. It
    still needs the data. What it sends itself, when it ends, ends them as ever."""
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
    """After every step each process casts its wish, and learns what all do: at once if it is alone, else a step later.

    The exchange runs beside the next step, between CPUs: nothing waits for it, nor for a GPU.
    """

    def __init__(self) -> None:
        self._group = distributed.new_group(backend="gloo") if get_world_size() > 1 else None
        self._cast: tuple[torch.Tensor, distributed.Work] | None = None

    def cast(self, wish: Wish) -> None:
        ballot = torch.tensor(int(wish))
        work = distributed.all_reduce(ballot, distributed.ReduceOp.MAX, group=self._group, async_op=True)
        self._cast = ballot, work

    def result(self) -> Wish:
        """Of the last cast, once."""
        if self._cast is None:
            return Wish.GO_ON
        (ballot, work), self._cast = self._cast, None
        work.wait()
        return Wish(ballot.item())

    def agree(self, wish: Callable[[], Wish], act: Callable[[Wish], None]) -> None:
        """`act` on what is agreed; the process's own `wish` is asked for when it counts."""
        if self._group is None:
            act(wish())
            return
        act(self.result())
        self.cast(wish())
