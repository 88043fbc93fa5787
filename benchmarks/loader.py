"""Images from files to batches: `python benchmarks/loader.py --coco_path data/coco`.

Two tables. The first has ways to decode a file and to resize its pixels to a short side of 480 to 800, as training
does, on one thread; differences are those of the resized pixels to PIL's, in levels of 0 to 255:

    PIL              PIL decodes and resizes, antialiased bilinear: the results to keep
    PIL gap          the same with reducing_gap, which resizes in two steps where it shrinks by much
    tensor, float    PIL decodes, PyTorch resizes in float32 and rounds
    tensor, uint8    PIL decodes, PyTorch resizes bytes: what the data set does
    torchvision      torchvision.io decodes, PyTorch resizes bytes; torchvision 0.29 says that this decoder will go

The second has whole epochs of the loader, from files to batches of float32 that a network takes on the CPU, with the
processes' CPU time and the largest growth of a worker's own memory after the first epoch:

    PIL              PIL resizes, workers normalise and hand over floats
    ours             datasets.build_dataset and collate, as main.py uses them

Paths take turns in every round; figures are medians over rounds. Without --coco_path images are drawn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # started by its path: find the packages from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from benchmarks.report import positive, surroundings, write
from samdetr.cli import parse
from samdetr.datasets.build import build_dataset, collate
from samdetr.datasets.images import read_image
from samdetr.datasets.settings import Data
from samdetr.datasets.shapes import write_dataset
from samdetr.datasets.transforms import SHORT_SIDES, ToTensor, resized_size
from samdetr.util.padded_images import IMAGENET_MEAN, IMAGENET_STD, pad_images
from samdetr.util.targets import TargetBatch

to_tensor = ToTensor()


def by_pil(image: Image.Image, size: tuple[int, int]) -> Tensor:
    return to_tensor(image.resize(size[::-1], Image.Resampling.BILINEAR))


def by_pil_in_steps(image: Image.Image, size: tuple[int, int]) -> Tensor:
    return to_tensor(image.resize(size[::-1], Image.Resampling.BILINEAR, reducing_gap=2.0))


def by_floats(image: Image.Image, size: tuple[int, int]) -> Tensor:
    resized = F.resize(to_tensor(image).to(torch.float32), list(size), antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def by_bytes(image: Image.Image, size: tuple[int, int]) -> Tensor:
    return F.resize(to_tensor(image), list(size), antialias=True)


def bytes_to_bytes(image: Tensor, size: tuple[int, int]) -> Tensor:
    return F.resize(image, list(size), antialias=True)


def decode_by_torchvision(path: Path) -> Tensor:
    return torchvision.io.decode_image(str(path), mode=torchvision.io.ImageReadMode.RGB)


ROUTES: dict[str, tuple[Callable, Callable]] = {
    "PIL": (read_image, by_pil),
    "PIL gap": (read_image, by_pil_in_steps),
    "tensor, float": (read_image, by_floats),
    "tensor, uint8": (read_image, by_bytes),
}
if hasattr(torchvision.io, "decode_image"):
    ROUTES["torchvision"] = (decode_by_torchvision, bytes_to_bytes)


def measure_routes(paths: list[Path], rounds: int) -> dict:
    """By route: seconds an image for decoding and resizing, images a second, difference to PIL's pixels."""
    sizes = []
    for index, path in enumerate(paths):
        with Image.open(path) as image:
            sizes.append(resized_size(image.height, image.width, SHORT_SIDES[index % len(SHORT_SIDES)], 1333))
    times: dict[str, tuple[list, list]] = {route: ([], []) for route in ROUTES}
    largest, unlike, values = dict.fromkeys(ROUTES, 0), dict.fromkeys(ROUTES, 0), 0
    for number in range(rounds + 1):  # the first warms up, and compares
        spent = {route: [0.0, 0.0] for route in ROUTES}
        for path, size in zip(paths, sizes):
            pixels = {}
            for route, (decode, resize) in ROUTES.items():
                begin = time.perf_counter()
                image = decode(path)
                middle = time.perf_counter()
                pixels[route] = resize(image, size)
                spent[route][0] += middle - begin
                spent[route][1] += time.perf_counter() - middle
            if number == 0:
                values += pixels["PIL"].numel()
                for route in ROUTES:
                    difference = (pixels[route].to(torch.int16) - pixels["PIL"].to(torch.int16)).abs()
                    largest[route] = max(largest[route], int(difference.max()))
                    unlike[route] += int(difference.count_nonzero())
        for route in ROUTES if number else ():
            for part in range(2):
                times[route][part].append(spent[route][part] / len(paths))
    result = {}
    for route, (decoding, resizing) in times.items():
        total = statistics.median(map(sum, zip(decoding, resizing)))
        result[route] = {
            "decode_s": statistics.median(decoding),
            "resize_s": statistics.median(resizing),
            "images_per_s": 1 / total,
            "largest_difference": largest[route],
            "share_different": unlike[route] / values,
        }
    for entry in result.values():
        entry["ratio"] = entry["images_per_s"] / result["PIL"]["images_per_s"]
    return result


def print_routes(result: dict) -> None:
    print(f"{'':16}{'decode':>10}{'resize':>10}{'images/s':>10}{'ratio':>8}{'largest':>9}{'different':>11}")
    for route, row in result.items():
        milliseconds = "".join(f"{1e3 * row[part]:7.2f} ms" for part in ("decode_s", "resize_s"))
        print(
            f"{route:16}{milliseconds}{row['images_per_s']:10.1f}{row['ratio']:7.2f}x"
            f"{row['largest_difference']:9}{row['share_different']:11.4%}",
            flush=True,
        )


