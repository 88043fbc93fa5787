"""Image files to upright RGB pixels: every mode of PIL, EXIF orientation, and what is wrong with a file.

Pixels are the same whatever version of Pillow is installed. So nothing here relies on what versions do differently:
Pillow's own reading of EXIF and XMP, which fails for some files, and the mode that it chooses for grey of 16 bits.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from samdetr.util.regular_files import NotRegular, open_regular

# No other format is opened: some start programs, others are metafiles.
FORMATS = ("JPEG", "MPO", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
MAX_PIXELS = 178_956_970  # of one image: where Pillow suspects an attack
COMPLETE = [(b"\xff\xd8\xff", b"\xff\xd9"), (b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82")]  # first, last bytes of JPEG, PNG
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation; those from 5 on swap the axes


class WrongSize(ValueError):
    """The size of an image differs from that of its annotations."""


class TooLarge(ValueError):
    """An image has more than MAX_PIXELS."""


class FileFault(NamedTuple):
    """Why an image file cannot be used."""

    kind: str  # a key of datasets.check.report.KINDS
    reason: str


@contextmanager
def open_image(source: Path | BinaryIO) -> Iterator[Image.Image]:
    """The image in a regular file or a stream, before it is decoded. The only place that calls PIL's `open`.

    Raises TooLarge; otherwise as `open_regular` and PIL.
    """
    with open_regular(source) if isinstance(source, (str, os.PathLike)) else nullcontext(source) as file:
        try:
            try:
                image = Image.open(file, formats=_formats())
            except UnidentifiedImageError:  # some faults in the EXIF of a JPEG keep PIL from seeing that it is one
                file.seek(0)
                image = Image.open(_without_exif(file), formats=_formats())
        except Image.DecompressionBombError:
            raise TooLarge(f"it has more than {MAX_PIXELS:,} pixels; make it smaller or cut it") from None
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise TooLarge(
                    f"it has {image.width:,} x {image.height:,} pixels, more than {MAX_PIXELS:,} in all; make it "
                    "smaller or cut it"
                )
            yield image


def read_image(source: Path | BinaryIO, size: tuple[float, float] | None = None) -> Image.Image:
    """The image in a file or stream in mode RGB, turned upright according to its EXIF orientation.

    `size` (width, height) is the frame of the image's boxes. If only the stored pixels have that size, the image is not
    turned, because the boxes were drawn on the stored pixels.

    Raises:
        WrongSize: neither the stored nor the upright image has `size`.
        Exception: as `open_image`, and whatever PIL raises for a file that it cannot decode.
    """
    with open_image(source) as image:
        return decode(image, size)


def decode(image: Image.Image, size: tuple[float, float] | None = None) -> Image.Image:
    """What `read_image` makes of an open image."""
    image.load()
    turn = _turn(image, size)
    rgb = to_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def glance(path: Path, size: tuple[float, float] | None = None) -> FileFault | None:
    """What `read_image` would find wrong with a file, except damage in the middle: the image is decoded only if the
    ends of the file do not show it to be complete, or if its size does not fit."""
    try:
        head, tail, _ = _ends(path)
        with open_image(path) as image:
            complete = any(head.startswith(begin) and tail.endswith(end) for begin, end in COMPLETE)
            if not complete or size not in (None, image.size):
                decode(image, size)
    except MemoryError:
        raise
    except Exception as error:  # PIL raises many kinds for a broken file
        return fault_of(path, error)
    return None


def fault_of(path: Path, error: Exception) -> FileFault:
    """What `error`, raised for the image file `path`, says about the file."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        reason = "it is no image that PIL knows"  # PIL's own message contains memory addresses
    if isinstance(error, (WrongSize, TooLarge)):
        return FileFault("image_size" if isinstance(error, WrongSize) else "huge_image", reason)
    try:
        head, tail, length = _ends(path)
    except FileNotFoundError as failure:
        return FileFault("missing_image", "there is no such file" if failure.errno else str(failure))
    except NotRegular as failure:
        return FileFault("special_file", str(failure))
    except (OSError, ValueError) as failure:  # ValueError: a name that no file can have
        return FileFault("unreadable_image", " ".join(str(failure).split()))
    if not length:
        return FileFault("zero_byte_image", "the file is empty")
    cut = any((head.startswith(b) or b.startswith(head)) and not tail.endswith(e) for b, e in COMPLETE)
    if head.startswith(b"RIFF"):  # WebP, whose header holds the length
        cut = length < 8 + int.from_bytes(head[4:8], "little")
    return FileFault("truncated_image" if cut or "truncated" in reason.lower() else "unreadable_image", reason)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB. Transparent parts are drawn over white. Of grey in 16 or 12 bits the upper 8 are kept. Other
    integers and floats, whose range no format defines, are stretched from their smallest to their largest value."""
    deep = deep_grey(image)
    if deep is not None:
        values, bits = deep
        image = Image.fromarray((values >> (bits - 8)).clip(0, 255).astype(np.uint8))
    elif image.mode in ("I", "F"):
        stretched = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
        stretched -= stretched.min()
        image = Image.fromarray((stretched * (255 / max(stretched.max(), 1e-12))).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def deep_grey(image: Image.Image) -> tuple[np.ndarray, int] | None:
    """Values and bits of a loaded grey image whose format says that it has more than 8 bits, else None.

    Pillow reads a PNG of 16 bits in mode I before version 11, in mode I;16 since then; and it scales a PGM to 16 bits.
    """
    if image.mode.startswith("I;16"):
        declared = tuple(getattr(image, "tag_v2", {}).get(258, ()))  # TIFF's bits per sample
        return np.asarray(image), 12 if declared == (12,) else 16
    return (np.asarray(image), 16) if image.mode == "I" and image.format in ("PNG", "PPM") else None


def orientation_of(image: Image.Image) -> tuple[int, tuple[int, int]]:
    """The EXIF orientation of a loaded image (1 if there is none that can be read), and (width, height) upright."""
    orientation = _exif_orientation(image.info)
    return orientation, image.size[::-1] if orientation >= 5 else image.size


def _exif_orientation(info: dict) -> int:
    """Tag 0x0112 of the first directory of an EXIF block, read here because Pillow fails for blocks with faults
    elsewhere. A TIFF has no block: Pillow turns it when it decodes."""
    block = info.get("exif")
    if not isinstance(block, bytes):
        try:  # ImageMagick's form in a PNG: three lines, then hexadecimal digits
            block = bytes.fromhex("".join(str(info.get("Raw profile type exif", "")).split("\n")[3:]))
        except ValueError:
            return 1
    block = block.removeprefix(b"Exif\0\0")
    if block[:2] not in (b"II", b"MM"):
        return 1

    def number(place: int, length: int) -> int:
        return int.from_bytes(block[place : place + length], "little" if block[:1] == b"I" else "big")

    start = number(4, 4)
    for entry in range(start + 2, min(start + 2 + 12 * number(start, 2), len(block) - 11), 12):
        if number(entry, 2) == 0x0112:
            length = {1: 1, 3: 2, 4: 4}.get(number(entry + 2, 2), 0)  # of a byte, short or long
            value = number(entry + 8, length)
            return value if value in range(1, 9) else 1
    return 1


def _without_exif(file: BinaryIO) -> BinaryIO:
    """A JPEG without its segments of EXIF and XMP, or the file itself."""
    if file.read(2) != b"\xff\xd8":
        file.seek(0)
        return file
    parts = [b"\xff\xd8"]
    while len(head := file.read(4)) == 4 and head[0] == 0xFF and head[1] != 0xDA:  # until the pixels begin
        segment = file.read(max(0, int.from_bytes(head[2:], "big") - 2))
        parts += [head, segment] if head[1] != 0xE1 else []
    return io.BytesIO(b"".join([*parts, head, file.read()]))


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _ends(path: Path) -> tuple[bytes, bytes, int]:
    """The first and last 8 bytes of a file, and its length."""
    with open_regular(path) as file:
        head = file.read(8)
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - 8))
        return head, file.read(), length


def _turn(image: Image.Image, size: tuple[float, float] | None) -> Image.Transpose | None:
    """How the EXIF orientation turns a loaded image, unless `size` overrides it; see `read_image`. Raises WrongSize."""
    orientation, turned = orientation_of(image)
    if size is not None and size not in (image.size, turned):
        raise WrongSize(
            f"it is {turned[0]} x {turned[1]} pixels, but its annotations were made for {size[0]:g} x {size[1]:g}"
        )
    return TURNS.get(orientation) if size in (None, turned) else None
