"""Finds out which process of a run died or hangs, and ends the others, which would wait for it."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch.distributed import distributed_c10d

from samdetr.training.cluster.preemption import PREEMPTED, Stopped, end_now
from samdetr.util import distributed
from samdetr.util.distributed import barrier, get_rank, get_world_size, is_main

_END = 10**9  # of a loader, as a place in it
_GRACE = 5.0  # seconds that the main thread has to end by itself, such as to finish writing a file


class Fault(NamedTuple):
    """Why a process ends because of another one."""

    message: str
    status: int = 1
    told: bool = False  # by the other process itself


_NO_STORE = Fault("rank 0 is lost, or the launcher: where the processes met nobody answers")


class Watchdog:
    """While entered, a thread tells the other processes of the run that this one lives and how far it is, and looks at
    what they tell. A process that is silent, or behind the others, for `timeout` seconds is named, and this one ends
    with status 1. An error that ends a process ends the others too; the main one shows it with the other's rank.

    It exchanges all this through the store where the processes met, once a second, so it works while the processes wait
    for each other, on GPUs too. A run of one process needs none of it.
    """

    def __init__(self, *, timeout: float) -> None:
        self.timeout, self.interval = timeout, min(1.0, timeout / 10)
        self.rank, self.size = get_rank(), get_world_size()
        self._keys = [f"alive{rank}" for rank in range(self.size)]
        self._round, self._place, self._beats = 0, -1, 0
        self._stop, self._ending = threading.Event(), threading.Lock()
        self._told: Fault | None = None
        self._seen: dict[int, dict[str, Any]] = {}
        self._heard, self._moved = {}, time.monotonic()

    def __enter__(self) -> Watchdog:
        if self.size > 1:
            store = distributed_c10d._get_default_store()
            # A connection of its own, where there can be one: another thread may wait for an answer on the first.
            self._store = store.clone() if hasattr(store, "clone") else store
            self._beat()
            barrier()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if self.size == 1:
            return
        if error is None or isinstance(error, Stopped):
            barrier()
            self._stop.set()
            self._thread.join()
            barrier()  # the store may live in the main process
            return
        if isinstance(error, RuntimeError) and (fault := self._blame()):  # of an exchange with a process that is gone
            self._end(fault)
        self._ending.acquire()
        if isinstance(error, ValueError):
            self.tell(" ".join(str(error).split()), status=2)
        else:
            self.tell(" ".join(f"{kind.__name__}: {error}".split()))
        self._stop.wait(2 * self.interval)  # until the others have read it, should the store live here
        self._stop.set()

    def tell(self, message: str, status: int = 1) -> None:
        """Tell the other processes why this one ends; the first such message counts."""
        if self.size > 1:
            note = {"rank": self.rank, "status": status, "message": message}
            self._store.compare_set("note", "", json.dumps(note))

    def watched(self, loader: Iterable) -> _Watched:
        """The same batches; each tells how far this process is. All processes have to watch loaders in one order."""
        return _Watched(self, loader)

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
        """Read what all processes tell."""
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
        """What another process told before it ended."""
        if not self._store.check(["note"]):
            return None
        note = json.loads(self._store.get("note"))
        if note["rank"] == self.rank:
            return None
        self._told = Fault(f"rank {note['rank']}: {note['message']}", status=note["status"], told=True)
        return self._told

    def _silent(self, seconds: float) -> Fault | None:
        now = time.monotonic()
        lost = [rank for rank, heard in self._heard.items() if rank != self.rank and now - heard > seconds]
        return Fault(f"{self._names(lost)} gave no sign of life for {seconds:.3g} s") if lost else None

    def _behind(self, seconds: float) -> Fault | None:
        """Those that the others wait for, where nobody got on for so long. Before training each takes its time."""
        if time.monotonic() - self._moved < seconds or any(s["place"] < [1, 1] for s in self._seen.values()):
            return None
        least = min(state["place"] for state in self._seen.values())
        behind = [rank for rank, state in self._seen.items() if state["place"] == least]
        behind = [rank for rank in behind if not self._seen[rank]["waits"]] or behind
        return Fault(f"{self._names(behind)} hangs: the others have waited for {seconds:.3g} s")

    def _names(self, ranks: list[int]) -> str:
        return ", ".join(f"rank {rank} ({self._seen[rank]['process']})" for rank in ranks)

    def _blame(self) -> Fault | None:
        """Another process because of which an exchange failed, as soon as it shows."""
        until = time.monotonic() + 8 * self.interval
        while time.monotonic() < until:
            try:
                if fault := self._told or self._note() or self._silent(3 * self.interval):
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
            if fault and fault.told and fault.status != PREEMPTED:
                self._stop.wait(
                    min(_GRACE, self.timeout / 2)
                )  # the main thread may end by itself, or finish what it writes
            if self._stop.is_set():
                return
            if fault:
                self._end(fault)

    def _end(self, fault: Fault) -> None:
        """End this process because of another one."""
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # the other thread is at it
        # What a process has shown itself is only for the main process's log to tell once more.
        if is_main() or not fault.told:
            print(f"main.py: error: {fault.message}; rank {self.rank} stops", file=sys.stderr, flush=True)
        end_now(fault.status)


class _Watched:
    def __init__(self, watchdog: Watchdog, loader: Iterable) -> None:
        self._watchdog, self._loader = watchdog, loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator:
        watchdog = self._watchdog
        watchdog._round, watchdog._place = watchdog._round + 1, 0
        for batch in self._loader:
            watchdog._place += 1
            yield batch
        watchdog._place = _END
