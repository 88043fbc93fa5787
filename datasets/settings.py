"""Settings of the data: which images, at which size, how they are loaded."""

from __future__ import annotations

from dataclasses import dataclass

from samdetr.datasets.layouts.find import LAYOUTS
from samdetr.util.settings import Settings, flag


@dataclass(frozen=True, kw_only=True)
class Data(Settings):
    """A data set and how it is read."""

    coco_path: str = flag(
        "data/coco", "folder of the data set, in one of the layouts of docs/data.md", metavar="FOLDER"
    )
    data_format: str = flag("auto", "layout of the data set; auto: found by looking", choices=("auto", *LAYOUTS))
    train_images: str = flag("", "folder of the training images, if not that of the layout", metavar="FOLDER")
    train_annotations: str = flag("", "their annotation file, in COCO form", metavar="FILE")
    val_images: str = flag("", "folder of the validation images, if not that of the layout", metavar="FOLDER")
    val_annotations: str = flag("", "their annotation file, in COCO form", metavar="FILE")
    val_fraction: float = flag(
        0.0, "hold out this share of the training images for validation, by a hash of the file name", least=0, below=1
    )
    split: str = flag("val", "split that --eval evaluates on", choices=("val", "test"))
    dataset_file: str = flag("coco", "only coco is known; --data_format names layouts")
    train_sizes: tuple[int, ...] = flag(
        tuple(range(480, 801, 32)), "short sides drawn from in training", least=1, most=2**14, metavar="PIXELS"
    )
    eval_size: int = flag(800, "short side in evaluation", least=1, most=2**14, metavar="PIXELS")
    max_size: int = flag(1333, "longest side", least=1, most=2**14, metavar="PIXELS")
    crop_augmentation: bool = flag(True, "no random crops in training", off=("--no_crop",))
    cache_mode: bool = flag(False, "hold the image files in memory, once per node")
    num_workers: int = flag(2, "processes that load images, for each training process", least=0)
    max_bad_images: float = flag(
        0.001, "share of the training images that may be unreadable; others replace them", least=0, most=1
    )
    allow_outside: bool = flag(False, "read image files whose names leave the image folder")
    pad_to_multiple: int = flag(
        1, "pad batches to multiples of this many pixels", least=1, most=2**14, metavar="PIXELS"
    )
    size_buckets: int = flag(
        0,
        "train on batches of like aspect ratio, from N buckets, so that less is padded; 0 or 1: off",
        least=0,
        most=2**14,
        metavar="N",
    )
