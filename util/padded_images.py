"""A batch of images of unlike sizes, padded at the right and bottom to one size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class PaddedImages:
    """`images` (B, 3, H, W), zero where padded; `padding` (B, H, W), True where padded."""

    images: Tensor
    padding: Tensor

    def to(self, *args, **kwargs) -> PaddedImages:
        """Move the batch; a dtype in `args` applies to the images alone."""
        images = self.images.to(*args, **kwargs)
        return PaddedImages(images, self.padding.to(images.device, non_blocking=kwargs.get("non_blocking", False)))

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory until that stream is done with it."""
        self.images.record_stream(stream)
        self.padding.record_stream(stream)

    def pin_memory(self) -> PaddedImages:
        """Called by DataLoader when it pins a batch."""
        return PaddedImages(self.images.pin_memory(), self.padding.pin_memory())


def pad_images(images: Sequence[Tensor], *, multiple: int = 1) -> PaddedImages:
    """Stack images (3, H_i, W_i) into one batch of the largest height and the largest width among them, rounded up to a
    `multiple`."""
    height, width = (-(-max(i.shape[axis] for i in images) // multiple) * multiple for axis in (1, 2))
    batch = images[0].new_zeros(len(images), images[0].shape[0], height, width)
    padding = torch.ones(len(images), height, width, dtype=torch.bool, device=batch.device)
    for image, row, pad in zip(images, batch, padding):
        _, h, w = image.shape
        row[:, :h, :w] = image
        pad[:h, :w] = False
    return PaddedImages(batch, padding)
