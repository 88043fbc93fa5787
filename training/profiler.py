"""Where the time of a training step goes: `--profile N`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SECTIONS = ("data", "transfer", "forward", "matching", "loss", "backward", "optimiser")


class StepProfiler:
    """Times the sections (util.sections) of the first `steps` steps; does nothing afterwards.

    A GPU runs behind the host, so while this is active each section waits for it at both ends: sections add up, and
    steps take longer than without. Sections may be nested; the time of the inner one is not counted in the outer one.
    """

    def __init__(self, *, steps: int, device: torch.device):
        self.steps, self.device = steps, device
        self.rows: list[dict[str, float]] = []
        self._row: dict[str, float] = {}
        self._inner = [0.0]
        self._start, self._work = time.perf_counter(), time.process_time()

    @property
    def active(self) -> bool:
        return len(self.rows) < self.steps

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Time the body, for `util.sections.timed_by`."""
        if not self.active:
            yield
            return
        self._inner.append(0.0)
        start = self._now()
        try:
            yield
        finally:
            taken = self._now() - start
            self._row[name] = self._row.get(name, 0.0) + taken - self._inner.pop()
            self._inner[-1] += taken

    def step(self) -> str | None:
        """End of a step. Returns the table after the last step that is timed."""
        if not self.active:
            return None
        now, work = self._now(), time.process_time()
        whole = now - self._start
        on_gpu = sum(self._row.get(name, 0.0) for name in SECTIONS if name != "data")
        # A CPU is busy for the time that its threads ran; a GPU in all sections except the wait for data.
        busy = on_gpu if self.device.type == "cuda" else (work - self._work) / torch.get_num_threads()
        self.rows.append({**self._row, "all": whole, "busy": min(busy / whole, 1.0)})
        self._row, self._start, self._work = {}, now, work
        return None if self.active else self.table()

    def table(self) -> str:
        """Milliseconds of each section and step."""
        lines = ["milliseconds    " + "".join(f"{name:>11}" for name in (*SECTIONS, "all", "busy"))]
        for index, row in enumerate(self.rows):
            cells = "".join(f"{1e3 * row.get(name, 0.0):11.1f}" for name in (*SECTIONS, "all"))
            lines.append(f"iteration {index:<6}{cells}{row['busy']:11.0%}")
        return "\n".join(lines)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
