"""The images of an annotation file in a few tensors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch


class ImageRecord(NamedTuple):
    id: int
    file_name: str  # relative to the image folder
    size: tuple[float, float] | None  # (width, height) that the annotation file gives, if it gives any


class ImageList(Sequence[ImageRecord]):
    """A list of ImageRecord, each of which is made when it is asked for.

    Python counts the references to an object inside the object. To look at it is to write to it, which in a data
    loading worker copies the page of memory that it lies in: over a list of records a worker grows until it has them
    all. Reading numbers out of a tensor writes nothing, and PyTorch shares tensors with workers however they start.
    """

    def __init__(self, records: Sequence[ImageRecord]) -> None:
        names = [record.file_name.encode(errors="surrogatepass") for record in records]  # JSON may hold half characters
        self._ids = torch.tensor([record.id for record in records], dtype=torch.int64)
        self._sizes = torch.tensor([record.size or (0, 0) for record in records], dtype=torch.float64)
        self._names = torch.frombuffer(bytearray(b"".join(names) + b"\0"), dtype=torch.uint8)  # at least one, it says
        self._name_starts = torch.tensor([0, *accumulate(map(len, names))])

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> ImageRecord:
        index = range(len(self))[index]  # IndexError beyond the end; from the end for negative numbers
        start, end = self._name_starts[index : index + 2].tolist()
        name = self._names[start:end].numpy().tobytes().decode(errors="surrogatepass")
        width, height = self._sizes[index].tolist()
        return ImageRecord(self._ids[index].item(), name, (width, height) if width else None)
