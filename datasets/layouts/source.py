"""Where a split of a data set is, and its content in COCO's form."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from samdetr.datasets.annotations import Annotations, read_content
from samdetr.datasets.values import shown
from samdetr.util.regular_files import open_regular

T = TypeVar("T")

# What programs call the splits, the names that mean it most plainly first.
SPLIT_NAMES: dict[str, tuple[str, ...]] = {
    "train": ("train", "training", "trainval", "default"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing", "test-dev"),
}


@dataclass(frozen=True)
class Source:
    """A split: its image folder, and the file that lists it, which messages name.

    `make` returns the content of a COCO annotation file; by default `file` is one. Without a list 'annotations' it is
    that of images without annotations, as COCO publishes for its test images. With "shared_folder" the folder holds
    images of other splits, too.
    """

    folder: Path
    file: Path
    make: Callable[[], dict[str, Any]] | None = None

    def read(self, *, unannotated: bool = False) -> Annotations:
        """Raises ValueError, also for images without annotations unless they are `unannotated`."""
        content = self.content()
        if "annotations" not in content and not unannotated:
            raise ValueError(
                f"{shown(self.file)} lists images of {shown(self.folder)} without any annotations, which can only be "
                "used with `eval`; annotate them"
            )
        return Annotations(content, file=self.file)

    def content(self) -> dict[str, Any]:
        return self.make() if self.make else read_content(self.file)

    def parts(self, fraction: float) -> tuple[Source, Source]:
        """The images for training and a `fraction` for validation, chosen by a hash of the file name."""

        def part(held_out: bool) -> dict[str, Any]:
            annotations = self.read()
            names = [entry["file_name"] for entry in annotations.images]
            chosen = held_out_names(names, fraction, file=self.file)
            ids = {entry["id"] for entry in annotations.images if entry["file_name"] in chosen}

            def among(entry: Any, key: str) -> bool:  # what is malformed stays in training, whose check reports it
                return isinstance(entry, dict) and type(entry.get(key)) is int and entry[key] in ids

            return {
                **annotations.content,
                "images": [entry for entry in annotations.content["images"] if among(entry, "id") is held_out],
                "annotations": [
                    entry for entry in annotations.content["annotations"] if among(entry, "image_id") is held_out
                ],
            }

        return replace(self, make=lambda: part(False)), replace(self, make=lambda: part(True))


def held_out_names(names: Collection[str], fraction: float, *, file: Path) -> set[str]:
    """The file names whose hash is in the lowest `fraction` of its range; at least one, and not all.

    Folders do not count, so that a set is split alike in every layout, and images that come later change nothing.
    Raises ValueError for less than two different names.
    """
    hashes = {name: hashlib.sha256(_base(name).encode(errors="surrogatepass")).digest() for name in names}
    ordered = sorted(set(hashes.values()))
    if len(ordered) < 2:
        raise ValueError(f"{shown(file)}: `val_fraction` {fraction} cannot split {len(names)} image(s); add images")
    limit = int(fraction * 2**64).to_bytes(9, "big")
    below = [value for value in ordered if b"\0" + value[:8] < limit]
    chosen = set(ordered[: min(max(1, len(below)), len(ordered) - 1)])
    return {name for name, value in hashes.items() if value in chosen}


class Faults:
    """Collects what is wrong with the files of a split, and raises the first with the number of the others."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def add(self, message: str) -> None:
        self._found.append(message)

    def check(self) -> None:
        """Raises ValueError if there is any."""
        if self._found:
            more = f" ({len(self._found) - 1} more such faults)" if len(self._found) > 1 else ""
            raise ValueError(self._found[0] + more)


def by_name(named: Mapping[str, T]) -> dict[str, T]:
    """The splits among named things, such as folders; the case of letters does not matter."""
    plain = {name.casefold(): thing for name, thing in named.items()}
    found = {split: [plain[name] for name in names if name in plain] for split, names in SPLIT_NAMES.items()}
    return {split: things[0] for split, things in found.items() if things}


def read_text(file: Path, what: str) -> str:
    """The text of a file in UTF-8, with or without a mark of byte order. Raises ValueError, which calls it `what`."""
    try:
        with open_regular(file) as stream:
            return stream.read().decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{what} {shown(file)} does not exist; check the path to the data set") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{what} {shown(file)} is no text in UTF-8 (byte {error.start} is {error.object[error.start]:#04x}); "
            "save it in this encoding"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{what} {shown(file)} cannot be read: {error}; replace it") from None


def _base(name: str) -> str:
    return PurePosixPath(name.replace("\\", "/")).name
