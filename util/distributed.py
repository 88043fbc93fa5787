"""Processes, ranks, and the few exchanges between processes that training needs.

Every function also works without a process group, as in a run of one process.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """`rank` of `world_size` processes over all nodes; `local_rank` counts the processes of this node."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


_ranks = Ranks()  # what init_distributed found; torch.distributed itself knows no local rank


def init_distributed(
    *, dist_url: str = "env://", world_size: int = 1, device: str, timeout: timedelta = timedelta(minutes=30)
) -> Ranks:
    """Join the other processes of this run, started by torchrun, torch.distributed.launch or srun.

    `dist_url` "env://" takes the meeting point from the launcher, "tcp://host:port" names it. `world_size` is needed
    only if the launcher does not set it; 1 means "not given". A single process gets no process group. On "cuda" this
    process's GPU becomes the current one.

    Raises ValueError for variables that contradict each other; names the variable and its value.
    """
    global _ranks
    _ranks = ranks = read_ranks(os.environ, world_size=world_size)
    if ranks.world_size == 1:
        return ranks
    gpu = None
    if torch.device(device).type == "cuda":
        gpu = torch.device("cuda", _gpu_index(ranks.local_rank))
        torch.cuda.set_device(gpu)
    if dist_url == "env://" and _started_by_srun(os.environ):
        dist_url = slurm_url(os.environ)
    dist.init_process_group(
        backend="nccl" if gpu else "gloo",
        store=_meet(dist_url, ranks, timeout),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timeout,
        device_id=gpu,
    )
    return ranks


def _meet(url: str, ranks: Ranks, timeout: timedelta) -> dist.Store:
    """A store of the processes that are present. Raises ValueError, with the ranks that did not come.

    torchrun keeps its store when it restarts the processes after a loss, so they would read the addresses of the former
    ones. Here the others ask under fresh names, and the first process answers with the name of a fresh part of it.
    """
    within = f"within {timeout.total_seconds():.0f} s"
    try:
        store, _, _ = next(dist.rendezvous(url, ranks.rank, ranks.world_size, timeout=timeout))
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise ValueError(f"not all of the {ranks.world_size} processes met {within} at {url}: {error}") from None
    store.set_timeout(timeout)
    name = uuid.uuid4().hex
    until = time.monotonic() + timeout.total_seconds()
    if ranks.rank > 0:
        store.set(f"asks{ranks.rank}", name)
        try:
            shared = store.get(name).decode()
        except dist.DistStoreError:
            raise ValueError(f"rank 0 did not come to {url} {within}") from None
        store.set(f"{shared}/{ranks.rank}", "here")
        return dist.PrefixStore(shared, store)
    missing = list(range(1, ranks.world_size))
    while missing:
        for rank in missing:
            if store.check([f"asks{rank}"]):
                store.set(store.get(f"asks{rank}").decode(), name)
        missing = [rank for rank in missing if not store.check([f"{name}/{rank}"])]
        if missing and time.monotonic() > until:
            raise ValueError(f"ranks {missing} did not come to {url} {within}")
        time.sleep(0.01)
    return dist.PrefixStore(name, store)


def read_ranks(environ: Mapping[str, str], *, world_size: int = 1) -> Ranks:
    """The ranks of torchrun's variables, else those of an srun step with several tasks, else a single process.

    `world_size` as in `init_distributed`. Raises ValueError.
    """
    if "RANK" in environ and ("WORLD_SIZE" in environ or world_size > 1):
        if "LOCAL_RANK" not in environ:
            raise ValueError(f"RANK={environ['RANK']} is set but LOCAL_RANK is not: set it, or start with torchrun")
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif _started_by_srun(environ):
        # The step's number first: an interactive shell may be a step of one task in a job of many.
        tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
        names = ("SLURM_PROCID", tasks, "SLURM_LOCALID")
    elif world_size > 1:
        raise ValueError(
            f"`world_size` {world_size}, but no launcher set the rank of this process: start it with torchrun or srun"
        )
    else:
        return Ranks()

    rank, size, local_rank = (_integer({"WORLD_SIZE": str(world_size), **environ}, name) for name in names)
    if size < 1:
        raise ValueError(f"{names[1]}={size} is not a number of processes")
    if world_size not in (1, size):
        raise ValueError(f"`world_size` {world_size} contradicts {names[1]}={size}")
    for name, value in ((names[0], rank), (names[2], local_rank)):
        if not 0 <= value < size:
            raise ValueError(f"{name}={value} is outside 0 to {size - 1} ({size} processes)")
    return Ranks(rank=rank, world_size=size, local_rank=local_rank)


