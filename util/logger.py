"""Lines and progress on the terminal, and averages of metrics."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from samdetr.util.distributed import all_gather_object, is_main

T = TypeVar("T")
_describe: Callable[[str], str] = str


def describe_by(describe: Callable[[str], str]) -> None:
    """Let `describe` edit every line from now on: a program turns the names of arguments, in backticks, into flags."""
    global _describe
    _describe = describe


def log(message: object) -> None:
    """Print a line, on the main process only."""
    if is_main():
        tqdm.write(_describe(str(message)))  # like print, but a progress bar on the terminal stays whole
        sys.stdout.flush()


def printable(text: str) -> str:
    """A text in one line: characters that cannot be printed are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shorter(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


class MetricAverager:
    """Averages named scalars over steps and processes.

    The sums stay on the metrics' device: a transfer to the host at every step would make each step wait for the GPU.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def update(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Add one step, which need not have every name."""
        for name, value in metrics.items():
            value = torch.as_tensor(value, dtype=torch.float64).detach()  # from float, through no float32
            assert value.ndim == 0, f"metric {name} is no scalar but has shape {tuple(value.shape)}"
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def state_dict(self) -> dict[str, Any]:
        """The exact sums and counts of this process; waits for the device."""
        return {"sums": {name: float(value) for name, value in self._sums.items()}, "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state_dict`."""
        self._sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in state["sums"].items()}
        self._counts = dict(state["counts"])

    def averages(self) -> dict[str, float]:
        """Mean of each name over all steps of all processes; every process must call this, and gets the same."""
        sums, counts = Counter[str](), Counter[str]()
        for part in all_gather_object(self.state_dict()):
            sums.update(part["sums"])
            counts.update(part["counts"])
        return {name: value / counts[name] for name, value in sums.items()}


class MovingMean:
    """Mean of the last values, weights falling exponentially, on their device; non-finite values are left out."""

    def __init__(self, *, decay: float = 0.95) -> None:
        self.decay = decay
        self._sum: Tensor | float = 0.0
        self._weight: Tensor | float = 0.0

    def update(self, value: Tensor) -> Tensor:
        """Add a scalar. Returns the mean, NaN if no value was finite."""
        value = value.detach()
        finite = torch.isfinite(value)
        self._sum = self.decay * self._sum + torch.where(finite, value, 0)
        self._weight = self.decay * self._weight + finite
        return self._sum / self._weight


class progress(Generic[T]):
    """Iterate and show the progress: a bar on a terminal, else a plain line every `every` iterations and at the end.

        steps = progress(loader, description="epoch 3", every=50)
        for batch in steps:
            steps.set(loss=loss, lr=lr)

    `total` is `len(iterable)` unless given, or unknown; `start` of them are already done. Processes other than the main
    one show nothing.
    """

    _REFRESH = 0.5  # seconds between two updates of the values beside the bar

    def __init__(
        self, iterable: Iterable[T], *, description: str, start: int = 0, total: int | None = None, every: int = 50
    ) -> None:
        self._iterable, self._description, self._start, self._every = iterable, description, start, every
        self._total = len(iterable) if total is None and isinstance(iterable, Sized) else total
        self._values: dict[str, Any] = {}

    def set(self, **values: Tensor | float | str) -> None:
        """Values to show. A tensor on the GPU is read only when it is shown, not at every call."""
        self._values = {name: v.detach() if isinstance(v, Tensor) else v for name, v in values.items()}

    def __iter__(self) -> Iterator[T]:
        if not is_main():
            return iter(self._iterable)
        return self._with_bar() if sys.stderr.isatty() else self._with_lines()

    def _with_bar(self) -> Iterator[T]:
        with tqdm(
            total=self._total, initial=self._start, desc=self._description, dynamic_ncols=True, file=sys.stderr
        ) as bar:
            shown = -math.inf
            for item in self._iterable:
                yield item
                if time.monotonic() - shown >= self._REFRESH:
                    bar.set_postfix_str(self._postfix(), refresh=False)
                    shown = time.monotonic()
                bar.update()
            bar.set_postfix_str(self._postfix())

    def _with_lines(self) -> Iterator[T]:
        start, done = time.monotonic(), self._start
        for item in self._iterable:
            yield item
            done += 1
            if done % self._every == 0 and done != self._total:
                log(self._line(done, time.monotonic() - start))
        log(self._line(done, time.monotonic() - start))

    def _line(self, done: int, elapsed: float) -> str:
        parts = [str(done) if self._total is None else f"{done}/{self._total}", f"elapsed {duration(elapsed)}"]
        if self._total and self._start < done <= self._total:
            parts.append(f"ETA {duration(elapsed / (done - self._start) * (self._total - done))}")
        return f"{self._description}: " + ", ".join([*parts, *filter(None, [self._postfix()])])

    def _postfix(self) -> str:
        return ", ".join(f"{name} {v if isinstance(v, str) else f'{float(v):.4g}'}" for name, v in self._values.items())


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
