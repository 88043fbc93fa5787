"""Finds the process of a run that died or hangs, and ends the others, which would wait for it."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from torch.distributed import distributed_c10d

from samdetr.training.cluster.preemption import INTERRUPTED, PREEMPTED, Stopped, end_now
from samdetr.util import distributed
from samdetr.util.command_line import program_name
from samdetr.util.distributed import barrier, get_rank, get_world_size, is_main

_END = 10**9  # the place after the last batch of a loader
_GRACE = 5.0  # seconds for the main thread to end by itself, such as to finish writing a file


class Fault(NamedTuple):
    """Why a process ends because of another one."""

    message: str
    status: int = 1
    reported: bool = False  # by the other process itself


_NO_STORE = Fault("rank 0 is lost, or the launcher: the store where the processes met does not answer")


class Watchdog:
    """While entered, a thread reports to the other processes of the run that this one is alive and how far it is, and
    reads their reports. A process that is silent, or behind the others, for `timeout` seconds is named, and this one
    ends with status 1. An error that ends a process ends the others too; the main one shows it with the other's rank.

    The reports go through the store where the processes met, once a second, so they also arrive while the processes
    wait for each other, on GPUs too. A run of one process needs none of this.

    Args:
        timeout: seconds.
        describe: turns the names of arguments in a message into flags.
    """

    def __init__(self, *, timeout: float, describe: Callable[[str], str] = str) -> None:
        self.timeout, self.interval, self.describe = timeout, min(1.0, timeout / 10), describe
        self.rank, self.size = get_rank(), get_world_size()
        self._keys = [f"alive{rank}" for rank in range(self.size)]
        self._round, self._place, self._beats = 0, -1, 0
        self._stop, self._ending = threading.Event(), threading.Lock()
        self._reported: Fault | None = None
        self._seen: dict[int, dict[str, Any]] = {}
        self._heard: dict[int, float] = {}
        self._moved = time.monotonic()

    def __enter__(self) -> Watchdog:
        if self.size > 1:
            store = distributed_c10d._get_default_store()
            # A separate connection, if possible: another thread may be waiting for an answer on the first.
            # Any: the types of PyTorch 2.6 lack multi_get and check.
            self._store: Any = store.clone() if hasattr(store, "clone") else store
            self._beat()
            barrier()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self.size == 1:
            return
        if kind is None or isinstance(error, Stopped):
            barrier()
            self._stop.set()
            self._thread.join()
            barrier()  # the store may live in the main process
            return
        if isinstance(error, RuntimeError) and (fault := self._blame()):  # of an exchange with a process that is gone
            self._let_it_show(fault)  # which may be the same error: a launcher ends all as soon as one has ended
            self._end(fault)
        self._ending.acquire()
        if isinstance(error, ValueError):
            self.report(self.describe(" ".join(str(error).split())), status=2)
        else:
            self.report(" ".join(f"{kind.__name__}: {error}".split()))
        self._stop.wait(2 * self.interval)  # until the others have read it, if the store lives here
        self._stop.set()

    def report(self, message: str, status: int = 1) -> None:
        """Report to the other processes why this one ends. The first such message of a run counts."""
        if self.size > 1:
            note = {"rank": self.rank, "status": status, "message": message}
            self._store.compare_set("note", "", json.dumps(note))

    def begin_round(self) -> None:
        """Before the batches of an epoch or an evaluation. All processes must begin their rounds in the same order."""
        self._round, self._place = self._round + 1, 0

    def on_batch(self, batch: object | None) -> None:
        """When a batch arrives, and with None after the last one of a round: how far this process is."""
        self._place = _END if batch is None else self._place + 1

    def _beat(self) -> None:
        self._beats += 1
        state = {
            "beat": self._beats,
            "place": [self._round, self._place],
            "waits": distributed.exchanging(),
            "process": f"{os.getpid()} on {socket.gethostname()}",
        }
        self._store.set(self._keys[self.rank], json.dumps(state))

    def _look(self) -> None:
        """Read the reports of all processes."""
        now = time.monotonic()
        for rank, text in enumerate(self._store.multi_get(self._keys)):
            state = json.loads(text)
            before = self._seen.get(rank, {})
            if state["beat"] != before.get("beat"):
                self._heard[rank] = now
            if state["place"] != before.get("place"):
                self._moved = now
            self._seen[rank] = state

    def _note(self) -> Fault | None:
        """What another process reported before it ended."""
        if not self._store.check(["note"]):
            return None
        note = json.loads(self._store.get("note"))
        if note["rank"] == self.rank:
            return None
        self._reported = Fault(f"rank {note['rank']}: {note['message']}", status=note["status"], reported=True)
        return self._reported

    def _silent(self, seconds: float) -> Fault | None:
        now = time.monotonic()
        lost = [rank for rank, heard in self._heard.items() if rank != self.rank and now - heard > seconds]
        return Fault(f"{self._names(lost)} gave no sign of life for {seconds:.3g} s") if lost else None

    def _behind(self, seconds: float) -> Fault | None:
        """The processes that the others wait for, if nobody has advanced for `seconds`. None before training, when the
        processes may take unequal time."""
        if time.monotonic() - self._moved < seconds or any(s["place"] < [1, 1] for s in self._seen.values()):
            return None
        least = min(state["place"] for state in self._seen.values())
        behind = [rank for rank, state in self._seen.items() if state["place"] == least]
        behind = [rank for rank in behind if not self._seen[rank]["waits"]] or behind
        return Fault(f"{self._names(behind)} hangs: the others have waited for {seconds:.3g} s")

    def _names(self, ranks: list[int]) -> str:
        return ", ".join(f"rank {rank} ({self._seen[rank]['process']})" for rank in ranks)

    def _blame(self) -> Fault | None:
        """The process because of which an exchange failed; waits a few seconds until it is known."""
        until = time.monotonic() + 8 * self.interval
        while time.monotonic() < until:
            try:
                if fault := self._reported or self._note() or self._silent(3 * self.interval):
                    return fault
            except RuntimeError:
                return _NO_STORE
            time.sleep(self.interval / 4)
        return None

    def _watch(self) -> None:
        limit = self.timeout - 2 * self.interval
        while not self._stop.wait(self.interval):
            try:
                self._beat()
                self._look()
                fault = self._note() or self._silent(limit) or self._behind(limit)
            except RuntimeError:
                fault = _NO_STORE
            if fault:  # the main thread may end by itself, or finish what it writes
                self._let_it_show(fault)
            if self._stop.is_set():
                return
            if fault:
                self._end(fault)

    def _let_it_show(self, fault: Fault) -> None:
        """Leave another process that has failed the time to say why."""
        if fault.reported and fault.status not in (PREEMPTED, INTERRUPTED):
            self._stop.wait(min(_GRACE, self.timeout / 2))

    def _end(self, fault: Fault) -> None:
        """End this process because of another one."""
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # the other thread ends the process
        # The other process has shown its own report; only the main process repeats it, for the log.
        if is_main() or not fault.reported:
            program = program_name("main.py")
            print(f"{program}: error: {fault.message}; rank {self.rank} stops", file=sys.stderr, flush=True)
        end_now(fault.status)
