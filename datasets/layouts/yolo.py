"""YOLO: data.yaml, images/ and labels/ with a text file for each image."""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samdetr.datasets.images import open_image, orientation_of
from samdetr.datasets.layouts.source import SPLIT_NAMES, Faults, Source, read_text
from samdetr.datasets.names import image_files
from samdetr.datasets.values import integer, label as as_name, quoted, real, shown

DESCRIPTIONS = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
NO_LABELS = {"classes.txt", "labels.txt", "notes.txt"}  # what programs for labelling put beside the label files
ROUNDING = 1e-3  # how far a fraction may lie beyond 0 and 1
_brief = reprlib.Repr()
_brief.maxlevel, _brief.maxlist, _brief.maxdict, _brief.maxstring, _brief.maxother = 2, 3, 3, 80, 80


def yolo(root: Path) -> dict[str, Source]:
    """`root` is the folder with data.yaml, or such a file. Raises ValueError for a file that is none."""
    files = [root] if root.is_file() else [root / name for name in DESCRIPTIONS]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        return {}
    description = _read_yaml(file)
    names = _names(description, file)
    found = {}
    for split, keys in SPLIT_NAMES.items():
        if key := next((key for key in keys if description.get(key) not in (None, "", [])), None):
            part = Part.of(description, key, file)
            found[split] = Source(part.folder, file, lambda part=part: part.content(names))  # type: ignore[misc]
    if not found:
        raise ValueError(
            f"{shown(file)} has no entry 'train' or 'val'; name the folders of the images, e.g. train: images/train"
        )
    return found


@dataclass(frozen=True)
class Part:
    """The folders and lists of images that a split of data.yaml names; image names are relative to `folder`."""

    file: Path
    key: str
    places: tuple[Path, ...]
    folder: Path

    @classmethod
    def of(cls, description: Mapping[str, Any], key: str, file: Path) -> Part:
        value = description[key]
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(each, str) and each for each in values):
            raise ValueError(
                f"{shown(file)}: {key!r} is {_brief.repr(value)}; it must be a folder, a text file with a path in each "
                "line, or a list of them"
            )
        path = description.get("path")
        if not isinstance(path, (str, type(None))):
            raise ValueError(f"{shown(file)}: 'path' is {_brief.repr(path)}; it must be the folder of the data set")
        beside = file.parent
        # 'path' often is a folder of the machine that wrote the file, and Roboflow writes ../train for train.
        base = beside / path if path and (beside / path).is_dir() else beside
        places = tuple(_first_existing(base / e, beside / e, beside / e.replace("../", "")) for e in values)
        return cls(file, key, places, places[0] if len(places) == 1 and not places[0].is_file() else base)

    def content(self, names: Mapping[int, str]) -> dict[str, Any]:
        """As of `Source.make`. Raises ValueError for the first fault."""
        files = self._images()
        paths = [_label_file(path) for path in files.values()]
        with ThreadPoolExecutor(max_workers=16) as pool:  # reading waits for a disk
            sizes = list(pool.map(_upright_size, files.values()))
        faults = Faults()
        images: list[dict] = []
        annotations: list[dict] = []
        for number, (name, path, size) in enumerate(zip(files, paths, sizes), 1):
            width, height = size or (None, None)
            images.append({"id": number, "file_name": name, **({"width": width, "height": height} if size else {})})
            for category, (left, top, right, bottom) in _read_labels(path, names, faults) if path else ():
                if width and height:  # otherwise the image cannot be read, which its check reports
                    box = [left * width, top * height, (right - left) * width, (bottom - top) * height]
                    annotations.append({
                        "id": len(annotations) + 1, "image_id": number, "category_id": category, "bbox": box,
                        "area": box[2] * box[3], "iscrowd": 0,
                    })  # fmt: skip
        faults.check()
        content: dict[str, Any] = {
            "images": images, "categories": [{"id": i, "name": name} for i, name in sorted(names.items())]
        }  # fmt: skip
        if self.places != (self.folder,):
            content["shared_folder"] = True
        return {**content, "annotations": annotations} if any(paths) else content

    def _images(self) -> dict[str, Path]:
        """Images by their names. Raises ValueError: there is none, a list that cannot be read, labels of no image."""
        found: dict[str, Path] = {}
        faults = Faults()
        for place in self.places:
            if not place.exists():
                raise ValueError(
                    f"{shown(self.file)}: {self.key!r} is {shown(place)}, which does not exist; correct it"
                )
            paths = [place / name for name in image_files(place)] if place.is_dir() else self._listed(place, faults)
            if place.is_dir():
                _check_labels_have_images(place, paths, faults)
            found |= {os.path.relpath(path, self.folder): path for path in paths}
        faults.check()
        if not found:
            raise ValueError(
                f"{shown(self.file)}: {self.key!r} is {', '.join(map(shown, self.places))}, where there are no images; "
                "correct it"
            )
        # A path that leads elsewhere is written as it is; it is refused where names may not leave the folder.
        return {(str(path.absolute()) if name.startswith("..") else name): path for name, path in found.items()}

    def _listed(self, file: Path, faults: Faults) -> list[Path]:
        found = []
        for number, line in enumerate(read_text(file, "image list").splitlines(), 1):
            if line.strip():
                found.append(_first_existing(file.parent / line.strip(), self.folder / line.strip()))
                if not os.path.lexists(found[-1]):
                    faults.add(f"{shown(file)}, line {number}: {shown(found[-1])} does not exist; correct the line")
        return found


