"""A budget of hours for a run that may be interrupted: `--max_hours`."""

from __future__ import annotations

import time

from samdetr.training.cluster.preemption import Request
from samdetr.util.logger import log


class WallClock:
    """Counts the time since its construction, and the time that the run had used at its last save before."""

    def __init__(self, *, hours: float) -> None:
        self.hours = hours
        self._earlier, self._start = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        return self._earlier + time.monotonic() - self._start

    @property
    def is_up(self) -> bool:
        return self.seconds >= 3600 * self.hours

    def request(self) -> Request:
        """To finish, once the time is used up."""
        if not self.is_up:
            return Request.CONTINUE
        log(f"`max_hours` {self.hours} are used up")
        return Request.FINISH

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._earlier, self._start = state["seconds"], time.monotonic()
