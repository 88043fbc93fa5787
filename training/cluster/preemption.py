"""Signals that ask a run to end, Ctrl-C among them, and how its processes agree when to do so."""

from __future__ import annotations

import contextlib
import enum
import multiprocessing
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
from samdetr.util.loader import seconds_waited
from samdetr.util.logger import log

PREEMPTED = 75  # exit status "start me again" (sysexits.h: temporary failure); scripts_slurm/launch.sh knows it
INTERRUPTED = 130  # exit status after Ctrl-C, as of shells: 128 + SIGINT
# Of clusters that preempt; of slurm's --signal=USR1@120; of Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Seconds in which a second signal counts as the same one: launchers forward a signal that every process has received
# already, torchrun more slowly if it was interrupted itself.
_ONE_SIGNAL = {signal.SIGTERM: 0.1, signal.SIGUSR1: 0.1, signal.SIGINT: 1.0}

PATIENCE = 10.0  # seconds that a run waits for data after a signal


class Request(enum.IntEnum):
    """What a process asks for after a step. All processes do the largest request of any."""

    CONTINUE = 0
    SAVE = 1
    FINISH = 2  # save and end; the run is done
    PREEMPT = 3  # save and end with the status that asks to be started again
    INTERRUPT = 4  # save and end; the user wants it


class Stopped(Exception):
    """Ends training after a checkpoint. `status` is the exit status of the program."""

    def __init__(self, status: int) -> None:
        super().__init__(f"exit status {status}")
        self.status = status


class Signals:
    """While entered, the first of SIGNALS sets `received`; a second one ends the process at once.

    A thread waits for them, because Python's handlers do not run while the main thread waits for other processes.

    Args:
        announce: called with a message and the exit status before this process ends by itself, to inform the others.
        saves: whether the run has an output folder. If not, Ctrl-C ends the process with a line, and the other signals
            keep their default behaviour.
    """

    def __init__(self, announce: Callable[[str, int], None], *, saves: bool) -> None:
        self.announce, self.saves = announce, saves
        self.numbers = SIGNALS if saves else (signal.SIGINT,)
        self.received: signal.Signals | None = None
        self._nothing_to_save = not saves
        self._lock = threading.Lock()
        self._left = threading.Event()

    def __enter__(self) -> Signals:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._old_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, lambda *_: None) for number in self.numbers}
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        self._left.set()
        self._writer.close()  # ends the thread

    def request(self) -> Request:
        """To end, once a signal was received."""
        if not self.received:
            return Request.CONTINUE
        return Request.INTERRUPT if self.received == signal.SIGINT else Request.PREEMPT

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
                self._nothing_to_save = not self.saves

    def _listen(self) -> None:
        first = 0.0
        while number := self._reader.recv(1):
            if number[0] not in self.numbers:  # the pipe reports every signal, such as that of a child that ended
                continue
            with self._lock:
                if not self.received:
                    threading.Thread(target=self._leave_if_data_is_late, daemon=True).start()
                    self.received, first = signal.Signals(number[0]), time.monotonic()
                    if self._nothing_to_save:
                        self._leave()
                    if self.received == signal.SIGINT:
                        log("interrupted: this step is finished and saved; Ctrl-C once more ends at once")
                elif time.monotonic() - first > _ONE_SIGNAL[self.received]:
                    end_now(128 + number[0])
        self._reader.close()

    def _leave_if_data_is_late(self) -> None:
        """End the process if the main thread waits for data, since it does not look at signals until a step is made."""
        while not self._left.wait(1):
            if seconds_waited() > PATIENCE:
                log(f"no data came for {PATIENCE:.0f} s after {self.received.name if self.received else 'a signal'}")
                with self._lock:
                    self._leave()

    def _leave(self) -> None:
        assert self.received is not None
        status = PREEMPTED
        if self.received == signal.SIGINT:
            status = INTERRUPTED
            then = "`resume` auto resumes from the last checkpoint, if any" if self.saves else "nothing was saved"
            log(f"interrupted; {then}")
        self.announce(f"{self.received.name}: nothing to save; exit status {status}", status)
        end_now(status)


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
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        while signal.sigwaitinfo(SIGNALS).si_pid != parent.pid:
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
        ballot = torch.tensor(int(request()))
        work = distributed.all_reduce(ballot, distributed.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._cast = ballot, work
