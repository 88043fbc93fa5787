"""Data sets for the detector. `build_dataset` is the one place of this package that reads command-line settings."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, distributed

from datasets.byte_images import ByteImages
from datasets.categories import Categories
from datasets.coco import CocoDetection
from datasets.transforms import EvalTransforms, TrainTransforms
from util.padded_images import pad_images
from util.targets import TargetBatch


def build_dataset(split: str, args: Namespace, categories: Categories | None = None) -> CocoDetection:
    """The split "train" or "val" of the data set at `args.coco_path`, in the folder layout of COCO 2017.

    Its images are uint8, which `collate` makes batches of. `categories` are those of the network, for a split other
    than the one that defined them. The main process also looks for damaged image files.

    Raises:
        ValueError: unknown `args.dataset_file`, or anything wrong with the data; one line each.
    """
    if args.dataset_file != "coco":
        raise ValueError(
            f"--dataset_file {args.dataset_file!r} is unknown; 'coco' (any data set in COCO format) is known"
        )
    root = Path(args.coco_path)
    if not root.is_dir():
        raise ValueError(
            f"data folder {root} does not exist; set --coco_path to a folder with train2017/, val2017/ and annotations/"
        )
    train = split == "train"
    if train:
        transforms = TrainTransforms(
            short_sides=args.train_sizes, max_size=args.max_size, crop=args.crop_augmentation, normalize=False
        )
    else:
        transforms = EvalTransforms(short_side=args.eval_size, max_size=args.max_size, normalize=False)
    dataset = CocoDetection(
        image_folder=root / f"{split}2017",
        annotation_file=root / "annotations" / f"instances_{split}2017.json",
        transforms=transforms,
        train=train,
        categories=categories,
        max_objects=args.num_queries,
        seed=args.seed,
    )
    if not distributed.is_initialized() or distributed.get_rank() == 0:
        dataset.check_files()
    if args.cache_mode:
        dataset.hold_files()
    return dataset


def collate(batch: Sequence[tuple[Tensor, dict[str, Tensor]]], *, multiple: int = 1) -> tuple[ByteImages, TargetBatch]:
    """Pad the images (uint8) of a batch to one size, of a `multiple` of so many pixels, and pack their targets.
    `to(device)` normalises the images."""
    images, targets = zip(*batch)
    padded = pad_images(images, multiple=multiple)
    return ByteImages(padded.images, padded.padding), TargetBatch.pack(targets)
