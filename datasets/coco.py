"""A data set in COCO format: images and targets for the detector, ground truth for the evaluator."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from samdetr.datasets.annotations import Annotations, first_few, image_size
from samdetr.datasets.categories import Categories
from samdetr.datasets.ground_truth import GroundTruth
from samdetr.datasets.image_cache import ImageCache, share_files
from samdetr.datasets.image_list import ImageList, ImageRecord
from samdetr.datasets.images import FileFault, fault_of, glance, read_image
from samdetr.datasets.names import alike, folder_holds, leaves_folder
from samdetr.datasets.transforms import seeded
from samdetr.datasets.values import quoted, shown
from samdetr.util.box_ops import xyxy_to_cxcywh

TRIES = 50  # images to try before giving up, if one after another is unreadable


class CocoDetection(Dataset):
    """`dataset[i]` is (image, target): the tensor (3, H, W) that `transforms` make of the image, and a dict of

    - `labels` int64 (n,), labels of `categories`; `boxes` float32 (n, 4), cxcywh in fractions of the image;
    - `image_id` int64 (); `orig_size` int64 (2,), (height, width) of the upright image; `size` the same of the tensor.

    Crowd regions are not targets. Boxes are clipped to the image and dropped if nothing is left; images without boxes
    stay.

    In a training set, an image that cannot be read is replaced by another, a function of (`seed`, epoch, index) and of
    which files are readable. The target then has `unreadable`, reasons by index of the images that could not be read.
    In evaluation such an image raises.

    Random numbers in `transforms` are a function of (`seed`, epoch, index), whatever the number of workers and the step
    at which a run is resumed. Call `set_epoch` before iterating over an epoch.

    Args:
        transforms: called with (RGB image, target), as datasets.transforms describes.
        categories: those of a trained network; by default those of the annotation file.
        annotations: the content of `annotation_file`, if it has been read already.
        allow_outside: read files whose names leave the image folder.

    Attributes:
        annotated: False if the file has no list of annotations, as that of COCO's test images.
        ground_truth: what the evaluator compares with, crowds included; None for a training set.
        known_faults: faults of image files by index, as far as `check_files` has found them.

    Raises:
        ValueError: anything wrong with the annotations or files, in one line that names the file, the id, the value
            and the remedy.
    """

    def __init__(
        self,
        *,
        image_folder: str | os.PathLike,
        annotation_file: str | os.PathLike,
        transforms: Callable,
        train: bool,
        categories: Categories | None = None,
        seed: int = 0,
        annotations: Annotations | None = None,
        allow_outside: bool = False,
    ) -> None:
        self.image_folder, self.annotation_file = Path(image_folder), Path(annotation_file)
        self.transforms = transforms
        annotations = annotations or Annotations.read(self.annotation_file)
        found = Categories.from_annotations(annotations.content["categories"], file=str(self.annotation_file))
        if categories is not None:
            used = set(annotations.category_ids[annotations.objects()].tolist())
            categories.check_covers(found, used=used, file=str(self.annotation_file))
        self.categories = categories or found

        annotations.require_valid()
        self.annotated = annotations.annotated
        if not self.image_folder.is_dir():
            raise ValueError(f"image folder {self.image_folder} does not exist; check the path to the data set")
        # Tensors instead of lists of objects: datasets/image_list.py says why.
        self.images = ImageList([ImageRecord(e["id"], e["file_name"], image_size(e)) for e in annotations.images])
        if not allow_outside:
            self._require_inside()
        if not train:
            self._require_files()
        self._boxes, self._labels, self._first = self._objects(annotations)
        self.ground_truth = None if train else GroundTruth.from_annotations(annotations)
        self.known_faults: dict[int, FileFault] = {}
        self._train = train
        self._cache: ImageCache | None = None
        self._seed = seed
        self._epoch = torch.tensor(0).share_memory_()  # running workers see it change

    def __len__(self) -> int:
        return len(self.images)

    def set_epoch(self, epoch: int) -> None:
        """Draw the random numbers of another epoch from now on."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        place = range(len(self))[index]
        index, image, unreadable = self._read_some_image(place)
        orig_size = (image.height, image.width)
        boxes, labels = self.objects(index, image.size)
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=orig_size),
            "labels": labels,
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

    def objects(self, index: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Boxes (n, 4) of an image of `size` (width, height), xyxy in pixels, clipped to it, and labels (n,)."""
        start, end = self._first[index : index + 2].tolist()
        boxes, labels = self._boxes[start:end], self._labels[start:end]
        boxes = boxes.clamp(min=0).minimum(boxes.new_tensor(size * 2))
        keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
        return boxes[keep], labels[keep]

    def read_image(self, index: int) -> Image.Image:
        """Image `index` in RGB, upright, before any transform. Raises ValueError."""
        image = self._try_to_read(index)
        if isinstance(image, FileFault):
            raise ValueError(self.unreadable(index, image.reason))
        return image

    def fault(self, index: int) -> FileFault | None:
        """Why image `index` cannot be read, if so. Decodes it."""
        image = self._try_to_read(index)
        return image if isinstance(image, FileFault) else None

    def _try_to_read(self, index: int) -> Image.Image | FileFault:
        try:
            source = self._cache.read(index) if self._cache else self.image_path(index)
            return read_image(source, self.images[index].size)
        except MemoryError:
            raise
        except Exception as error:  # PIL raises many kinds for a broken file
            return fault_of(self.image_path(index), error)

    def _read_some_image(self, index: int) -> tuple[int, Image.Image, dict[int, str]]:
        """The index of the image that was read, the image, and reasons by index why others before it were not."""
        if not self._train:
            return index, self.read_image(index), {}
        faults: dict[int, str] = {}
        others = None
        first = index
        while len(faults) < min(TRIES, len(self)):
            if index not in faults:
                image = self._try_to_read(index)
                if not isinstance(image, FileFault):
                    return index, image, faults
                faults[index] = image.reason
            others = others or np.random.default_rng((self._seed, int(self._epoch), first))
            index = int(others.integers(len(self)))
        raise ValueError(
            f"{self.unreadable(first, faults[first])}; nor can the {len(faults) - 1} images tried after it"
        )

    def image_path(self, index: int) -> Path:
        return self.image_folder / self.images[index].file_name

    def hold_files(self) -> None:
        """Hold the image files in memory, once per node. Every process of the run must call this. Raises ValueError."""
        paths = [self.image_path(index) for index in range(len(self))]
        self._cache = share_files(paths, unreadable_as_empty=self._train)

    def check_files(self) -> None:
        """Check the ends of every image file and record faults in `known_faults`.

        Outside training, raises ValueError that names the first faulty file and the number of others.
        """
        paths = map(self.image_path, range(len(self)))
        sizes = (record.size for record in self.images)
        with ThreadPoolExecutor(max_workers=16) as pool:  # reading waits for a disk, possibly over a network
            faults = enumerate(pool.map(glance, paths, sizes))
            self.known_faults = {index: fault for index, fault in faults if fault}
        missing = {self.images[i].file_name: i for i, f in self.known_faults.items() if f.kind == "missing_image"}
        for name, files in self._alike(list(missing)).items():
            fault = self.known_faults[missing[name]]
            self.known_faults[missing[name]] = fault._replace(reason=fault.reason + folder_holds(files))
        if self.known_faults and not self._train:
            (index, fault), *others = self.known_faults.items()
            more = f" ({len(others)} more such files)" if others else ""
            raise ValueError(self.unreadable(index, fault.reason) + more)

    def unreadable(self, index: int, reason: str) -> str:
        """A message that names an image file, the reason and the remedy."""
        return (
            f"{shown(self.image_path(index))} (image id {self.images[index].id}) cannot be used: {reason}; "
            f"replace the file, or correct or remove its entry in {self.annotation_file}"
        )

    def _alike(self, missing: list[str]) -> dict[str, list[str]]:
        return alike(self.image_folder, missing, (record.file_name for record in self.images))

    def _named(self, records: Sequence[ImageRecord]) -> tuple[str, bool]:
        """The first few by name and id, each with the files that may be meant; and whether there are such files."""
        files = self._alike([record.file_name for record in records])
        text = first_few(f"{quoted(r.file_name)} (image id {r.id}){folder_holds(files[r.file_name])}" for r in records)
        return text, any(files.values())

    def _require_inside(self) -> None:
        outside = [record for record in self.images if leaves_folder(record.file_name)]
        if outside:
            some, _ = self._named(outside)
            raise ValueError(
                f"{self.annotation_file}: {len(outside)} file names leave the image folder {shown(self.image_folder)}: "
                f"{some}; correct them (python -m datasets.check FOLDER --fix "
                "OUT.json), or pass `allow_outside` if they are meant"
            )

    def _require_files(self) -> None:
        listings: dict[str, set[str]] = {}  # listing each folder once is much faster than looking up each file
        missing = []
        for record in self.images:
            parent, name = os.path.split(record.file_name)
            if parent not in listings:
                folder = self.image_folder / parent
                listings[parent] = set(os.listdir(folder)) if folder.is_dir() else set()
            if name not in listings[parent]:
                missing.append(record)
        if missing:
            some, found = self._named(missing)
            raise ValueError(
                f"{self.image_folder}: {len(missing)} of the {len(self)} images in {self.annotation_file} are "
                f"missing: {some}; "
                + (
                    "correct the names (python -m datasets.check FOLDER --fix OUT.json)"
                    if found
                    else "copy them there or remove their entries"
                )
            )

    def _objects(self, annotations: Annotations) -> tuple[Tensor, Tensor, Tensor]:
        """Objects sorted by image: boxes (N, 4) float32 in xyxy pixels, labels (N,), and the start of each image's
        objects (images + 1,)."""
        chosen = np.flatnonzero(annotations.objects())
        chosen = chosen[np.argsort(annotations.image[chosen], kind="stable")]
        boxes = annotations.boxes[chosen]
        boxes[:, 2:] += boxes[:, :2]
        labels = [self.categories.label_of[category] for category in annotations.category_ids[chosen].tolist()]
        first = np.searchsorted(annotations.image[chosen], np.arange(len(self) + 1))
        return (
            torch.from_numpy(boxes.astype(np.float32)),
            torch.tensor(labels, dtype=torch.int64),
            torch.from_numpy(first),
        )
