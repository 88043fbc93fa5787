"""The images of an annotation file in a few tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch


def spread(number: int, length: int) -> list[int]:
    """Up to `number` places among `length`, evenly from the first to the last."""
    return np.unique(np.linspace(0, length - 1, min(number, length)).round().astype(int)).tolist()


class ImageRecord(NamedTuple):
    id: int
    file_name: str  # relative to the image folder
    size: tuple[float, float] | None  # (width, height) in the annotation file, if it has them


class ImageList:
    """A read-only list of ImageRecord; each record is made on access.

    Reading a Python object writes its reference count, so a data loading worker would copy a list of records page by
    page. Reading a tensor writes nothing, and PyTorch shares tensors with workers by fork and by spawn.
    """

    def __init__(self, records: Sequence[ImageRecord]) -> None:
        names = [record.file_name.encode(errors="surrogatepass") for record in records]  # JSON may hold lone surrogates
        self._ids = torch.tensor([record.id for record in records], dtype=torch.int64)
        self._sizes = torch.tensor([record.size or (0, 0) for record in records], dtype=torch.float64)
        self._names = torch.frombuffer(bytearray(b"".join(names) + b"\0"), dtype=torch.uint8)  # refuses an empty buffer
        self._name_starts = torch.tensor([0, *accumulate(map(len, names))])

    def __len__(self) -> int:
        return len(self._ids)

    def by_id(self) -> list[int]:
        """The indices, sorted by the ids."""
        return self._ids.argsort().tolist()

    def ratios(self) -> list[float]:
        """Width by height of each image; 0 where the annotation file has no size."""
        width, height = self._sizes.unbind(1)
        return (width / height.clamp(min=1)).tolist()

    def __iter__(self) -> Iterator[ImageRecord]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> ImageRecord:
        index = range(len(self))[index]  # IndexError beyond the end; negative indices count from the end
        start, end = self._name_starts[index : index + 2].tolist()
        name = self._names[start:end].numpy().tobytes().decode(errors="surrogatepass")
        width, height = self._sizes[index].tolist()
        return ImageRecord(int(self._ids[index]), name, (width, height) if width else None)