def slurm_url(environ: Mapping[str, str]) -> str:
    """Where the tasks of an srun step meet: "tcp://first node:port".

    MASTER_ADDR and MASTER_PORT win, if set. Otherwise the port follows from the job's number, so that two jobs on one
    node do not meet each other. Raises ValueError.
    """
    host = environ.get("MASTER_ADDR")
    if host is None:
        lists = [name for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST") if name in environ]
        if not lists:
            raise ValueError("SLURM_JOB_NODELIST is not set: set MASTER_ADDR to the node of rank 0")
        try:
            host = first_host(environ[lists[0]])
        except ValueError as error:
            raise ValueError(f"{lists[0]}: {error}") from None
    if "MASTER_PORT" in environ:
        return f"tcp://{host}:{_integer(environ, 'MASTER_PORT')}"
    return f"tcp://{host}:{10_000 + _integer(environ, 'SLURM_JOB_ID') % 20_000}"  # below the ports that Linux assigns


def first_host(nodelist: str) -> str:
    """The first name in a SLURM node list: "node[03-05,09],gpu1" -> "node03". Raises ValueError."""
    # Each bracket shrinks to its first number; after that no comma is left but those between names.
    host = re.sub(r"\[(\d+)[\d,-]*\]", r"\1", nodelist).split(",")[0]
    if not re.fullmatch(r"[\w.-]+", host):
        raise ValueError(f"{nodelist!r} is not a list of nodes")
    return host


def _started_by_srun(environ: Mapping[str, str]) -> bool:
    # A shell of salloc and the script of sbatch see the job's SLURM_NTASKS as well, but they are no step of srun.
    return "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ


def _integer(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except KeyError:
        raise ValueError(f"{name} is not set") from None
    except ValueError:
        raise ValueError(f"{name}={environ[name]!r} is not an integer") from None


def _gpu_index(local_rank: int) -> int:
    count = torch.cuda.device_count()
    if count == 1:  # srun --gpus-per-task=1 shows each process only its GPU
        return 0
    if local_rank >= count:
        raise ValueError(f"local rank {local_rank} has no GPU: this node shows {count}")
    return local_rank


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    return dist.get_rank() if _joined() else 0


def get_world_size() -> int:
    return dist.get_world_size() if _joined() else 1


def is_main() -> bool:
    """Whether this is the process that prints and writes files."""
    return get_rank() == 0


def is_first_on_node() -> bool:
    """Whether this process does the work that is done once per node."""
    return _ranks.local_rank == 0


_exchanging = 0


@contextmanager
def _exchange() -> Iterator[None]:
    global _exchanging
    _exchanging += 1
    try:
        yield
    finally:
        _exchanging -= 1


def exchanging() -> bool:
    """Whether this process is waiting for others in one of the functions below."""
    return _exchanging > 0


def barrier() -> None:
    """Wait until every process has called this."""
    if _joined():
        with _exchange():
            dist.barrier()


@torch.no_grad()
def reduce_mean(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mean over the processes of scalars on one device; every process must bring the same keys. One exchange in all."""
    if not _joined():
        return dict(values)
    keys = sorted(values)  # the processes may have filled their dicts in different orders
    stacked = torch.stack([values[key] for key in keys])
    with _exchange():
        dist.all_reduce(stacked)
    return dict(zip(keys, stacked / get_world_size()))


@torch.no_grad()
def any_process(flags: Tensor) -> Tensor:
    """Maximum of `flags`, 0.0 or 1.0, over the processes, in place. Does not wait for the GPU."""
    if _joined():
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return flags


def all_gather_object(value: Any) -> list[Any]:
    """Every process's `value` (anything that pickles), in the order of ranks, on every process."""
    if not _joined():
        return [value]
    gathered: list[Any] = [None] * get_world_size()
    with _exchange():
        dist.all_gather_object(gathered, value)
    return gathered


def from_main(value: Callable[[], T]) -> T:
    """What `value()` is on the main process, which alone calls it, on every process. It must pickle."""
    return all_gather_object(value() if is_main() else None)[0]


@contextmanager
def main_process_first() -> Iterator[None]:
    """The first process of each node runs the body before the others of the node, e.g. to fetch a file for all.

    Every process of the run must call this.
    """
    first = is_first_on_node()
    if not first:
        barrier()
    try:
        yield
    finally:
        if first:  # also after an error, so that the others fail by themselves instead of waiting
            barrier()


def shutdown() -> None:
    """Leave the process group; harmless without one."""
    global _ranks
    if _joined():
        dist.destroy_process_group()
    _ranks = Ranks()
