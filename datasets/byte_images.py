"""Batches of images as data loading workers hand them over."""

from __future__ import annotations

import torch

from samdetr.datasets.transforms import normalize
from samdetr.util.padded_images import PaddedImages


class ByteImages(PaddedImages):
    """Images (B, 3, H, W) in uint8, which `to` normalises where they arrive.

    A quarter of the memory of floats: to hand these over took a worker longer than to decode and resize them.
    """

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PaddedImages:
        """The network's input: float32, zero where padded."""
        images, padding = (part.to(device, non_blocking=non_blocking) for part in (self.images, self.padding))
        return PaddedImages(normalize(images).masked_fill_(padding[:, None], 0), padding)

    def pin_memory(self) -> ByteImages:
        return ByteImages(self.images.pin_memory(), self.padding.pin_memory())
