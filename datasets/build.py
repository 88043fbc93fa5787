"""Data sets and batches for the detector."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from samdetr.datasets.annotations import Annotations, split_paths
from samdetr.datasets.categories import Categories
from samdetr.datasets.coco import CocoDetection
from samdetr.datasets.settings import Data
from samdetr.datasets.transforms import ByteImages, EvalTransforms, TrainTransforms
from samdetr.util.distributed import is_main
from samdetr.util.padded_images import pad_images
from samdetr.util.targets import TargetBatch


def read_split(split: str, data: Data) -> Annotations:
    """Read the annotation file of the split "train" or "val", in the folder layout of COCO 2017.

    Raises:
        ValueError: unknown `dataset_file`, a missing folder or file, or a file that is not in COCO format.
    """
    if data.dataset_file != "coco":
        raise ValueError(
            f"`dataset_file` {data.dataset_file!r} is unknown; 'coco' (any data set in COCO format) is known"
        )
    root = Path(data.coco_path)
    if not root.is_dir():
        raise ValueError(
            f"data folder {root} does not exist; set `coco_path` to a folder with train2017/, val2017/ and annotations/"
        )
    return Annotations.read(split_paths(root, split)[1])


def build_dataset(
    split: str,
    data: Data,
    *,
    annotations: Annotations | None = None,
    categories: Categories | None = None,
    seed: int = 42,
) -> CocoDetection:
    """The split "train" or "val". Its images are uint8; `collate` makes batches of them.

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
    folder, file = split_paths(Path(data.coco_path), split)
    dataset = CocoDetection(
        image_folder=folder,
        annotation_file=file,
        transforms=kind(**options, max_size=data.max_size, normalize=False),
        train=train,
        categories=categories,
        seed=seed,
        annotations=annotations or read_split(split, data),
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
