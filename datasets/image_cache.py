"""Image files held in memory once per node, for data sets on slow or shared disks."""

from __future__ import annotations

import io
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from samdetr.util.distributed import all_gather_object, is_first_on_node
from samdetr.util.regular_files import open_regular


class ImageCache:
    """The unchanged contents of files in one memory that the processes of a node share.

    The memory belongs to the first process of the node and has no name in a file system, so nothing is left behind
    when that process ends, even if it is killed. Other processes, data loading workers included, map its path, `place`.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        with open(place, "rb") as file:
            self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        (count,) = np.frombuffer(self._memory, np.int64, 1)
        self._starts = np.frombuffer(self._memory, np.int64, count + 1, offset=8)

    def __reduce__(self) -> tuple[type[ImageCache], tuple[str]]:
        return ImageCache, (self.place,)

    def read(self, index: int) -> io.BytesIO:
        """File number `index` as a binary stream."""
        return io.BytesIO(self._memory[self._starts[index] : self._starts[index + 1]])


def share_files(paths: Sequence[Path], *, unreadable_as_empty: bool = False) -> ImageCache:
    """Read every file in the first process of each node. Every process of the run must call this.

    `unreadable_as_empty` holds an empty file for one that cannot be read, instead of raising.

    Raises:
        ValueError: too little memory, an unreadable file, or a system other than Linux; in all processes of the node.
    """
    place = error = None
    if is_first_on_node():
        try:
            place = _fill(paths, unreadable_as_empty)
        except (OSError, ValueError) as failure:
            error = f"`cache_mode`: {' '.join(str(failure).split())}; leave it out"
    # Only the first process of a node has a place or an error.
    found = {node: result for node, *result in all_gather_object((_node(), place, error)) if any(result)}
    place, error = found.get(_node(), (None, "`cache_mode`: local rank 0 shares no memory with this; leave it out"))
    if place is None:
        raise ValueError(error)
    return ImageCache(place)


def _node() -> str | None:
    """Equal for processes that can map each other's memory: the same kernel and process namespace."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _fill(paths: Sequence[Path], unreadable_as_empty: bool) -> str:
    """Fill a memory with the number of files, the start of each and the end of the last, and the contents.

    Returns its path.
    """
    if not hasattr(os, "memfd_create"):
        raise ValueError("holding images in memory works on Linux only")
    held = [not unreadable_as_empty or (path.is_file() and os.access(path, os.R_OK)) for path in paths]
    sizes = np.array([path.stat().st_size if is_held else 0 for path, is_held in zip(paths, held)], np.int64)
    needed, free = int(sizes.sum()), _free_memory()
    if needed > free:
        raise ValueError(
            f"the images in {paths[0].parent} take {needed / 2**30:.1f} GiB, "
            f"of {free / 2**30:.1f} GiB of memory that is free"
        )
    starts = np.concatenate([[0], sizes.cumsum()]) + 8 * (len(paths) + 2)
    descriptor = os.memfd_create("images")  # the memory lives as long as this stays open
    try:
        with open(descriptor, "wb", closefd=False) as memory:
            memory.write(np.int64(len(paths)).tobytes())
            memory.write(starts.tobytes())
            for path, size in zip(paths, sizes):
                if not size:
                    continue
                with open_regular(path) as file:
                    content = file.read()
                if memory.write(content) != size:
                    raise ValueError(f"{path} changed while it was read")
    except BaseException:
        os.close(descriptor)
        raise
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def _free_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return 1024 * int(line.split()[1])
    raise ValueError("the system does not report how much memory is free")
