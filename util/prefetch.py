"""Batches that travel to the GPU while it works on the batch before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from samdetr.util.sections import section

Batch = tuple[Any, ...]


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches on `device`; on CUDA the next one is already in transfer.

    A batch is a tuple of objects with the methods `to` and `record_stream`. Waiting for a batch is the section "data",
    sending it is the section "transfer".
    """
    iterator = iter(batches)
    if device.type != "cuda":
        while (batch := _next(iterator)) is not None:
            with section("transfer"):
                sent = tuple(part.to(device) for part in batch)
            yield sent
        return
    stream = torch.cuda.Stream(device)
    ready = None
    while (batch := _next(iterator)) is not None:
        with section("transfer"), torch.cuda.stream(stream):
            coming = tuple(part.to(device, non_blocking=True) for part in batch)
            arrived = stream.record_event()
        if ready is not None:
            yield _take(*ready, device)
        ready = coming, arrived
    if ready is not None:
        yield _take(*ready, device)


def _next(iterator: Iterator[Batch]) -> Batch | None:
    with section("data"):
        return next(iterator, None)


def _take(batch: Batch, arrived: torch.cuda.Event, device: torch.device) -> Batch:
    current = torch.cuda.current_stream(device)
    current.wait_event(arrived)
    for part in batch:
        part.record_stream(current)  # otherwise its memory could be reused while this stream still reads it
    return batch
