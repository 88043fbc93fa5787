"""The order of images, and their distribution over processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


def evaluation_batches(
    *, order: Sequence[int], batch_size: int, processes: int, rank: int, world_size: int
) -> list[list[int]]:
    """The batches of process `rank`, if `world_size` processes share the batches that `processes` make of `order`.

    Metrics depend on padding a little, and padding on the batch; so one process can repeat the metrics of several. The
    last processes may have one batch fewer, or none: an evaluation must not communicate in each batch.
    """
    orders = [order[first::processes] for first in range(processes)]
    starts = range(0, len(orders[0]), batch_size)
    batches = [list(part[start : start + batch_size]) for start in starts for part in orders]
    return [batch for batch in batches if batch][rank::world_size]


class TrainSampler(Sampler[int]):
    """Every `world_size`-th of `length` indices, shuffled by (`seed`, epoch).

    Step k has the images k * `batch` to (k + 1) * `batch` - 1 of the shuffle, for any number of processes; a smaller
    last batch is skipped. So a run can resume at any step, with any number of processes, and sees the same images. The
    number of steps of PyTorch's DistributedSampler depends on the number of processes.
    """

    def __init__(self, *, length: int, batch: int, rank: int, world_size: int, seed: int) -> None:
        assert batch % world_size == 0, f"a batch of {batch} for {world_size} processes"
        self.length, self.batch, self.rank, self.world_size, self.seed = length, batch, rank, world_size, seed
        self.epoch, self.done = 0, 0

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.length // self.batch

    def set_epoch(self, epoch: int, done: int = 0) -> None:
        """Select the epoch of the next iteration, which skips the first `done` steps."""
        self.epoch, self.done = epoch, done

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        return iter(order[self.done * self.batch : self.steps * self.batch][self.rank :: self.world_size].tolist())

    def __len__(self) -> int:
        return (self.steps - self.done) * self.batch // self.world_size
