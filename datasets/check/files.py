"""What is wrong with the image files of a split. Each is decoded, or only its ends are read."""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from samdetr.datasets.check.report import Finding
from samdetr.datasets.images import decode, deep_grey, fault_of, glance, open_image, orientation_of
from samdetr.datasets.names import alike, folder_holds, image_files, leaves_folder, meant
from samdetr.datasets.values import quoted, shown


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
    contrast: str | None = None  # "narrow_range"
    new_name: str | None = None  # of the file that a wrong name means


def inspect_files(
    folder: Path,
    sizes: dict[str, tuple[float, float] | None],
    *,
    full: bool,
    num_workers: int = 16,
    allow_outside: bool = False,
) -> dict[str, FileState]:
    """Inspect the files of a folder; `sizes` maps their names to (width, height) in the annotation file.

    Names that leave the folder are not opened, unless `allow_outside`.
    """

    def look(name: str, size: tuple[float, float] | None) -> FileState:
        if leaves_folder(name) and not allow_outside:
            return FileState("outside_image")
        return (_decode if full else _glance)(folder / name, size)

    # Threads suffice: decoding, hashing and reading release the interpreter's lock.
    with warnings.catch_warnings(), ThreadPoolExecutor(max_workers=max(1, num_workers)) as pool:
        warnings.simplefilter("ignore")  # PIL warns about unusual but readable files
        found = pool.map(look, sizes, sizes.values())
        quiet = not full or not sys.stderr.isatty()
        states = dict(zip(sizes, tqdm(found, total=len(sizes), desc=shown(folder), disable=quiet)))
    return with_names(folder, states, sizes)


def with_names(
    folder: Path, states: dict[str, FileState], sizes: dict[str, tuple[float, float] | None]
) -> dict[str, FileState]:
    """The states, with what missing files and those outside may be in the folder under another name."""
    lost = [name for name, state in states.items() if state.fault in ("missing_image", "outside_image")]
    found = alike(folder, lost, states)
    new_names = meant(found)
    for name in lost:
        state, new = states[name], new_names.get(name)
        reason = f"{state.reason}{folder_holds(found[name])}".removeprefix(", but ")
        if new and not glance(folder / new, sizes[name]):
            state = replace(state, fault="image_name", new_name=new)
        states[name] = replace(state, reason=reason)
    return states


def file_findings(
    states: dict[str, FileState], *, split: str, ids: dict[str, int], removed: Iterable[str]
) -> list[Finding]:
    """Findings about the files that a split lists; `ids` maps file names to image ids."""
    by_kind: dict[str, list[str]] = defaultdict(list)
    same: dict[bytes, list[str]] = defaultdict(list)
    for name, state in states.items():
        for kind in filter(None, (state.fault, state.orientation, state.contrast)):
            by_kind[kind].append(f"{quoted(name)} (image id {ids[name]}){state.reason and ': '}{state.reason}")
        if state.pixels:
            same[state.pixels].append(name)
    by_kind["removed_image"] = [quoted(name) for name in removed]
    by_kind["repeated_image"] = [", ".join(map(quoted, names)) for names in same.values() if len(names) > 1]
    return [finding for kind, items in by_kind.items() for finding in Finding.of(kind, split, items, str)]


def shared_pixels(train: dict[str, FileState], val: dict[str, FileState]) -> list[tuple[str, str]]:
    """Pairs of (train, val) file names with the same pixels, each training file once."""
    in_val = {state.pixels: name for name, state in val.items() if state.pixels}
    return [(name, in_val[state.pixels]) for name, state in train.items() if state.pixels in in_val]


def unlisted_files(folder: Path, listed: Iterable[str]) -> list[str]:
    """Image files below `folder` that are not `listed`."""
    known = {os.path.normpath(name) for name in listed}
    return [name for name in image_files(folder) if name not in known]


def _glance(path: Path, size: tuple[float, float] | None) -> FileState:
    fault = glance(path, size)
    return FileState(*fault) if fault else FileState(size=size)


def _decode(path: Path, size: tuple[float, float] | None) -> FileState:
    try:
        with open_image(path) as image:
            decode(image)  # all that the reader does
            orientation, upright = orientation_of(image)
            palette = bytes(image.palette.palette) if image.palette else b""
            digest = hashlib.blake2b(f"{image.mode} {image.size} {orientation}".encode() + palette, digest_size=16)
            digest.update(image.tobytes())
            deep = deep_grey(image)
        pixels = digest.digest()
        if size is not None and size not in (image.size, upright):
            text = f"{size[0]:g} x {size[1]:g} in the annotation file, {upright[0]} x {upright[1]} in the image file"
            return FileState("image_size", text, pixels=pixels, file_size=upright)
        turned = ("exif_turned" if size in (None, upright) else "exif_size") if orientation != 1 else None
        narrow = deep is not None and np.ptp(deep[0].astype(np.int64)) < 2 ** deep[1] / 16
        return FileState(
            size=size or upright, pixels=pixels, file_size=upright, orientation=turned,
            contrast="narrow_range" if narrow else None,
        )  # fmt: skip
    except MemoryError:
        raise
    except Exception as error:  # PIL raises many kinds for a broken file
        return FileState(*fault_of(path, error))
