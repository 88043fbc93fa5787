"""Everything that `Predictor.predict` takes as an image: files, folders, patterns, URLs, pictures, arrays, tensors."""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from samdetr.datasets.images import decode, fault_of, read_image
from samdetr.util.download import read_url

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"}
VIDEOS = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".mts", ".3gp"}
DRAWN = "det_res_"  # names of pictures that demo.py has drawn begin so; in a folder they are no input
LARGEST = 2**29  # bytes of an image that a URL sends


@dataclass(frozen=True)
class Source:
    """An image that is read when it is needed.

    Attributes:
        name: file name, or "image_N" for what comes without one.
        folder: where its file is; the current folder for what is no file.
        read: the image in RGB, upright. Raises ValueError, naming the file or URL, if it cannot be read.
    """

    name: str
    folder: Path
    read: Callable[[], Image.Image]

    @property
    def path(self) -> Path:
        return self.folder / self.name

    def held(self) -> Source:
        """The same with the image in memory. Raises ValueError if it cannot be read."""
        image = self.read()
        return replace(self, read=lambda: image)


def find_images(images: Any, *, allow_http: bool = False) -> tuple[list[Source], bool]:
    """The images that `images` stands for, and whether it is a single one. Files are not opened yet.

    A folder stands for its image files in the order of their names, a pattern for the files that match it, a list for
    all that its items stand for. `allow_http`: whether a URL may be http to another machine.

    Raises:
        ValueError: no such file, nothing found in a folder or by a pattern, or values that are no image.
    """
    if isinstance(images, (list, tuple)):
        return [source for index, item in enumerate(images) for source in _find(item, index, allow_http)[0]], False
    return _find(images, 0, allow_http)


def _find(item: Any, index: int, allow_http: bool) -> tuple[list[Source], bool]:
    if isinstance(item, Source):
        return [item], True
    if is_url(item):
        return [from_url(item, allow_http=allow_http)], True
    if isinstance(item, (str, os.PathLike)):
        paths, single = find_files(Path(item))
        return [from_file(path) for path in paths], single
    image = _to_picture(item)
    return [Source(f"image_{index}", Path(), lambda: image)], True


def is_url(item: Any) -> bool:
    return isinstance(item, str) and item.lower().startswith(("http://", "https://"))


def find_files(path: Path, suffixes: Collection[str] = SUFFIXES) -> tuple[list[Path], bool]:
    """The files that a path stands for, as of `find_images`, and whether it is a single file. `suffixes`: of the files
    in a folder. Raises ValueError."""
    try:
        if path.is_file():
            return [path], True
        if path.is_dir():
            paths = [p for p in path.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith((DRAWN, "."))]
            if not paths:
                raise ValueError(f"`images` {path} holds no image ({', '.join(sorted(suffixes))})")
        elif path.exists():
            raise ValueError(f"`images` {path} is neither a regular file nor a folder")
        elif glob.has_magic(str(path)):
            found = [p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file()]
            paths = [p for p in found if not p.name.startswith(DRAWN) or path.name.startswith(DRAWN)]
            if not paths:
                raise ValueError(f"`images` {path}: no file matches this pattern")
        else:
            raise ValueError(f"`images` {path}: no such file or folder")
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise ValueError(f"`images` {path} cannot be read: {error.strerror or error}") from None
    return sorted(paths), False


def from_file(path: Path) -> Source:
    def read() -> Image.Image:
        try:
            return read_image(path)
        except MemoryError:
            raise
        except Exception as error:  # PIL raises many kinds for a damaged file
            raise ValueError(f"{path} cannot be read ({fault_of(path, error)[1]}); replace or remove it") from error

    if path.suffix.lower() in VIDEOS:
        raise ValueError(f"`images` {path} is a video, which `samdetr predict` reads; here pass images")
    return Source(path.name, path.parent, read)


def from_url(url: str, *, allow_http: bool = False) -> Source:
    return Source(name_of(url) or "image", Path(), cache(partial(_fetch, url, allow_http)))


def name_of(url: str) -> str:
    """The file name at the end of a URL, which may be "". Raises ValueError."""
    try:
        return unquote(urlsplit(url).path).rstrip("/").rsplit("/", 1)[-1]
    except ValueError as error:
        raise ValueError(f"`images` {url} is no URL: {error}") from None


def _fetch(url: str, allow_http: bool) -> Image.Image:
    try:
        content = read_url(url, largest=LARGEST, allow_http=allow_http)
    except ValueError as error:
        raise ValueError(f"`images` {error}") from None
    try:
        return read_image(io.BytesIO(content))
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"`images` {url} is no image that can be read: {error}") from error


def _to_picture(image: Any) -> Image.Image:
    """A picture, an array (H, W, 3) or a tensor (3, H, W) as an upright picture in RGB. Raises ValueError."""
    if isinstance(image, Image.Image):
        return decode(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise ValueError(f"`images` holds an array of {image.dtype}; arrays are uint8, 0 to 255, in RGB")
        _check_shape("an array", image.shape, colours=2, wanted="(height, width, 3)", remedy="transpose(1, 2, 0)")
        return Image.fromarray(np.ascontiguousarray(image))
    if isinstance(image, Tensor):
        wanted = "(3, height, width)"
        _check_shape("a tensor", tuple(image.shape), colours=0, wanted=wanted, remedy="permute(2, 0, 1)")
        return Image.fromarray(_as_bytes(image.detach().cpu()).permute(1, 2, 0).contiguous().numpy())
    raise ValueError(
        f"`images` holds a {type(image).__name__}; pass a file, folder, pattern or URL, a PIL image, an array "
        "(height, width, 3), a tensor (3, height, width), or a list of these"
    )


def _as_bytes(image: Tensor) -> Tensor:
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        raise ValueError(f"`images` holds a tensor of {image.dtype}; tensors are uint8, or floating point from 0 to 1")
    low, high = image.min().item(), image.max().item()
    if not 0 <= low <= high <= 1:  # false for NaN, too
        raise ValueError(
            f"`images` holds a floating-point tensor from {low:g} to {high:g}; colours go from 0 to 1, not normalised "
            "(for 0 to 255 pass uint8)"
        )
    return (image.float() * 255).round().to(torch.uint8)


def _check_shape(what: str, shape: tuple[int, ...], *, colours: int, wanted: str, remedy: str) -> None:
    """Require three colours at axis `colours` of three, and nowhere else where an image could have them."""
    here, there = (shape[colours] == 3, shape[2 - colours] == 3) if len(shape) == 3 else (False, False)
    if here and not there and 0 not in shape:
        return
    if here and there:
        hint = "is ambiguous, pass a PIL image"
    else:
        batch = ", pass a list of images for a batch" if len(shape) == 4 else ""
        hint = f"is not {wanted}" + (f", use {remedy}" if there else batch)
    raise ValueError(f"`images` holds {what} whose shape {shape} {hint}")
