"""Pascal VOC: Annotations/ with an XML file for each image, JPEGImages/, and lists of images in ImageSets/Main/."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element

from samdetr.datasets.layouts.source import Faults, Source, by_name, read_text
from samdetr.datasets.layouts.xml import read_xml
from samdetr.datasets.names import image_files
from samdetr.datasets.values import quoted, real, shown

SIDES = ("xmin", "ymin", "xmax", "ymax")


class Object(NamedTuple):
    name: str
    corners: tuple[float, float, float, float]  # as written
    difficult: bool


class Labels(NamedTuple):
    """What an XML file says."""

    file_name: str
    size: tuple[float, float] | None
    objects: list[Object]


def voc(root: Path) -> dict[str, Source]:
    """Also XML files beside the images in train/, valid/ and test/, as Roboflow writes them."""
    if folder := next((path for name in ("Annotations", "annotations") if _has_xml(path := root / name)), None):
        images = next((path for name in ("JPEGImages", "images", "Images") if (path := root / name).is_dir()), None)
        voc_set = VocSet(root, (folder,))
        lists = by_name({file.stem: file for file in sorted((root / "ImageSets" / "Main").glob("*.txt"))})
        images = images or root / "JPEGImages"
        if not lists:
            return {"train": Source(images, folder, voc_set.content(folder, images, None))}
        return {split: Source(images, file, voc_set.content(folder, images, file)) for split, file in lists.items()}
    folders = by_name({path.name: path for path in sorted(root.iterdir()) if path.is_dir() and _has_xml(path)})
    voc_set = VocSet(root, tuple(folders.values()))
    return {split: Source(path, path, voc_set.content(path, path, None)) for split, path in folders.items()}


@dataclass(frozen=True)
class VocSet:
    """All XML files of a data set. Together they decide what the classes are, unless labelmap.txt lists them, and
    whether coordinates count from 1, as VOC's do, or from 0, as some programs write them."""

    root: Path
    folders: tuple[Path, ...]

    def content(self, folder: Path, images: Path, listed: Path | None) -> Callable[[], dict[str, Any]]:
        """A function as of `Source.make`: the images of a list, or all that have an XML file in `folder`."""
        return lambda: self._content(folder, images, listed)

    def _content(self, folder: Path, images: Path, listed: Path | None) -> dict[str, Any]:
        faults = Faults()
        files = {file: _read(file, faults) for each in self.folders for file in sorted(each.rglob("*.xml"))}
        faults.check()
        names = self._names(files, faults)
        chosen = list(files) if listed is None else [folder / f"{name}.xml" for name in _list(listed, folder)]
        chosen = [file for file in chosen if file.is_relative_to(folder)]
        if not chosen:
            raise ValueError(f"{shown(listed or folder)} lists no image; correct or remove it")
        without = [file for file in chosen if file not in files]
        annotated = len(without) < len(chosen)
        for file in without if annotated else ():
            faults.add(
                f"{shown(listed)} lists {quoted(str(file.relative_to(folder).with_suffix('')))}, but {shown(file)} "
                "does not exist; add it or take the line out"
            )
        faults.check()
        corners = [each.corners for labels in files.values() for each in labels.objects]
        first = 0 if any(min(left, top) < 1 for left, top, _, _ in corners) else 1
        ids = {name: number for number, name in enumerate(names)}
        content: dict[str, Any] = {"images": [], "categories": [{"id": i, "name": name} for name, i in ids.items()]}
        if listed:
            content["shared_folder"] = True
        annotations: list[dict] = []
        by_stem = {name.rpartition(".")[0]: name for name in image_files(images)}
        for number, file in enumerate(chosen, 1):
            stem = file.relative_to(folder).with_suffix("").as_posix()
            labels = files.get(file) or Labels("", None, [])
            named = labels.file_name
            if not named or (Path(named).stem != Path(stem).name and not (images / named).is_file()):
                named = f"{stem}.jpg"
            size = dict(zip(("width", "height"), labels.size)) if labels.size else {}
            content["images"].append({"id": number, "file_name": by_stem.get(stem, named), **size})
            for name, (left, top, right, bottom), difficult in labels.objects:
                # Of coordinates from 1, both are those of a pixel within the box.
                box = [left - first, top - first, right - left + first, bottom - top + first]
                annotations.append({
                    "id": len(annotations) + 1, "image_id": number, "category_id": ids[name], "bbox": box,
                    "area": box[2] * box[3], "iscrowd": int(difficult),
                })  # fmt: skip
        return {**content, "annotations": annotations} if annotated else content

    def _names(self, files: dict[Path, Labels], faults: Faults) -> list[str]:
        """Class names in order. Adds a fault for each object of another class."""
        used = {file: [each.name for each in labels.objects] for file, labels in files.items()}
        map_file = self.root / "labelmap.txt"
        if not map_file.exists():
            return sorted({name for names in used.values() for name in names})
        lines = read_text(map_file, "class list").splitlines()
        names = [line.split(":")[0].strip() for line in lines if line.strip() and not line.startswith("#")]
        known = dict.fromkeys(name for name in names if name and name != "background")
        if not known:
            raise ValueError(f"class list {shown(map_file)} is empty; name the classes, one a line, or remove the file")
        for file, names_used in used.items():
            for name in names_used:
                if name not in known:
                    faults.add(f"{shown(file)}: class {quoted(name)} is not in {shown(map_file)}; correct or add it")
        return list(known)


