"""Batches of images as data loading workers return them."""

from __future__ import annotations

import torch

from samdetr.datasets.transforms import normalize
from samdetr.util.padded_images import PaddedImages


class ByteImages(PaddedImages):
    """Images (B, 3, H, W) in uint8, which `to` normalises on the device.

    They take a quarter of the memory of floats, whose transfer took a worker longer than decoding and resizing.
    """

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PaddedImages:  # type: ignore[override]
        """The network's input: float32, zero in the padding."""
        images, padding = (part.to(device, non_blocking=non_blocking) for part in (self.images, self.padding))
        return PaddedImages(normalize(images).masked_fill_(padding[:, None], 0), padding)

    def pin_memory(self) -> ByteImages:
        return ByteImages(self.images.pin_memory(), self.padding.pin_memory())
