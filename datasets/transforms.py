"""The published DETR presets for training and evaluation, as torchvision v2 transforms.

Images are resized as uint8 tensors, several times as fast as by PIL; a few pixels in ten thousand differ from PIL's by
one or two of 255 (docs/log.md, benchmarks/loader.py).

All take (PIL image, target) with `target["boxes"]` as tv_tensors.BoundingBoxes (n, 4) in xyxy pixels and
`target["labels"]` (n,). They return (float32 tensor (3, H, W), target) with boxes in pixels of that tensor; with
`normalize=False` the tensor is uint8. EvalTransforms also takes an image alone. Random numbers come only from torch's
global generator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from samdetr.util.padded_images import IMAGENET_MEAN, IMAGENET_STD, PaddedImages

SHORT_SIDES = tuple(range(480, 801, 32))
ZOOM_SIDES = (400, 500, 600)
# Published zooms have no longest side. Here they have one if it is exceeded four times, which no photograph does: an
# image of 1 x 60000 pixels would take 28 GB.
ZOOM_MAX_SIZE, ZOOM_LIMIT = 1333, 4


class EvalTransforms(v2.Compose):
    """Resize to one short side, normalise."""

    def __init__(self, *, short_side: int = 800, max_size: int | None = 1333, normalize: bool = True) -> None:
        resize = ResizeShortSide(short_sides=[short_side], max_size=max_size)
        super().__init__([ToTensor(), resize, *([Normalize()] if normalize else [])])


class TrainTransforms(v2.Compose):
    """Flip, resize to a random short side, normalise.

    With `crop`, half of the images are first resized to another scale and cropped at random.
    """

    def __init__(
        self,
        *,
        short_sides: Sequence[int] = SHORT_SIDES,
        max_size: int | None = 1333,
        crop: bool = True,
        flip: float = 0.5,
        normalize: bool = True,
    ) -> None:
        resize = ResizeShortSide(short_sides=short_sides, max_size=max_size)
        if crop:
            first = ResizeShortSide(short_sides=ZOOM_SIDES, max_size=ZOOM_MAX_SIZE, limit_from=ZOOM_LIMIT)
            zoom = v2.Compose([first, RandomCrop(sides=(384, 600)), resize])
            resize = v2.RandomChoice([resize, zoom])
        super().__init__([ToTensor(), v2.RandomHorizontalFlip(flip), resize, *([Normalize()] if normalize else [])])


def resized_size(
    height: int, width: int, short_side: int, max_size: int | None, *, limit_from: float = 1
) -> tuple[int, int]:
    """(height, width) after resizing to `short_side`, or to less if the long side would exceed `limit_from` times
    `max_size`: then it is at most `max_size`.

    DETR rounds the limited short side to the nearest integer, so the long side can miss `max_size` by some pixels;
    v2.Resize rounds down. The published results were obtained with DETR's rule. Where rounding would cost more than 1 %
    of `max_size`, as in images of 1 x 60000 pixels, the long side is `max_size`.
    """
    short, long = min(height, width), max(height, width)
    limited = max_size is not None and long / short * short_side > max_size * limit_from
    if max_size is not None and limited:
        short_side = max(1, round(max_size * short / long))
    long_side = int(short_side * long / short)
    if max_size is not None and limited and long_side > 1.01 * max_size:
        long_side = max(short_side, max_size)
    return (short_side, long_side) if height <= width else (long_side, short_side)


class FitInto(v2.Compose):
    """Resize as much as fits into a height and a width; the aspect ratio stays."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__([ToTensor(), ResizeInto(height, width)])


class ToTensor(v2.Transform):
    """PIL image in RGB -> uint8 (3, H, W), channels last in memory as in PIL, which makes resizing faster."""

    _transformed_types = (Image.Image,)

    def transform(self, inpt: Image.Image, params: dict) -> tv_tensors.Image:
        return tv_tensors.Image(torch.from_numpy(np.array(inpt)).permute(2, 0, 1))


