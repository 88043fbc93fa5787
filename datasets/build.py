"""Data sets for the detector. `build_dataset` is the one place of this package that reads command-line settings."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, distributed

from samdetr.datasets.byte_images import ByteImages
from samdetr.datasets.categories import Categories
from samdetr.datasets.check.files import FileState
from samdetr.datasets.check.splits import check_split, places, start_lines
from samdetr.datasets.coco import CocoDetection, read_annotations
from samdetr.datasets.transforms import EvalTransforms, TrainTransforms
from samdetr.util.padded_images import pad_images
from samdetr.util.targets import TargetBatch


def build_dataset(split: str, args: Namespace, categories: Categories | None = None) -> CocoDetection:
    """The split "train" or "val" of the data set at `args.coco_path`, in the folder layout of COCO 2017.

    Its images are uint8, which `collate` makes batches of. `categories` are those of the network, for a split other
    than the one that defined them. The main process also looks for damaged image files and for what is odd about the
    data: `start_report` tells.

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
    folder, file = places(root, split)
    content = read_annotations(file)
    dataset = CocoDetection(
        image_folder=folder,
        annotation_file=file,
        transforms=transforms,
        train=train,
        categories=categories,
        max_objects=args.num_queries,
        seed=args.seed,
        content=content,
    )
    if not distributed.is_initialized() or distributed.get_rank() == 0:
        dataset.check_files()
        states = {record.file_name: FileState(size=record.size) for record in dataset.images}
        for index, state in dataset.known_faults.items():
            states[dataset.images[index].file_name] = state
        dataset.report = check_split(content, states, split=split, folder=folder, num_queries=args.num_queries)
    if args.cache_mode:
        dataset.hold_files()
    return dataset


def start_report(*datasets: CocoDetection | None) -> list[str]:
    """Lines about what is wrong or odd with the data of a run, as far as it shows without decoding images. The data
    sets, as `build_dataset` made them, then forget it."""
    splits = [dataset.report for dataset in datasets if dataset and dataset.report]
    for dataset in filter(None, datasets):
        dataset.report = None
    lines = start_lines(splits)
    if lines:
        root = splits[0].folder.parent
        lines.append(
            f"python -m datasets.check {root} shows all, decodes images too, and repairs what it can with --fix"
        )
    return lines


def collate(batch: Sequence[tuple[Tensor, dict[str, Tensor]]], *, multiple: int = 1) -> tuple[ByteImages, TargetBatch]:
    """Pad the images (uint8) of a batch to one size, of a `multiple` of so many pixels, and pack their targets.
    `to(device)` normalises the images."""
    images, targets = zip(*batch)
    padded = pad_images(images, multiple=multiple)
    return ByteImages(padded.images, padded.padding), TargetBatch.pack(targets)
