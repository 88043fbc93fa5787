"""Settings of the data: which images, at which size, how they are loaded."""

from __future__ import annotations

from dataclasses import dataclass

from samdetr.util.settings import Settings, flag


@dataclass(frozen=True, kw_only=True)
class Data(Settings):
    """A data set in COCO format and how it is read."""

    coco_path: str = flag("data/coco", "folder with train2017/, val2017/ and annotations/", metavar="FOLDER")
    dataset_file: str = flag("coco", "format of the data set; coco is the only one")
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
