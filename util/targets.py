"""The targets of a batch in a few tensors instead of a few for each image.

A DataLoader's worker passes every tensor by a separate file descriptor, and every tensor is a separate transfer to the
GPU. For small images that takes longer than the work (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

PER_OBJECT = ("labels", "boxes")


@dataclass
class TargetBatch:
    """`fields` hold the images' values, concatenated; `counts` the number of objects of each image; `unreadable` the
    reasons why images could not be read and were replaced, by their index."""

    fields: dict[str, Tensor]
    counts: list[int]
    unreadable: dict[int, str] = field(default_factory=dict)

    @classmethod
    def pack(cls, targets: Sequence[dict[str, Any]]) -> TargetBatch:
        """Targets of datasets.coco: PER_OBJECT values have one row for each object, the others one for the image."""
        names = [name for name in targets[0] if name != "unreadable"]
        fields = {
            name: (torch.cat if name in PER_OBJECT else torch.stack)([t[name] for t in targets]) for name in names
        }
        unreadable = {index: reason for t in targets for index, reason in t.get("unreadable", {}).items()}
        return cls(fields, [len(t["labels"]) for t in targets], unreadable)

    def unpack(self) -> list[dict[str, Tensor]]:
        """What was packed, except `unreadable`: a dict for each image."""
        parts = {
            name: values.split(self.counts) if name in PER_OBJECT else values.unbind()
            for name, values in self.fields.items()
        }
        return [dict(zip(parts, values)) for values in zip(*parts.values())]

    def to(self, *args, **kwargs) -> TargetBatch:
        return replace(self, fields={name: value.to(*args, **kwargs) for name, value in self.fields.items()})

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory until that stream is done with it."""
        for value in self.fields.values():
            value.record_stream(stream)

    def pin_memory(self) -> TargetBatch:
        """Called by DataLoader when it pins a batch."""
        return replace(self, fields={name: value.pin_memory() for name, value in self.fields.items()})