def _read_yaml(file: Path) -> dict[str, Any]:
    import yaml  # here, because nothing else needs it

    text = read_text(file, "data description")
    try:
        content = yaml.safe_load(text)  # builds plain values only, never objects by their tags
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: such as a date of month 13
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).split("\n")[0]
        raise ValueError(f"{shown(file)}{line}: not plain YAML ({reason}); correct it") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{shown(file)} is {'empty' if content is None else 'no table of names and values'}; it must hold train, "
            "val and names"
        )
    return content


def _names(description: Mapping[str, Any], file: Path) -> dict[int, str]:
    """Class names by index. Raises ValueError."""
    value = description.get("names")
    pairs: list[tuple[Any, Any]] = []
    if isinstance(value, (list, dict)):
        pairs = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    if not pairs:
        raise ValueError(f"{shown(file)}: 'names' is {_brief.repr(value)}; list the classes, as in names: [cat, dog]")
    names: dict[int, str] = {}
    for key, name in pairs:
        index, text = integer(key), as_name(name)
        if type(index) is not int or not 0 <= index < 2**31:
            raise ValueError(f"{shown(file)}: 'names' has the index {_brief.repr(key)}; indices are 0, 1, 2, ...")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"{shown(file)}: the name of class {index} is {_brief.repr(name)}; write a text, in quotes if YAML "
                "takes it for something else"
            )
        names[index] = text
    number = integer(description.get("nc", len(names)))
    if number != len(names):
        raise ValueError(f"{shown(file)}: 'nc' is {_brief.repr(number)}, but 'names' has {len(names)}; correct one")
    return names


def _read_labels(
    file: Path, names: Mapping[int, str], faults: Faults
) -> list[tuple[int, tuple[float, float, float, float]]]:
    """Class indices and boxes (left, top, right, bottom) in fractions of the image."""
    try:
        lines = read_text(file, "label file").splitlines()
    except ValueError as error:
        faults.add(str(error))
        return []
    found = []
    for number, line in enumerate(lines, 1):
        if not (words := line.split()):
            continue
        try:
            found.append(_object(words, names))
        except ValueError as error:
            faults.add(f"{shown(file)}, line {number}: {error}")
    return found


def _object(words: list[str], names: Mapping[int, str]) -> tuple[int, tuple[float, float, float, float]]:
    """Raises ValueError, whose message lacks the place."""
    category, values = integer(words[0]), [real(word) for word in words[1:]]
    for word, value in zip(words[1:], values):
        if isinstance(value, str) or not math.isfinite(value):
            hint = " with a point" if "," in word else ""
            raise ValueError(f"{quoted(word[:40])} is no number; write numbers{hint}, separated by spaces")
    if type(category) is not int:
        raise ValueError(f"the class is {quoted(words[0][:40])}; write its index in 'names'")
    if category not in names:
        raise ValueError(
            f"class {category} is not among the {len(names)} of 'names', {min(names)} to {max(names)}; correct it or "
            "add its name"
        )
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise ValueError(
            f"{len(words)} values; write a class and a box (centre x, y, width, height) or the corners of a polygon"
        )
    for word, value in zip(words[1:], values):
        if not -ROUNDING <= value <= 1 + ROUNDING:
            raise ValueError(f"{word[:40]} is not between 0 and 1; write fractions of the image's width and height")
    if len(values) == 4:
        x, y, width, height = values
        if width < 0 or height < 0:
            raise ValueError(f"the box is {width} wide and {height} high; correct it")
        return category, (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    return category, (min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))


def _label_folder(path: str) -> str | None:
    """The path with its last folder images/ replaced by labels/."""
    head, images, tail = f"{path}{os.sep}".rpartition(f"{os.sep}images{os.sep}")
    return f"{head}{os.sep}labels{os.sep}{tail}".rstrip(os.sep) if images else None


def _label_file(image: Path) -> Path | None:
    """In labels/ where the image is in images/, or beside the image; None: there is none, the image is empty."""
    beside = image.absolute().with_suffix(".txt")
    elsewhere = _label_folder(str(beside))
    found = [path for path in ([Path(elsewhere)] if elsewhere else []) + [beside] if os.path.lexists(path)]
    return found[0] if found else None


def _check_labels_have_images(place: Path, images: list[Path], faults: Faults) -> None:
    labels = _label_folder(str(place.absolute()))
    if not labels or not Path(labels).is_dir():
        return
    known = {os.path.relpath(path, place).rpartition(".")[0] for path in images}
    for file in sorted(Path(labels).rglob("*.txt")):
        name = os.path.relpath(file, labels).removesuffix(".txt")
        if name not in known and file.name not in NO_LABELS:
            faults.add(
                f"label file {shown(file)} has no image: {shown(place / name)} with .jpg, .png or another ending does "
                "not exist; copy the image there or remove the label file"
            )


def _first_existing(*paths: Path) -> Path:
    return next((path for path in paths if path.exists()), paths[0])


def _upright_size(path: Path) -> tuple[int, int] | None:
    """(width, height) as training sees the image; None for a file that cannot be read."""
    try:
        with open_image(path) as image:
            if image.format == "TIFF":  # Pillow turns it when it decodes
                image.load()
            return orientation_of(image)[1]
    except MemoryError:
        raise
    except Exception:  # PIL raises many kinds for a broken file; the check of the files reports it
        return None
