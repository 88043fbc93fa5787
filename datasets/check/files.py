"""What is wrong with the image files of a split. Each is decoded, or only its ends are read."""

from __future__ import annotations

import hashlib
import io
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from samdetr.datasets.check.report import Finding
from samdetr.datasets.images import fault_of, glance, orientation_of

ENDINGS = (".jpg", ".jpeg", ".jpe", ".jp2", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")


@dataclass(frozen=True)
class FileState:
    """What is known about an image file. `size` is the (width, height) of the frame that boxes lie in; `pixels` is a
    hash of the decoded image."""

    fault: str | None = None
    reason: str = ""
    size: tuple[float, float] | None = None
    pixels: bytes | None = None
    file_size: tuple[int, int] | None = None  # upright
    orientation: str | None = None  # "exif_turned" or "exif_size"


def inspect_files(
    folder: Path, sizes: dict[str, tuple[float, float] | None], *, full: bool, num_workers: int = 16
) -> dict[str, FileState]:
    """Inspect the files of a folder; `sizes` maps their names to (width, height) in the annotation file."""
    look = _decode if full else _glance  # threads suffice: decoding, hashing and reading release the interpreter's lock
    with warnings.catch_warnings(), ThreadPoolExecutor(max_workers=max(1, num_workers)) as pool:
        warnings.simplefilter("ignore")  # PIL warns about unusual but readable files
        states = pool.map(look, [folder / name for name in sizes], sizes.values())
        quiet = not full or not sys.stderr.isatty()
        return dict(zip(sizes, tqdm(states, total=len(sizes), desc=str(folder), disable=quiet)))


def file_findings(
    states: dict[str, FileState], *, split: str, ids: dict[str, int], removed: Iterable[str]
) -> list[Finding]:
    """Findings about the files that a split lists; `ids` maps file names to image ids."""
    by_kind: dict[str, list[str]] = defaultdict(list)
    same: dict[bytes, list[str]] = defaultdict(list)
    for name, state in states.items():
        for kind in filter(None, (state.fault, state.orientation)):
            by_kind[kind].append(f"{name!r} (image id {ids[name]}){state.reason and ': '}{state.reason}")
        if state.pixels:
            same[state.pixels].append(name)
    by_kind["removed_image"] = [repr(name) for name in removed]
    by_kind["repeated_image"] = [", ".join(map(repr, names)) for names in same.values() if len(names) > 1]
    return [finding for kind, items in by_kind.items() for finding in Finding.of(kind, split, items, str)]


def shared_pixels(train: dict[str, FileState], val: dict[str, FileState]) -> list[tuple[str, str]]:
    """Pairs of (train, val) file names with the same pixels, each training file once."""
    in_val = {state.pixels: name for name, state in val.items() if state.pixels}
    return [(name, in_val[state.pixels]) for name, state in train.items() if state.pixels in in_val]


def unlisted_files(folder: Path, listed: Iterable[str]) -> list[str]:
    """Image files (by their endings) below `folder` that are not `listed`. Hidden files and folders are ignored."""
    known = {os.path.normpath(name) for name in listed}
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = os.path.relpath(place, folder)
        for name in files:
            path = os.path.normpath(os.path.join(below, name))
            if name.lower().endswith(ENDINGS) and not name.startswith(".") and path not in known:
                found.append(path)
    return sorted(found)


def _glance(path: Path, size: tuple[float, float] | None) -> FileState:
    fault = glance(path, size)
    return FileState(*fault) if fault else FileState(size=size)


def _decode(path: Path, size: tuple[float, float] | None) -> FileState:
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            stored = image.size
            image.load()
            orientation, upright = orientation_of(image)
            palette = bytes(image.palette.palette) if image.palette else b""
            digest = hashlib.blake2b(f"{image.mode} {stored} {orientation}".encode() + palette, digest_size=16)
            digest.update(image.tobytes())
        pixels = digest.digest()
        if size is not None and size not in (stored, upright):
            text = f"{size[0]:g} x {size[1]:g} in the annotation file, {upright[0]} x {upright[1]} in the image file"
            return FileState("image_size", text, pixels=pixels, file_size=upright)
        turned = ("exif_turned" if size in (None, upright) else "exif_size") if orientation != 1 else None
        return FileState(size=size or upright, pixels=pixels, file_size=upright, orientation=turned)
    except MemoryError:
        raise
    except Exception as error:  # PIL raises many kinds for a broken file
        return FileState(*fault_of(path, error))
