"""Image files held in memory once for all processes of a node, for data sets on slow or shared disks."""

from __future__ import annotations

import io
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from samdetr.util.distributed import all_gather_object, is_first_on_node


class ImageCache:
    """The contents of files, as they are on the disk, in one piece of memory that the processes of a node share.

    The memory belongs to the first process of the node and has no name in any file system: nothing is left behind when
    that process ends, however it ends. Others, data loading workers included, map it.

    `read(i)` is file number i as a binary stream. Pickles as the place where the memory is found.
    """

    def __init__(self, place: str):
        self.place = place
        with open(place, "rb") as file:
            self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        (count,) = np.frombuffer(self._memory, np.int64, 1)
        self._starts = np.frombuffer(self._memory, np.int64, count + 1, offset=8)

    def __getstate__(self) -> str:
        return self.place

    def __setstate__(self, place: str) -> None:
        self.__init__(place)

    def read(self, index: int) -> io.BytesIO:
        return io.BytesIO(self._memory[self._starts[index] : self._starts[index + 1]])


def share_files(paths: Sequence[Path], *, unreadable_as_empty: bool = False) -> ImageCache:
    """Read every file in the first process of each node. All processes of the run have to come here.
    `unreadable_as_empty` puts nothing in the place of a file that cannot be read, instead of raising.

    Raises:
        ValueError: in all processes of a node: too little memory, an unreadable file, a system without shared memory.
    """
    place = error = None
    if is_first_on_node():
        try:
            place = _fill(paths, unreadable_as_empty)
        except (OSError, ValueError) as failure:
            error = f"--cache_mode: {' '.join(str(failure).split())}; leave the flag out"
    node = _node()
    for other, first, its_place, its_error in all_gather_object((node, is_first_on_node(), place, error)):
        if first and other == node:
            place, error = its_place, its_error
    if error:
        raise ValueError(error)
    return ImageCache(place)


def _node() -> str | None:
    """Processes with the same answer see each other's memory: the same kernel, the same numbering of processes."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _fill(paths: Sequence[Path], unreadable_as_empty: bool) -> str:
    """A memory of: number of files, where each begins (and the last ends), contents. Returns where to find it."""
    if not hasattr(os, "memfd_create"):
        raise ValueError("holding images in memory works on Linux only")
    held = [not unreadable_as_empty or _readable(path) for path in paths]
    sizes = np.array([path.stat().st_size if is_held else 0 for path, is_held in zip(paths, held)], np.int64)
    needed, free = int(sizes.sum()), _free_memory()
    if needed > free:
        raise ValueError(
            f"the images in {paths[0].parent} take {needed / 2**30:.1f} GiB, "
            f"of {free / 2**30:.1f} GiB of memory that are free"
        )
    starts = np.concatenate([[0], sizes.cumsum()]) + 8 * (len(paths) + 2)
    descriptor = os.memfd_create("images")  # stays open, and so the memory stays, as long as this process lives
    try:
        with open(descriptor, "wb", closefd=False) as memory:
            memory.write(np.int64(len(paths)).tobytes())
            memory.write(starts.tobytes())
            for path, size in zip(paths, sizes):
                if size and memory.write(path.read_bytes()) != size:
                    raise ValueError(f"{path} changed while it was read")
    except BaseException:
        os.close(descriptor)
        raise
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def _readable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.R_OK)


def _free_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return 1024 * int(line.split()[1])
    raise ValueError("the system does not tell how much memory is free")
