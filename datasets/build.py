"""Data sets and batches for the detector."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from samdetr.datasets.annotations import Annotations
from samdetr.datasets.categories import Categories
from samdetr.datasets.coco import CocoDetection
from samdetr.datasets.settings import Data
from samdetr.datasets.sources import require_split
from samdetr.datasets.transforms import ByteImages, EvalTransforms, TrainTransforms
from samdetr.util.distributed import is_main
from samdetr.util.padded_images import pad_images
from samdetr.util.targets import TargetBatch


def read_split(split: str, data: Data, *, unannotated: bool = False) -> Annotations:
    """Read the annotations of the split "train", "val" or "test".

    Raises:
        ValueError: a missing folder or file, one that cannot be read, or no annotations, unless `unannotated`.
    """
    return require_split(split, data).read(unannotated=unannotated)


def build_dataset(
    split: str,
    data: Data,
    *,
    annotations: Annotations | None = None,
    categories: Categories | None = None,
    seed: int = 42,
) -> CocoDetection:
    """The split "train", "val" or "test". Its images are uint8; `collate` makes batches of them.

    Every process of a run must call this. The main process checks every image file: see `CocoDetection.check_files`.

    Args:
        annotations: what `read_split` returned, if it was called already.
        categories: those of the network, for a split that does not define them.
        seed: of the augmentation.

    Raises:
        ValueError: anything wrong with the data, in one line.
    """
    train = split == "train"
    options = (
        {"short_sides": data.train_sizes, "crop": data.crop_augmentation} if train else {"short_side": data.eval_size}
    )
    kind = TrainTransforms if train else EvalTransforms
    source = require_split(split, data)
    dataset = CocoDetection(
        image_folder=source.folder,
        annotation_file=source.file,
        transforms=kind(**options, max_size=data.max_size, normalize=False),
        train=train,
        categories=categories,
        seed=seed,
        annotations=annotations or source.read(),
        allow_outside=data.allow_outside,
    )
    if is_main():
        dataset.check_files()
    if data.cache_mode:
        dataset.hold_files()
    return dataset


def collate(batch: Sequence[tuple[Tensor, dict[str, Tensor]]], *, multiple: int = 1) -> tuple[ByteImages, TargetBatch]:
    """Pad the images (uint8) of a batch to one size, a `multiple` in pixels, and pack their targets.

    `to(device)` of the images normalises them.
    """
    images, targets = zip(*batch)
    padded = pad_images(images, multiple=multiple)
    return ByteImages(padded.images, padded.padding), TargetBatch.pack(targets)
