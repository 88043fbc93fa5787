"""The files that `samdetr predict` writes: their names, and what of a folder may be replaced."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

from samdetr.inference.sources import DRAWN
from samdetr.util.files import write_json
from samdetr.util.regular_files import open_regular

DETECTIONS, IMAGES, RECORD = "detections.json", "images.json", "predict.json"
_LONGEST = 150  # bytes of a name's stem


class OutputFolder:
    """The folder of a run. `predict.json` in it lists what runs have written there; of the files that lie there already
    only these are replaced, and only if nobody changed them since, unless `overwrite`.

    Without a `path` it is a new one, output/predict, output/predict2, ..., whose `path` is sure once it is made.
    """

    def __init__(self, path: str, *, overwrite: bool) -> None:
        """Raises ValueError if `path` is no folder, or cannot be read."""
        self.path, self._overwrite, self._new = Path(path) if path else _free(), overwrite, not path
        self._written: dict[str, str] = {}
        self._made = False
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"`output` {path} is not a folder")
        try:
            with open_regular(self.path / RECORD) as file:
                found = json.load(file)["written"]
            self._written = {str(name): str(digest) for name, digest in found.items()}
            self._ours = True
        except FileNotFoundError:
            self._ours = True
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self._ours = False  # somebody else's predict.json

    def claim(self, names: Iterable[str]) -> None:
        """Require that files of these names may be written. Raises ValueError, which names the first that may not."""
        for name in (*names, RECORD):
            file = self.path / name
            mine = self._ours if name == RECORD else self._written.get(name) == _digest(file)
            if (file.exists() or file.is_symlink()) and not mine and not self._overwrite:
                raise ValueError(
                    f"{file} is there already, and is not as an earlier prediction left it; pass another `output`, or "
                    "`overwrite` to replace it"
                )

    def wrote(self, file: Path) -> Path:
        """Remember a file that was written."""
        self._written[file.name] = _digest(file)
        return file

    def make(self) -> Path:
        """The folder, made if it is not there. Raises OSError."""
        while self._new:
            try:
                self.path.mkdir(parents=True)
                self._new = False
            except FileExistsError:  # another process has just taken it
                self.path = _free()
            self._made = True
        self._made = self._made or not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        return self.path

    def drop_if_empty(self) -> None:
        """Remove the folder if this run made it and nothing came into it."""
        if self._made:
            with suppress(OSError):
                self.path.rmdir()

    def write(self, name: str, content: Any, *, indent: int | None = None) -> Path:
        """Write JSON. Raises OSError."""
        write_json(self.make() / name, content, indent=indent)
        return self.wrote(self.path / name)

    def finish(self, **facts: Any) -> None:
        """Write the list of what was written, after `facts`. Raises OSError."""
        write_json(self.make() / RECORD, {**facts, "written": self._written})


def output_names(names: Sequence[str], *, kinds: Collection[str] = ()) -> list[str]:
    """For each of these file names one that begins with `det_res_`; no two are equal, whatever the case of letters.

    The first of equal names keeps it, further ones get a number: x.jpg, x_2.jpg. `kinds` of further pictures, of which
    each is named by kind and stem, are kept apart likewise.
    """

    def outputs(name: str) -> set[str]:
        stem = PurePath(name).stem
        return {each.casefold() for each in (name, *(f"{kind}_{stem}.png" for kind in kinds))}

    plain = [_plain(name) for name in names]
    chosen: list[str | None] = [None] * len(plain)
    taken: set[str] = set()
    for index, name in enumerate(plain):
        if not outputs(name) & taken:
            chosen[index] = name
            taken |= outputs(name)
    for index, name in enumerate(plain):
        number = 2
        while chosen[index] is None:
            path = PurePath(name)
            other = f"{path.stem}_{number}{path.suffix}"
            if not outputs(other) & taken:
                chosen[index] = other
                taken |= outputs(other)
            number += 1
    return [f"{DRAWN}{name}" for name in chosen]


def image_ids(names: Sequence[str]) -> list[int]:
    """An id for each of some file names: the number that each is (000000000139.jpg: 139) if all are different numbers,
    else 1, 2, 3, ..."""
    stems = [PurePath(name).stem for name in names]
    if all(stem.isascii() and stem.isdecimal() and len(stem) < 19 for stem in stems):
        numbers = list(map(int, stems))
        if len(set(numbers)) == len(numbers):
            return numbers
    return list(range(1, len(names) + 1))


def _plain(name: str) -> str:
    """A name that every file system takes: what cannot be printed is replaced, a long stem is cut."""
    text = "".join(c if c.isprintable() and c not in '/\\:*?"<>|' else "_" for c in name)
    path = PurePath(text)
    suffix = path.suffix if len(path.suffix.encode()) < 20 else ""
    stem = text.removesuffix(suffix) if suffix else text
    while len(stem.encode()) > _LONGEST:
        stem = stem[:-1]
    return stem + suffix


def _free() -> Path:
    """output/predict, or the same with the first number from 2 on that is not taken."""
    number, free = 1, Path("output/predict")
    while free.exists() or free.is_symlink():
        number += 1
        free = Path(f"output/predict{number}")
    return free


def _digest(file: Path) -> str:
    """SHA-256 of a regular file; "" of what is none."""
    try:
        with open_regular(file) as stream:
            sha = hashlib.sha256()
            while part := stream.read(2**20):
                sha.update(part)
            return sha.hexdigest()
    except (OSError, ValueError):
        return ""
