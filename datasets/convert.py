"""Write a data set of any layout in that of COCO 2017.

    samdetr convert my_yolo --output my_coco
    python -m datasets.convert my_voc --output my_coco --link

OUT then holds train2017/, val2017/, test2017/ (those that there are) and annotations/. It must be new or empty, and is
written whole or not at all.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from samdetr.datasets.annotations import Annotations
from samdetr.datasets.categories import Categories
from samdetr.datasets.layouts.coco import source as coco_2017
from samdetr.datasets.layouts.source import Source
from samdetr.datasets.names import leaves_folder
from samdetr.datasets.settings import Data
from samdetr.datasets.sources import add_source_flags, find_split, require_split
from samdetr.datasets.values import quoted, shown
from samdetr.util.command_line import run_command
from samdetr.util.files import whole_folder, write_json
from samdetr.util.regular_files import open_regular


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m datasets.convert") -> int:
    """Run the program and return its exit status."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", metavar="DATA", help="folder of the data set, or data.yaml")
    parser.add_argument("--output", type=Path, required=True, metavar="OUT", help="a new or empty folder")
    parser.add_argument("--link", action="store_true", help="links to the images instead of copies")
    add_source_flags(parser.add_argument)
    args = parser.parse_args(argv)

    def run() -> None:
        convert(Data.pick({**vars(args), "coco_path": args.data}), args.output, link=args.link)

    return run_command(prog, run)


def convert(data: Data, output: Path, *, link: bool = False) -> None:
    """Raises ValueError: an `output` that holds something, data that cannot be read or is not valid."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"`output` {output} exists already and is not an empty folder; name a new one")
    sources = {name: source for name in ("train", "val", "test") if (source := find_split(name, data))}
    sources = sources or {"train": require_split("train", data)}
    read = {name: source.read(unannotated=name == "test") for name, source in sources.items()}
    for name, found in read.items():
        Categories.from_annotations(found.content["categories"], file=str(sources[name].file))
        found.require_valid()
        _require_images(sources[name], found)
    parent = output.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"`output` {output} cannot be written; name a folder within an existing one")
    try:
        with whole_folder(output.absolute()) as temporary:
            (temporary / "annotations").mkdir()
            for name, found in read.items():
                _write(coco_2017(temporary, name), sources[name], found, link=link)
    except OSError as error:
        raise ValueError(f"`output` {output} cannot be written: {error}") from error
    for name, found in read.items():
        print(f"{output}, {name}: {len(found.images):,} images, {len(found.entries):,} annotations")


def _require_images(source: Source, annotations: Annotations) -> None:
    for entry in annotations.images:
        name = entry["file_name"]
        if leaves_folder(name):
            raise ValueError(
                f"{source.file}: {quoted(name)} leaves the image folder {shown(source.folder)}; correct it"
            )
        try:
            open_regular(source.folder / name).close()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(
                f"{shown(source.folder / name)} (image id {entry['id']} in {source.file}) cannot be read: {reason}; "
                "copy it there or remove its entry"
            ) from None


def _write(target: Source, source: Source, annotations: Annotations, *, link: bool) -> None:
    """Names of images and all other entries stay as they are."""
    for name in dict.fromkeys(entry["file_name"] for entry in annotations.images):
        copy = target.folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if link:
            os.symlink((source.folder / name).resolve(), copy)
        else:
            shutil.copyfile(source.folder / name, copy)
    content = {key: value for key, value in annotations.content.items() if key != "shared_folder"}
    if not annotations.annotated:
        del content["annotations"]
    file = target.file if annotations.annotated else target.file.with_name("image_info_test2017.json")
    write_json(file, content, indent=None)


if __name__ == "__main__":
    sys.exit(main())
