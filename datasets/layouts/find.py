"""Which layout a folder has."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from samdetr.datasets.layouts import coco
from samdetr.datasets.layouts.source import Source
from samdetr.datasets.layouts.voc import voc
from samdetr.datasets.layouts.yolo import yolo
from samdetr.datasets.values import shown

# Name -> what finds the splits in a folder ({}: it has another layout), and what the layout consists of.
LAYOUTS: dict[str, tuple[Callable[[Path], dict[str, Source]], str]] = {
    "coco": (coco.coco_2017, "train2017/, val2017/ and annotations/instances_train2017.json"),
    "roboflow": (coco.roboflow, "train/_annotations.coco.json"),
    "datumaro": (coco.datumaro, "annotations/instances_train.json and images/"),
    "label_studio": (coco.label_studio, "result.json and images/"),
    "yolo": (yolo, "data.yaml"),
    "voc": (voc, "Annotations/*.xml and JPEGImages/"),
}


def find_layout(root: Path, name: str = "auto") -> tuple[str, dict[str, Source]]:
    """The layout of a data set and its splits. A folder in the layout of COCO 2017 is nothing else.

    Raises ValueError: no such folder, none of the layouts or several, a description that cannot be read.
    """
    if root.is_file() and root.suffix.lower() in (".yaml", ".yml") and name in ("auto", "yolo"):
        return "yolo", yolo(root)
    if not root.is_dir():
        what = "is no folder" if root.exists() else "does not exist"
        raise ValueError(
            f"data folder {root} {what}; set `coco_path` to a folder with train2017/, val2017/ and annotations/, or in "
            f"another layout ({', '.join(LAYOUTS)})"
        )
    if name != "auto":
        if splits := LAYOUTS[name][0](root):
            return name, splits
        raise ValueError(f"data folder {root} is not in the layout {name}: there is no {LAYOUTS[name][1]}")
    if splits := coco.coco_2017(root):
        return "coco", splits
    found = {name: splits for name, (find, _) in LAYOUTS.items() if (splits := find(root))}
    if len(found) > 1:
        raise ValueError(f"data folder {root} is in several layouts, {', '.join(found)}; name one with `data_format`")
    if found:
        return found.popitem()
    raise ValueError(
        f"data folder {root} holds neither train2017/ nor val2017/, nor what makes up another layout: "
        + ", ".join(f"{text} ({name})" for name, (_, text) in LAYOUTS.items() if name != "coco")
        + _hint(root)
    )


def _hint(root: Path) -> str:
    """Folders inside that are data sets."""
    inner = [path for path in sorted(root.iterdir()) if path.is_dir()][:100]
    found = []
    for path in inner:
        with suppress(ValueError):  # what is wrong there is for later
            found += [path] if any(find(path) for find, _ in LAYOUTS.values()) else []
    return f"; pass {' or '.join(shown(path) for path in found[:3])}" if found else "; check the path to the data set"
