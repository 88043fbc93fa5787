"""Layouts with annotation files in COCO's form: COCO 2017, and what other programs export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from samdetr.datasets.annotations import read_content
from samdetr.datasets.layouts.source import Source, by_name

ROBOFLOW_FILE = "_annotations.coco.json"


def coco_2017(root: Path) -> dict[str, Source]:
    """train2017/ and annotations/instances_train2017.json. COCO's test images have no annotations, but lists."""
    found = {split: source(root, split) for split in ("train", "val", "test")}
    for name in ("image_info_test-dev2017.json", "image_info_test2017.json"):
        if not found["test"].file.exists() and (root / "annotations" / name).exists():
            found["test"] = Source(found["test"].folder, root / "annotations" / name)
    # The image folders alone do not tell: YOLO's form of COCO has images/train2017, too.
    listed = any(split.file.exists() for split in found.values())
    folders = any((root / f"{split}2017").exists() for split in found)
    if not listed and not folders:
        return {}
    return {split: each for split, each in found.items() if each.file.exists() or each.folder.exists()}


def source(root: Path, split: str) -> Source:
    """A split where COCO 2017 has it. The image folder may be in images/, as SAP-DETR's published code has it."""
    folder, within = root / f"{split}2017", root / "images" / f"{split}2017"
    chosen = within if within.is_dir() and not folder.is_dir() else folder
    return Source(chosen, root / "annotations" / f"instances_{split}2017.json")


def roboflow(root: Path) -> dict[str, Source]:
    """train/, valid/ and test/, each with images and their annotation file."""
    folders = {path.name: path for path in root.iterdir() if (path / ROBOFLOW_FILE).exists()}
    return {split: Source(folder, folder / ROBOFLOW_FILE) for split, folder in by_name(folders).items()}


def datumaro(root: Path) -> dict[str, Source]:
    """annotations/instances_train.json with images/train/ or images/, as CVAT and Datumaro write it ("default" is what
    has no other name)."""
    files = sorted((root / "annotations").glob("*.json"), key=lambda file: file.name.startswith("instances_"))
    named = {file.stem.removeprefix("instances_").removeprefix("image_info_"): file for file in files}
    found = {}
    for split, file in by_name(named).items():
        subset = file.stem.removeprefix("instances_").removeprefix("image_info_")
        folders = [root / "images" / subset, root / subset, root / "images"]
        found[split] = Source(next((folder for folder in folders if folder.is_dir()), folders[-1]), file)
    return found


def label_studio(root: Path) -> dict[str, Source]:
    """result.json with images/."""
    file, folder = root / "result.json", root / "images"

    def content() -> dict[str, Any]:
        found = read_content(file)
        return {**found, "images": [_within(entry, folder) for entry in found["images"]]}

    return {"train": Source(folder, file, content)} if file.exists() else {}


def _within(entry: Any, folder: Path) -> Any:
    """The entry of an image with its name in the folder: Label Studio writes images/x.jpg, images\\x.jpg, or the path
    on the machine that it ran on."""
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
        return entry
    name = entry["file_name"].replace("\\", "/")
    base = name.rsplit("/", 1)[-1]
    within = name.removeprefix("images/")
    if within == name and base != name and (folder / base).is_file() and not (folder / name).is_file():
        within = base
    return {**entry, "file_name": within}