def _has_xml(folder: Path) -> bool:
    return folder.is_dir() and next(folder.rglob("*.xml"), None) is not None


def _list(file: Path, folder: Path) -> list[str]:
    """Image names of a list. Lists of one class have -1, 0 or 1 behind each name."""
    lines = [line.strip() for line in read_text(file, "image list").splitlines()]
    names = []
    for line in lines:
        name, _, mark = line.rpartition(" ")
        with_mark = name and mark in ("-1", "0", "1") and not (folder / f"{line}.xml").exists()
        names.append((name.strip() if with_mark else line).strip('"'))
    return list(dict.fromkeys(name for name in names if name))


def _read(file: Path, faults: Faults) -> Labels:
    try:
        root = read_xml(file)
        if root.tag != "annotation":
            raise ValueError(
                f"{shown(file)}: the outermost element is <{root.tag}>, not <annotation>; replace the file"
            )
        return _labels(root, file)
    except ValueError as error:
        faults.add(str(error))
        return Labels("", None, [])


def _labels(root: Element, file: Path) -> Labels:
    """Raises ValueError."""
    size = root.find("size")
    sides = [] if size is None else [_number(size, side, f"{shown(file)}: <size>") for side in ("width", "height")]
    known = len(sides) == 2 and min(sides) > 0  # programs write 0 for what they do not know
    objects = []
    for number, entry in enumerate(root.findall("object"), 1):
        where = f"{shown(file)}: object {number}"
        name = (entry.findtext("name") or "").strip()
        if not name:
            raise ValueError(f"{where} has no <name>; write its class")
        where += f" ({quoted(name)})"
        box = entry.find("bndbox")
        if box is None:
            raise ValueError(f"{where} has no <bndbox>; write {', '.join(SIDES)}, or remove the object")
        left, top, right, bottom = (_number(box, side, where) for side in SIDES)
        if right < left or bottom < top:
            wrong = f"xmin {left:g}, xmax {right:g}" if right < left else f"ymin {top:g}, ymax {bottom:g}"
            raise ValueError(f"{where} has {wrong}; exchange or correct them")
        difficult = (entry.findtext("difficult") or "0").strip()
        if difficult not in ("0", "1"):
            raise ValueError(f"{where} has <difficult> {quoted(difficult[:40])}; write 0 or 1")
        objects.append(Object(name, (left, top, right, bottom), difficult == "1"))
    return Labels((root.findtext("filename") or "").strip(), (sides[0], sides[1]) if known else None, objects)


def _number(parent: Element, tag: str, where: str) -> Any:
    text = parent.findtext(tag)
    if text is None:
        raise ValueError(f"{where} has no <{tag}>; add it")
    value = real(text)
    if isinstance(value, str) or not math.isfinite(value):
        hint = " with a point" if "," in text else ""
        raise ValueError(f"{where} has <{tag}> {quoted(text.strip()[:40])}; write a number{hint}")
    return value
