"""Which images each process evaluates."""

from __future__ import annotations

from collections.abc import Iterator

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
