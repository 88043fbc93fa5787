"""Where the images and annotations of a split are, as the settings say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from samdetr.datasets.layouts.find import find_layout
from samdetr.datasets.layouts.source import Source
from samdetr.datasets.settings import Data
from samdetr.datasets.values import shown
from samdetr.util.settings import flags

SOURCE_FLAGS = ("data_format", "train_images", "train_annotations", "val_images", "val_annotations", "val_fraction")


def find_split(split: str, data: Data) -> Source | None:
    """The split "train", "val" or "test", None if there is none. Annotation files that the settings name come first;
    without an image folder of their own they are for the images of `coco_path`.

    Raises ValueError.
    """
    if data.dataset_file != "coco":
        raise ValueError(
            f"`dataset_file` {data.dataset_file!r} is unknown; 'coco' (any data set in COCO format) is known, other "
            "layouts are found by looking or named by `data_format`"
        )
    if not data.val_fraction or split == "test":
        return _named(split, data)
    train, val = _named("train", data), _named("val", data)
    if val:
        raise ValueError(
            f"`val_fraction` {data.val_fraction} holds out training images, but there is a validation split, "
            f"{shown(val.file)}; leave it out"
        )
    return train and train.parts(data.val_fraction)[split == "val"]


def require_split(split: str, data: Data) -> Source:
    """As `find_split`. Raises ValueError, too, if there is none."""
    found = find_split(split, data)
    if found:
        return found
    remedy = f"add it, or name its files with `{split}_images` and `{split}_annotations`"
    if split == "val":
        remedy += ", or hold out training images with `val_fraction` 0.1"
    if split == "test":
        remedy = "add it, or evaluate its files with `val_images` and `val_annotations`"
    raise ValueError(f"data folder {data.coco_path} has no {split} split; {remedy}")


def _named(split: str, data: Data) -> Source | None:
    images, annotations = {
        "train": (data.train_images, data.train_annotations),
        "val": (data.val_images, data.val_annotations),
    }.get(split, ("", ""))
    if images and not annotations:
        raise ValueError(f"`{split}_images` needs `{split}_annotations`, the file in COCO form that lists them")
    if images:
        return Source(Path(images), Path(annotations))
    elsewhere = data.train_images or data.val_images  # then `coco_path` may have nothing to do with these images
    if not annotations and elsewhere and (data.val_fraction or not Path(data.coco_path).exists()):
        return None
    splits = find_layout(Path(data.coco_path), data.data_format)[1]
    if not annotations:
        return splits.get(split)
    near = splits.get(split) or splits.get("train")
    if near is None:
        raise ValueError(f"`{split}_annotations` needs `{split}_images`, the folder of its images")
    return replace(near, file=Path(annotations), make=None)


def add_source_flags(add: Callable[..., Any]) -> None:
    """Add the flags that `find_split` reads, except for the folder, by `add`, a parser's `add_argument`."""
    for name in SOURCE_FLAGS:
        declared, default = dict(flags(Data))[name], getattr(Data, name)
        metavar = declared.metavar or (None if declared.choices else "X")
        add(f"--{name}", type=type(default), default=default, choices=declared.choices, metavar=metavar,
            help=declared.help)  # fmt: skip
