"""How much of the training batches is padding, with and without --size_buckets.

    python benchmarks/padding.py [--coco_path FOLDER] [--batch_size 2 4] [--epochs 1]

Prints the share of padded pixels for a made-up list with the sizes that are common in COCO, or for a data set. Sizes
are those after augmentation by the transforms of main.py, which run without pixels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

if __name__ == "__main__":  # started by its path: find the packages from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from samdetr.datasets.annotations import image_size
from samdetr.datasets.build import read_split
from samdetr.datasets.sampler import Buckets, TrainSampler
from samdetr.datasets.settings import Data
from samdetr.datasets.transforms import TrainTransforms, seeded

# (height, width), and how many of 100 images have it.
COCO = {
    (480, 640): 32, (427, 640): 21, (640, 480): 12, (426, 640): 9, (640, 427): 7, (640, 426): 3, (425, 640): 4,
    (360, 640): 3, (375, 500): 4, (500, 375): 1, (333, 500): 1, (640, 640): 2, (612, 612): 1,
}  # fmt: skip


def coco_sizes(number: int = 2000) -> list[tuple[int, int]]:
    """A made-up list."""
    shape = list(COCO)
    drawn = torch.multinomial(torch.tensor(list(COCO.values()), dtype=torch.float), number, replacement=True,
                              generator=torch.Generator().manual_seed(0))  # fmt: skip
    return [shape[index] for index in drawn.tolist()]


def augmented(sizes: Sequence[tuple[int, int]], transforms: v2.Compose, *, epoch: int) -> list[tuple[int, int]]:
    """Sizes after the transforms, of which the first makes a tensor of an image."""
    steps = v2.Compose(transforms.transforms[1:])
    found = []
    for index, size in enumerate(sizes):
        image = tv_tensors.Image(torch.empty(3, *size, dtype=torch.uint8, device="meta"))
        boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=size)
        with seeded(0, epoch, index):
            image, _ = steps(image, {"boxes": boxes, "labels": torch.zeros(0, dtype=torch.int64)})
        found.append((image.shape[-2], image.shape[-1]))
    return found


def padded_share(order: Iterable[int], sizes: Sequence[tuple[int, int]], *, batch_size: int) -> float:
    """Share of padded pixels, if the images of an order come in batches."""
    chosen = torch.tensor([sizes[index] for index in order], dtype=torch.float64)  # (N, 2)
    batches: Tensor = chosen[: len(chosen) // batch_size * batch_size].view(-1, batch_size, 2)
    return 1 - float(batches.prod(-1).sum() / (batches.amax(1).prod(-1) * batch_size).sum())


def table(sizes: Sequence[tuple[int, int]], *, batch_sizes: Sequence[int], epochs: int, data: Data) -> list[str]:
    """Rows of a Markdown table."""
    numbers = (0, 2, 4, 8, 16)
    lines = [
        "| augmentation | images in a batch | " + " | ".join(f"{n} buckets" if n else "off" for n in numbers) + " |"
    ]
    lines.append("| --- " * (2 + len(numbers)) + "|")
    for crop, name in ((True, "with crops"), (False, "`--no_crop`")):
        made = TrainTransforms(short_sides=data.train_sizes, max_size=data.max_size, crop=crop, normalize=False)
        by_epoch = [augmented(sizes, made, epoch=epoch) for epoch in range(epochs)]
        for size in batch_sizes:
            cells = []
            for number in numbers:
                ratios = [width / height for height, width in sizes]
                buckets = Buckets(ratios=ratios, number=number, group=size) if number else None
                sampler = TrainSampler(length=len(sizes), batch=size, rank=0, world_size=1, seed=0, buckets=buckets)
                shares = []
                for epoch, found in enumerate(by_epoch):
                    sampler.set_epoch(epoch)
                    shares.append(padded_share(sampler, found, batch_size=size))
                cells.append(f"{100 * sum(shares) / epochs:.1f} %")
            lines.append(f"| {name} | {size} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--coco_path", help="a data set; by default the made-up list")
    parser.add_argument("--batch_size", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--epochs", type=int, default=1)
    options = parser.parse_args()
    data = Data(coco_path=options.coco_path or "")
    if options.coco_path:
        found = [image_size(entry) for entry in read_split("train", data).images]
        sizes = [(int(size[1]), int(size[0])) for size in found if size]
    else:
        sizes = coco_sizes()
    print(f"{len(sizes)} images, {options.epochs} epoch(s)")
    print("\n".join(table(sizes, batch_sizes=options.batch_size, epochs=options.epochs, data=data)))


if __name__ == "__main__":
    main()
