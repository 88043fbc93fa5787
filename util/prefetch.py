"""Batches that are on their way to the GPU while it still works on the one before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch


def on_device(batches: Iterable[tuple[Any, ...]], device: torch.device) -> Iterator[tuple[Any, ...]]:
    """The batches, tuples of things with `to` and `record_stream`, on the device; one batch ahead on CUDA."""
    if device.type != "cuda":
        for batch in batches:
            yield tuple(part.to(device) for part in batch)
        return
    stream = torch.cuda.Stream(device)
    ready = None
    for batch in batches:
        with torch.cuda.stream(stream):
            coming = tuple(part.to(device, non_blocking=True) for part in batch)
            arrived = stream.record_event()
        if ready is not None:
            yield _take(*ready, device)
        ready = coming, arrived
    if ready is not None:
        yield _take(*ready, device)


def _take(batch: tuple[Any, ...], arrived: torch.cuda.Event, device: torch.device) -> tuple[Any, ...]:
    current = torch.cuda.current_stream(device)
    current.wait_event(arrived)
    for part in batch:
        part.record_stream(current)  # else its memory could be given away while this stream still reads it
    return batch
