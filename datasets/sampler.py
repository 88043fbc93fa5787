"""The order of images, and their distribution over processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
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

    With `buckets` an epoch has the same images in another order: see `Buckets`.
    """

    def __init__(
        self, *, length: int, batch: int, rank: int, world_size: int, seed: int, buckets: Buckets | None = None
    ) -> None:
        assert batch % world_size == 0, f"a batch of {batch} for {world_size} processes"
        self.length, self.batch, self.rank, self.world_size, self.seed = length, batch, rank, world_size, seed
        self.buckets = buckets
        self.epoch, self.done = 0, 0

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.length // self.batch

    @property
    def grouping(self) -> dict[str, int]:
        """What the order depends on besides seed, epoch and batch."""
        return {"buckets": self.buckets.number, "group": self.buckets.group} if self.buckets else {}

    def set_epoch(self, epoch: int, done: int = 0) -> None:
        """Select the epoch of the next iteration, which skips the first `done` steps."""
        self.epoch, self.done = epoch, done

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.length, generator=generator)[: self.steps * self.batch]
        if self.buckets:
            groups = self.buckets.groups(order, generator)
            # A group for each process, again and again; below, neighbours go to different processes.
            order = groups.view(-1, self.world_size, self.buckets.group).transpose(1, 2).flatten()
        return iter(order[self.done * self.batch :][self.rank :: self.world_size].tolist())

    def __len__(self) -> int:
        return (self.steps - self.done) * self.batch // self.world_size


class Buckets:
    """Images of like aspect ratio, to be padded together.

    Sorted by `ratios`, width by height, the images fall into `number` buckets of equally many. A group of `group`
    images, the batch of one process, comes from one bucket; groups from what is left of the buckets come from
    neighbouring ones. A step mixes the groups.
    """

    def __init__(self, *, ratios: Sequence[float], number: int, group: int) -> None:
        self.number, self.group = number, group
        order = torch.tensor(ratios, dtype=torch.float64).argsort(stable=True)
        self._bucket = torch.empty_like(order)
        self._bucket[order] = torch.arange(len(order)) * number // len(order)

    def groups(self, order: Tensor, generator: torch.Generator) -> Tensor:
        """The indices `order`, a multiple of `group`, as groups (G, group) in random order."""
        order = order[self._bucket[order].argsort(stable=True)]
        parts = order.split(self._bucket[order].bincount(minlength=self.number).tolist())
        whole = [len(part) // self.group * self.group for part in parts]
        left = [part[size:] for part, size in zip(parts, whole)]
        groups = torch.cat([part[:size] for part, size in zip(parts, whole)] + left).view(-1, self.group)
        return groups[torch.randperm(len(groups), generator=generator)]
