"""Which images each process trains on and evaluates."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class DistributedEvalSampler(Sampler[int]):
    """Every `world_size`-th index of `length`, from `rank` on: together the processes see each image exactly once.

    torch's DistributedSampler repeats images until all processes have equally many, which would count some twice. Here
    the last processes may have one image fewer, or none, so evaluation must not communicate for each batch.
    """

    def __init__(self, *, length: int, rank: int, world_size: int) -> None:
        self.indices = range(rank, length, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class TrainSampler(Sampler[int]):
    """Every `world_size`-th index of a shuffle that follows from (`seed`, epoch) alone.

    The images of step k are numbers k * batch to (k + 1) * batch - 1 of the shuffle, however many processes share them,
    and an incomplete last batch is left out. So a run may go on at any step, with another number of processes too, and
    sees what it would have seen. torch's DistributedSampler makes the same shuffle, but repeats images until all
    processes have equally many, by which the number of steps depends on that of processes.

    Args:
        length: number of images.
        batch: images of a step, of all processes together.
    """

    def __init__(self, *, length: int, batch: int, rank: int, world_size: int, seed: int) -> None:
        assert batch % world_size == 0, f"a batch of {batch} for {world_size} processes"
        self.length, self.batch, self.rank, self.world_size, self.seed = length, batch, rank, world_size, seed
        self.epoch, self.done = 0, 0

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return self.length // self.batch

    def set_epoch(self, epoch: int, done: int = 0) -> None:
        """Let the next iteration be over what is left of an epoch after so many steps."""
        self.epoch, self.done = epoch, done

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        return iter(order[self.done * self.batch : self.steps * self.batch][self.rank :: self.world_size].tolist())

    def __len__(self) -> int:
        return (self.steps - self.done) * self.batch // self.world_size
