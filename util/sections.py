"""Named sections of a program, which a profiler may time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch.profiler import record_function

Timer = Callable[[str], AbstractContextManager[None]]
_timers: list[Timer] = []


@contextmanager
def section(name: str) -> Iterator[None]:
    """Mark the body as a section: the innermost timer of `timed_by` times it, and torch.profiler shows it by name."""
    with record_function(name), _timers[-1](name) if _timers else nullcontext():
        yield


@contextmanager
def timed_by(timer: Timer) -> Iterator[None]:
    """Let `timer(name)`, a context manager, surround every section inside the body."""
    _timers.append(timer)
    try:
        yield
    finally:
        _timers.pop()
