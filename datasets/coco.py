"""A data set in COCO format: images and targets for the detector, ground truth for the evaluator."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from samdetr.datasets.categories import Categories
from samdetr.datasets.check.annotations import LARGEST, image_size
from samdetr.datasets.check.files import FileState, glance
from samdetr.datasets.check.splits import Split
from samdetr.datasets.ground_truth import GroundTruth
from samdetr.datasets.image_cache import ImageCache, share_files
from samdetr.datasets.image_list import ImageList, ImageRecord
from samdetr.datasets.images import fault_of, read_image
from samdetr.datasets.transforms import seeded
from samdetr.util.box_ops import xyxy_to_cxcywh

TRIES = 50  # images that may be unreadable one after the other


class CocoDetection(Dataset):
    """`dataset[i]` is (image, target): what `transforms` make of the image, a tensor (3, H, W), and a dict of

    - `labels` int64 (n,), labels of `categories`; `boxes` float32 (n, 4), cxcywh in fractions of the image;
    - `image_id` int64 (); `orig_size` int64 (2,), (height, width) of the upright image; `size` the same of the tensor.

    Crowd regions are no targets. Boxes are clipped to the image and dropped where nothing is left; images without boxes
    stay. `transforms` is called with (RGB image, target) as datasets.transforms describes. `categories` are those of a
    trained network; without them they come from the annotation file, whose `content` may have been read before.
    `ground_truth` is what the evaluator compares with, crowds included, and None for a training set.

    In a training set another image takes the place of one that cannot be read. Which one is a function of (`seed`,
    epoch, index) and of which files are readable. Its target then has `unreadable` too, a dict from the index of each
    image that was tried in vain to the reason. In evaluation nothing can take its place.

    What is random in `transforms` is a function of (`seed`, epoch, index): neither the number of workers nor where a
    run is taken up again changes what is seen. Call `set_epoch` before iterating over an epoch.

    Raises:
        ValueError: anything wrong with the annotations or files, in one line that names the file, the id, the value and
            what to do; so also more objects in an image than `max_objects`, the number of queries.
    """

    def __init__(
        self,
        *,
        image_folder: str | os.PathLike,
        annotation_file: str | os.PathLike,
        transforms: Callable,
        train: bool,
        categories: Categories | None = None,
        max_objects: int | None = None,
        seed: int = 0,
        content: dict | None = None,
    ) -> None:
        self.image_folder, self.annotation_file = Path(image_folder), Path(annotation_file)
        self.transforms = transforms
        content = content or read_annotations(self.annotation_file)
        found = Categories.from_annotations(content["categories"], file=str(self.annotation_file))
        if categories is not None:
            categories.check_covers(found, file=str(self.annotation_file))
        self.categories = categories or found

        records = _image_records(content["images"], self.annotation_file)
        _check_annotations(content, self.annotation_file)
        if not self.image_folder.is_dir():
            raise ValueError(f"image folder {self.image_folder} does not exist; check the path to the data set")
        if not train:
            self._require_files(records)
        # Tensors in place of lists of objects: datasets/image_list.py says why.
        self.images = ImageList(records)
        self._boxes, self._labels, self._first = self._objects(records, content["annotations"])
        if max_objects is not None:
            self._require_at_most(max_objects)
        self.ground_truth = None if train else GroundTruth.from_content(content)
        self._train = train
        self.known_faults: dict[int, FileState] = {}  # of image files by index, once `check_files` has looked
        self.report: Split | None = None  # of the check at the start of a run, until it was shown
        self._cache: ImageCache | None = None
        self._seed = seed
        self._epoch = torch.tensor(0).share_memory_()  # workers that are there already see it change

    def __len__(self) -> int:
        return len(self.images)

    def set_epoch(self, epoch: int) -> None:
        """Let random transforms draw the numbers of another epoch."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        place = range(len(self))[index]
        index, image, unreadable = self._read_some_image(place)
        orig_size = (image.height, image.width)
        start, end = self._first[index : index + 2].tolist()
        boxes, labels = self._boxes[start:end], self._labels[start:end]
        boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([image.width, image.height] * 2))
        keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes[keep], format="XYXY", canvas_size=orig_size),
            "labels": labels[keep],
        }
        with seeded(self._seed, int(self._epoch), place):
            image, target = self.transforms(image, target)
        height, width = image.shape[-2:]
        boxes = target["boxes"].as_subclass(Tensor)
        return image.as_subclass(Tensor), {
            "labels": target["labels"],
            "boxes": xyxy_to_cxcywh(boxes) / boxes.new_tensor([width, height, width, height]),
            "image_id": torch.tensor(self.images[index].id),
            "orig_size": torch.tensor(orig_size),
            "size": torch.tensor([height, width]),
            **({"unreadable": unreadable} if unreadable else {}),
        }

    def read_image(self, index: int) -> Image.Image:
        """Image `index` in RGB, upright, before any transform. Raises ValueError."""
        image, fault = self._try_to_read(index)
        if fault:
            raise ValueError(self.unreadable(index, fault))
        return image

    def fault(self, index: int) -> str:
        """Why image `index` cannot be read, or nothing. Decodes it."""
        return self._try_to_read(index)[1]

    def _try_to_read(self, index: int) -> tuple[Image.Image | None, str]:
        """The image, or why it cannot be read."""
        try:
            source = self._cache.read(index) if self._cache else self.image_path(index)
            return read_image(source, self.images[index].size), ""
        except MemoryError:
            raise
        except Exception as error:  # PIL raises many kinds for a broken file
            return None, fault_of(self.image_path(index), error)[1]

    def _read_some_image(self, index: int) -> tuple[int, Image.Image, dict[int, str]]:
        """Image `index` or, in training, one that takes its place; its index; what was tried in vain, and why."""
        if not self._train:
            return index, self.read_image(index), {}
        faults: dict[int, str] = {}
        others = None
        first = index
        while len(faults) < min(TRIES, len(self)):
            if index not in faults:
                image, fault = self._try_to_read(index)
                if image is not None:
                    return index, image, faults
                faults[index] = fault
            others = others or np.random.default_rng((self._seed, int(self._epoch), first))
            index = int(others.integers(len(self)))
        raise ValueError(
            f"{self.unreadable(first, faults[first])}; nor can the {len(faults) - 1} images tried after it"
        )

    def image_path(self, index: int) -> Path:
        return self.image_folder / self.images[index].file_name

    def hold_files(self) -> None:
        """Keep the image files in memory, once for all processes of a node, all of which have to come here. Raises
        ValueError."""
        paths = [self.image_path(index) for index in range(len(self))]
        self._cache = share_files(paths, unreadable_as_empty=self._train)

    def check_files(self) -> None:
        """Glance at every image file, and remember those that are at fault. Raises ValueError for them unless in
        training: names the first file, and how many more there are."""
        paths = map(self.image_path, range(len(self)))
        sizes = (record.size for record in self.images)
        with ThreadPoolExecutor(max_workers=16) as pool:  # reading waits for the disk, which may be a network's
            states = enumerate(pool.map(glance, paths, sizes))
            self.known_faults = {index: state for index, state in states if state.fault}
        if self.known_faults and not self._train:
            (index, state), *others = self.known_faults.items()
            more = f" ({len(others)} more such files)" if others else ""
            raise ValueError(self.unreadable(index, state.reason) + more)

    def unreadable(self, index: int, reason: str) -> str:
        """A line about an image file and what to do."""
        return (
            f"{self.image_path(index)} (image id {self.images[index].id}) cannot be used: {reason}; "
            f"replace the file, or correct or remove its entry in {self.annotation_file}"
        )

    def _require_files(self, records: Sequence[ImageRecord]) -> None:
        listings: dict[str, set[str]] = {}  # one listing of each folder is far quicker than asking for each file
        missing = []
        for record in records:
            parent, name = os.path.split(record.file_name)
            if parent not in listings:
                folder = self.image_folder / parent
                listings[parent] = set(os.listdir(folder)) if folder.is_dir() else set()
            if name not in listings[parent]:
                missing.append(record)
        if missing:
            raise ValueError(
                f"{self.image_folder}: {len(missing)} of the {len(records)} images in {self.annotation_file} are "
                f"missing: {_first_few(f'{r.file_name!r} (image id {r.id})' for r in missing)}; "
                "copy them there or remove their entries"
            )

    def _objects(self, records: Sequence[ImageRecord], annotations: list[dict]) -> tuple[Tensor, Tensor, Tensor]:
        """Non-crowd boxes (N, 4) float32 in xyxy pixels and labels (N,), in the order of the images, and where each
        image's begin (images + 1,)."""
        position = {record.id: i for i, record in enumerate(records)}
        objects = [a for a in annotations if not a.get("iscrowd")]
        image = np.array([position[a["image_id"]] for a in objects], dtype=np.int64)
        boxes = np.array([a["bbox"] for a in objects], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = np.array([self.categories.label_of[a["category_id"]] for a in objects], dtype=np.int64)
        order = np.argsort(image, kind="stable")
        first = np.searchsorted(image[order], np.arange(len(records) + 1))
        return tuple(torch.from_numpy(values) for values in (boxes[order].astype(np.float32), labels[order], first))

    def _require_at_most(self, max_objects: int) -> None:
        counts = self._first.diff()
        crowded = (counts > max_objects).nonzero().flatten().tolist()
        if crowded:
            raise ValueError(
                f"{self.annotation_file}: {len(crowded)} images have more objects than the {max_objects} queries can "
                f"predict: {_first_few(f'image id {self.images[i].id} has {counts[i]}' for i in crowded)}; "
                f"set the number of queries (--num_queries) to {counts.max()} or more"
            )


def read_annotations(file: Path) -> dict:
    if not file.is_file():
        raise ValueError(f"annotation file {file} does not exist; check the path to the data set")
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:  # wrong encodings as well as wrong syntax
        raise ValueError(f"{file} is not JSON ({error}); pass a COCO instances file") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{file} has no list {key!r}; pass a COCO instances file")
    return content


def _image_records(images: list[dict], file: Path) -> list[ImageRecord]:
    if not images:
        raise ValueError(f"{file}: 'images' is empty; list at least one image")
    records: dict[int, ImageRecord] = {}
    for entry in images:
        identity, name = (entry.get("id"), entry.get("file_name")) if isinstance(entry, dict) else (None, None)
        if type(identity) is not int or abs(identity) >= 2**63 or not isinstance(name, str):
            raise ValueError(f"{file}: image {entry!r:.200} needs an integer 'id' of 64 bits and a text 'file_name'")
        if identity in records:
            raise ValueError(
                f"{file}: image id {identity} is listed twice, for {records[identity].file_name!r} and {name!r}; "
                "remove one or give it its own id"
            )
        records[identity] = ImageRecord(identity, name, image_size(entry))
    return list(records.values())


def _check_annotations(content: dict, file: Path) -> None:
    images, categories = ({entry["id"] for entry in content[key]} for key in ("images", "categories"))
    for position, annotation in enumerate(content["annotations"]):
        if not isinstance(annotation, dict):
            raise ValueError(f"{file}: annotation number {position} is {annotation!r:.200}; it must be a JSON object")
        where = f"{file}: annotation id {annotation.get('id', f'(none, number {position})')}"
        image, category, box = (annotation.get(key) for key in ("image_id", "category_id", "bbox"))
        if type(image) is not int or image not in images:
            raise ValueError(f"{where} belongs to image id {image!r}, which 'images' does not list; add or remove it")
        where += f" (image id {image})"
        if type(category) is not int or category not in categories:
            raise ValueError(
                f"{where} has category id {category!r}, which 'categories' does not define; define it or correct the id"
            )
        numbers = isinstance(box, list) and len(box) == 4 and all(type(v) in (int, float) for v in box)
        if not numbers or not all(abs(value) < LARGEST for value in box) or box[2] < 0 or box[3] < 0:
            raise ValueError(
                f"{where} has bbox {box!r:.200}; it must be four finite numbers [left, top, width, height] "
                "without a negative size: correct or remove it"
            )


def _first_few(items: Iterable[str], limit: int = 3) -> str:
    items = list(items)
    return ", ".join(items[:limit]) + (", ..." if len(items) > limit else "")
