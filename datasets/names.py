"""File names in annotations that are no file's, but nearly; and names that lead out of the image folder."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from samdetr.datasets.values import quoted

ENDINGS = (".jpg", ".jpeg", ".jpe", ".jp2", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")


def leaves_folder(name: str) -> bool:
    """Whether a file name leads out of the image folder. Links inside the folder may lead anywhere."""
    return os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir


def image_files(folder: Path) -> list[str]:
    """Image files (by their endings) below `folder`. Hidden files and folders are ignored."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = os.path.relpath(place, folder)
        names = (name for name in files if name.lower().endswith(ENDINGS) and not name.startswith("."))
        found += [os.path.normpath(os.path.join(below, name)) for name in names]
    return sorted(found)


def alike(folder: Path, missing: Sequence[str], listed: Iterable[str]) -> dict[str, list[str]]:
    """For each name that is not in the folder: image files there that it may mean and that no entry lists.

    Names are compared in one Unicode form, without regard to case, and with / for \\; if nothing is found, without
    folders as well; then without endings. A name means a file if `meant` says so.
    """
    known = {os.path.normpath(name) for name in listed} if missing else set()
    files = [name for name in image_files(folder) if name not in known] if missing else []
    found: dict[str, list[str]] = {name: [] for name in missing}
    for key in (_in_one_form, _without_folders, _without_ending):
        by_key = defaultdict(list)
        for file in files:
            by_key[key(file)].append(file)
        found |= {name: by_key[key(name)] for name, candidates in found.items() if not candidates}
    return found


def meant(found: dict[str, list[str]]) -> dict[str, str]:
    """The names that can mean a single file, which no other name can mean."""
    claims = Counter(file for files in found.values() for file in files)
    return {name: files[0] for name, files in found.items() if len(files) == 1 and claims[files[0]] == 1}


def folder_holds(files: Sequence[str]) -> str:
    """How a message about a missing file goes on."""
    return f", but the folder holds {' and '.join(map(quoted, files[:3]))}" if files else ""


def _in_one_form(name: str) -> str:
    return os.path.normpath(unicodedata.normalize("NFKC", name.replace("\\", "/").strip()).casefold())


def _without_folders(name: str) -> str:
    return os.path.basename(_in_one_form(name))


def _without_ending(name: str) -> str:
    stem, ending = os.path.splitext(_without_folders(name))
    return stem if ending in ENDINGS else stem + ending
