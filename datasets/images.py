"""Image files to upright RGB pixels: every mode of PIL, EXIF orientation, and what is wrong with a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

COMPLETE = [(b"\xff\xd8\xff", b"\xff\xd9"), (b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82")]  # first, last bytes of JPEG, PNG


class WrongSize(ValueError):
    """The size of an image differs from that of its annotations."""


class FileFault(NamedTuple):
    """Why an image file cannot be used."""

    kind: str  # a key of datasets.check.report.KINDS
    reason: str


def read_image(source: Path | BinaryIO, size: tuple[float, float] | None = None) -> Image.Image:
    """The image in a file or stream in mode RGB, turned upright according to its EXIF orientation.

    `size` (width, height) is the frame of the image's boxes. If only the stored pixels have that size, the image is not
    turned, because the boxes were drawn on the stored pixels.

    Raises:
        WrongSize: neither the stored nor the upright image has `size`.
        Exception: whatever PIL raises for a file that it cannot decode.
    """
    with Image.open(source) as image:
        turn = _turns(image, size)
        image.load()
        return to_rgb(ImageOps.exif_transpose(image) if turn else image)


def glance(path: Path, size: tuple[float, float] | None = None) -> FileFault | None:
    """What `read_image` would find wrong with a file, except damage in the middle: the image is decoded only if the
    ends of the file do not show it to be complete."""
    try:
        head, tail, _ = _ends(path)
        with Image.open(path) as image:
            if size not in (None, image.size):  # PIL decodes a PNG to find its orientation: only if necessary
                _turns(image, size)
            if not any(head.startswith(begin) and tail.endswith(end) for begin, end in COMPLETE):
                image.load()
    except Exception as error:  # PIL raises many kinds for a broken file
        return fault_of(path, error)
    return None


def fault_of(path: Path, error: Exception) -> FileFault:
    """What `error`, raised for the image file `path`, says about the file."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        reason = "it is no image that PIL knows"  # PIL's own message contains memory addresses
    if isinstance(error, WrongSize):
        return FileFault("image_size", reason)
    try:
        head, tail, length = _ends(path)
    except FileNotFoundError:
        return FileFault("missing_image", "there is no such file")
    except (OSError, ValueError) as failure:  # ValueError: a name that no file can have
        return FileFault("unreadable_image", " ".join(str(failure).split()))
    if not length:
        return FileFault("zero_byte_image", "the file is empty")
    cut = any((head.startswith(b) or b.startswith(head)) and not tail.endswith(e) for b, e in COMPLETE)
    if head.startswith(b"RIFF"):  # WebP, whose header holds the length
        cut = length < 8 + int.from_bytes(head[4:8], "little")
    return FileFault("truncated_image" if cut or "truncated" in reason.lower() else "unreadable_image", reason)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB. Transparent parts are drawn over white. Of 16 bits the upper 8 are kept. 32-bit integers and
    floats, whose range no format defines, are stretched from their smallest to their largest value."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        values -= values.min()
        image = Image.fromarray((values * (255 / max(values.max(), 1e-12))).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def orientation_of(image: Image.Image) -> tuple[int, tuple[int, int]]:
    """The EXIF orientation (1 if there is none), and (width, height) of the upright image."""
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation, image.size[::-1] if orientation in (5, 6, 7, 8) else image.size  # these four swap the axes


def _ends(path: Path) -> tuple[bytes, bytes, int]:
    """The first and last 8 bytes of a file, and its length."""
    with open(path, "rb") as file:
        head = file.read(8)
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - 8))
        return head, file.read(), length


def _turns(image: Image.Image, size: tuple[float, float] | None) -> bool:
    """Whether to apply the EXIF orientation, which `size` overrides; see `read_image`. Raises WrongSize."""
    orientation, upright = orientation_of(image)
    if size is not None and size not in (image.size, upright):
        raise WrongSize(
            f"it is {upright[0]} x {upright[1]} pixels, but its annotations were made for {size[0]:g} x {size[1]:g}"
        )
    return orientation != 1 and size in (None, upright)