def pil_transforms(split: str, args: argparse.Namespace) -> v2.Compose:
    """What datasets.transforms would be with PIL alone."""

    class Resize(v2.Transform):
        _transformed_types = (Image.Image,)

        def transform(self, inpt: Image.Image, params: dict) -> Image.Image:
            side = short_sides[int(torch.randint(len(short_sides), ()))]
            size = resized_size(inpt.height, inpt.width, side, args.max_size)
            return inpt.resize(size[::-1], Image.Resampling.BILINEAR)

    short_sides = args.train_sizes if split == "train" else [args.eval_size]
    flip = [v2.RandomHorizontalFlip()] if split == "train" else []
    normalise = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    return v2.Compose([*flip, Resize(), *normalise])


def collate_floats(batch: list) -> tuple:
    images, targets = zip(*batch)
    return pad_images(images), TargetBatch.pack(targets)


def memory_of(process: int) -> int | None:
    """Bytes that no other process shares; None if the system does not report them."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def cpu_seconds_of(process: int) -> float:
    """User and system time of a process so far; NaN if the system does not report it."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_loaders(split: str, args: argparse.Namespace, rounds: int) -> dict:
    """By path: images a second, CPU seconds an image of workers and of this process, growth of a worker in bytes."""
    options = {"batch_size": args.batch_size, "num_workers": args.num_workers, "persistent_workers": True}
    ours, pil = (build_dataset(split, Data.pick(vars(args))) for _ in range(2))
    pil.transforms = pil_transforms(split, args)
    loaders = {
        "PIL": DataLoader(pil, collate_fn=collate_floats, **options),
        "ours": DataLoader(ours, collate_fn=collate, **options),
    }
    runs: dict[str, list[tuple]] = {path: [] for path in loaders}
    memory: dict[str, list] = {path: [] for path in loaders}
    for epoch in range(rounds + 1):  # the first starts the workers
        for path, loader in loaders.items():
            loader.dataset.set_epoch(epoch)
            batches = iter(loader)
            workers = [worker.pid for worker in batches._workers]
            before = sum(map(cpu_seconds_of, workers)), time.process_time(), time.perf_counter()
            for images, targets in batches:
                images.to("cpu")
                targets.to("cpu")
            after = sum(map(cpu_seconds_of, workers)), time.process_time(), time.perf_counter()
            runs[path].append(tuple((b - a) / len(ours) for a, b in zip(before, after)))
            memory[path].append([memory_of(worker) for worker in workers])
    result = {}
    for path in loaders:
        workers_s, main_s, seconds = (statistics.median(values) for values in zip(*runs[path][1:]))
        first, last = memory[path][0], memory[path][-1]
        growth = None if None in (*first, *last) else max(b - a for a, b in zip(first, last))
        result[path] = {"images_per_s": 1 / seconds, "workers_s": workers_s, "main_s": main_s, "growth_bytes": growth}
    for row in result.values():
        row["ratio"] = row["images_per_s"] / result["PIL"]["images_per_s"]
    return result


def print_loaders(split: str, result: dict) -> None:
    for path, row in result.items():
        growth = "-" if row["growth_bytes"] is None else f"{row['growth_bytes'] / 2**20:.1f} MiB"
        print(
            f"{split:8}{path:8}{row['images_per_s']:10.1f}{row['ratio']:7.2f}x"
            f"{1e3 * row['workers_s']:9.1f} ms{1e3 * row['main_s']:7.1f} ms{growth:>11}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coco_path", type=Path, help="data in the layout of COCO 2017; by default drawn")
    parser.add_argument("--images", type=positive, default=40, help="of the training set, for the first table")
    parser.add_argument("--num_workers", type=positive, default=2, help="for the second table")
    parser.add_argument("--batch_size", type=positive, default=2, help="for the second table")
    parser.add_argument("--rounds", type=positive, default=3, help="to take medians of")
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    about = surroundings(packages=("torch", "torchvision", "pillow", "numpy"), device="cpu", threads=1)
    with tempfile.TemporaryDirectory() as folder:
        if args.coco_path is None:
            write_dataset(Path(folder) / "drawn", num_train=40, num_val=40, size=480, seed=0)
        data = args.coco_path or Path(folder) / "drawn"
        flags = ["--coco_path", str(data), "--no_crop", "--num_queries", "1000", "--num_workers", str(args.num_workers)]
        settings = Namespace(**parse([*flags, "--batch_size", str(args.batch_size)]).settings.flat())
        train_set = build_dataset("train", Data.pick(vars(settings)))
        paths = [train_set.image_path(index) for index in range(min(args.images, len(train_set)))]
        print(f"\n{len(paths)} images of {args.coco_path or '480 x 480, drawn'}, short sides 480 to 800, 1 thread")
        routes = measure_routes(paths, args.rounds)
        print_routes(routes)

        print(f"\nepochs of the loader, batches of {args.batch_size}, {args.num_workers} workers")
        print(f"{'split':8}{'path':8}{'images/s':>10}{'ratio':>8}{'workers':>12}{'main':>10}{'growth':>11}")
        loaders = {}
        for split in ("train", "val"):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
                loaders[split] = measure_loaders(split, settings, args.rounds)
            print_loaders(split, loaders[split])
    report = {
        **about,
        "data": str(args.coco_path or "drawn"),
        "batch_size": args.batch_size,
        "num_workers": args.num_workers,
        "routes": routes,
        "loaders": loaders,
    }
    write(args.json, report)


if __name__ == "__main__":
    main()