class Normalize(v2.Transform):
    """uint8 (3, H, W) -> float32, normalised by ImageNet's mean and standard deviation."""

    _transformed_types = (tv_tensors.Image,)

    def transform(self, inpt: tv_tensors.Image, params: dict) -> Tensor:
        return normalize(inpt.as_subclass(Tensor))


class ResizeShortSide(v2.Transform):
    """Resize to one of `short_sides`, drawn uniformly; see `resized_size`."""

    def __init__(self, *, short_sides: Sequence[int], max_size: int | None = None, limit_from: float = 1) -> None:
        super().__init__()
        self.short_sides, self.max_size, self.limit_from = tuple(short_sides), max_size, limit_from

    def make_params(self, flat_inputs: list) -> dict:
        height, width = v2.query_size(flat_inputs)
        short_side = self.short_sides[_randint(0, len(self.short_sides) - 1)]
        return {"size": list(resized_size(height, width, short_side, self.max_size, limit_from=self.limit_from))}

    def transform(self, inpt, params: dict):
        return F.resize(inpt, params["size"], antialias=True)


class ResizeInto(v2.Transform):
    """Resize to the largest size of the same aspect ratio within (height, width)."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.size = height, width

    def make_params(self, flat_inputs: list) -> dict:
        old = v2.query_size(flat_inputs)
        scale = min(new / side for new, side in zip(self.size, old))
        return {"size": [max(1, min(new, round(scale * side))) for new, side in zip(self.size, old)]}

    def transform(self, inpt, params: dict):
        return F.resize(inpt, params["size"], antialias=True)


class RandomCrop(nn.Module):
    """Crop to random sides, drawn uniformly from `sides` (lowest, highest) and at most those of the image.

    Boxes are clipped to the crop; boxes without remaining area are dropped with their labels.
    """

    def __init__(self, *, sides: tuple[int, int]) -> None:
        super().__init__()
        self.sides = sides

    def forward(self, image: tv_tensors.Image, target: dict) -> tuple[tv_tensors.Image, dict]:
        low, high = self.sides
        whole = F.get_size(image)
        height, width = (_randint(min(low, side), min(high, side)) for side in whole)
        top, left = _randint(0, whole[0] - height), _randint(0, whole[1] - width)
        boxes = F.crop(target["boxes"], top, left, height, width)
        keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
        target = {**target, "boxes": tv_tensors.wrap(boxes[keep], like=boxes), "labels": target["labels"][keep]}
        return F.crop(image, top, left, height, width), target


def normalize(images: Tensor) -> Tensor:
    """uint8 (..., 3, H, W) to float32: scale to 0..1, subtract ImageNet's mean, divide by its standard deviation."""
    # contiguous output whatever the memory format of the input
    images = images.to(torch.float32, memory_format=torch.contiguous_format)
    for colour, mean, std in zip(images.unbind(-3), IMAGENET_MEAN, IMAGENET_STD):  # Python numbers: no copy to the GPU
        colour.sub_(255 * mean).div_(255 * std)
    return images


class ByteImages(PaddedImages):
    """A batch in uint8, a quarter of the memory of floats, which `to` normalises on the device."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PaddedImages:  # type: ignore[override]
        """The network's input: float32, zero in the padding."""
        images, padding = (part.to(device, non_blocking=non_blocking) for part in (self.images, self.padding))
        return PaddedImages(normalize(images).masked_fill_(padding[:, None], 0), padding)

    def pin_memory(self) -> ByteImages:
        return ByteImages(self.images.pin_memory(), self.padding.pin_memory())


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Make PyTorch's random numbers on the CPU a function of `key` (integers >= 0) inside the context."""
    with torch.random.fork_rng(devices=[]):  # restores the state afterwards
        # torch.manual_seed would also seed the GPUs.
        torch.default_generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        yield


def _randint(low: int, high: int) -> int:
    """A random integer in low..high, both included."""
    return int(torch.randint(low, high + 1, ()))
