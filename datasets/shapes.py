"""The embedded data set: draw a small detection problem in COCO format from a seed.

    python -m datasets.shapes --output data/shapes

Ellipses, triangles, rectangles and stars of any colour, size and rotation partly overlap on a background of colour
gradient, smooth noise and stripes. Every image is a function of (seed, split, index). In each split, one image in 25
has no object, and two have a crowd region: a cluster of tiny shapes under one annotation.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from samdetr.util.command_line import run_command

VERSION = 1  # of the pictures: raise it with any change of them, so that older sets are not taken for complete
INFO = {"description": "Shapes, drawn by datasets/shapes.py", "version": VERSION}
CATEGORIES = {1: "ellipse", 2: "triangle", 3: "rectangle", 5: "star"}  # without 4, as real data sets have gaps
ASPECT = {"ellipse": (0.6, 1.0), "triangle": (0.7, 1.0), "rectangle": (0.4, 0.7), "star": (0.85, 1.0)}  # short / long
SPLITS = ("train", "val")
LEAST = {"num_train": 1, "num_val": 1, "size": 64, "seed": 0}

MAX_OBJECTS = 3
LONG_SIDE = (28 / 96, 56 / 96)  # of a shape before rotation, in fractions of the image's side
SHORT_SIDE = 18 / 96  # minimum: thinner shapes cannot be distinguished
TILT = np.pi / 12  # maximum
MIN_VISIBLE = 0.75  # share of a shape that later shapes leave uncovered
MIN_CONTRAST = 110  # distance of a shape's colour from its surroundings and from other shapes, RGB in 0..255
NOISE = 5  # standard deviation at each pixel
EMPTY_EVERY, EMPTY_AT = 25, 12
CROWD_AT = (5, 30)
# PIL rounds corners to whole pixels and fills every pixel on an edge. Drawing 8 times as large limits the error to 1/6
# pixel.
OVERSAMPLING = 8


@dataclass(frozen=True)
class Shape:
    """`outlines` hold the corners (n, 2), x and y in pixels, of the shape or of a crowd's members. `mask` (S, S) is
    True where they cover at least half of a pixel, even if other shapes cover them."""

    category_id: int
    outlines: list[np.ndarray]
    mask: np.ndarray
    crowd: bool = False


def draw_image(*, seed: int, split: str, index: int, size: int) -> tuple[np.ndarray, list[Shape]]:
    """Image `index` of a split as uint8 (S, S, 3), and its shapes from bottom to top."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    canvas = _background(rng, size)
    if index % EMPTY_EVERY == EMPTY_AT:
        return _finish(rng, canvas), []

    shapes: list[Shape] = []
    colours: list[np.ndarray] = []
    if index in CROWD_AT:
        shapes.append(_paint_crowd(rng, canvas, colours))
    for _ in range(rng.integers(1, MAX_OBJECTS + 1)):
        category = int(rng.choice(list(CATEGORIES)))
        for _ in range(20):  # attempts before the image gets one shape fewer
            outline = _random_outline(rng, size, category)
            cover = _coverage(outline, size)
            mask = cover >= 0.5
            if _leaves_visible(shapes, mask):
                _paint(rng, canvas, cover, _contrasting_colour(rng, canvas[mask].mean(0), colours))
                shapes.append(Shape(category, [outline], mask))
                break
    return _finish(rng, canvas), shapes


def write_dataset(folder: Path, *, num_train: int, num_val: int, size: int, seed: int) -> None:
    """Write train2017/, val2017/ and annotations/ into `folder`, which must not exist."""
    settings = {"num_train": num_train, "num_val": num_val, "size": size, "seed": seed}
    (folder / "annotations").mkdir(parents=True)
    first_image, first_object = 1, 1
    for split, count in zip(SPLITS, (num_train, num_val)):
        image_folder = folder / f"{split}2017"
        image_folder.mkdir()
        images: list[dict] = []
        annotations: list[dict] = []
        for index in range(count):
            pixels, shapes = draw_image(seed=seed, split=split, index=index, size=size)
            image_id, name = first_image + index, f"{first_image + index:012d}.jpg"
            Image.fromarray(pixels).save(image_folder / name, quality=95, subsampling=0)
            images.append({"id": image_id, "file_name": name, "width": size, "height": size})
            for shape in shapes:
                annotations.append({"id": first_object + len(annotations), "image_id": image_id, **_annotation(shape)})
        first_image, first_object = first_image + count, first_object + len(annotations)
        content = {
            "info": {**INFO, "settings": settings},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": identity, "name": name} for identity, name in CATEGORIES.items()],
        }
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


def is_complete(folder: Path, **settings: int) -> bool:
    """Whether `folder` holds the complete data set of these settings, those of `write_dataset`."""
    for split in SPLITS:
        try:
            content = json.loads((folder / "annotations" / f"instances_{split}2017.json").read_bytes())
            files = os.listdir(folder / f"{split}2017")
        except (OSError, ValueError):
            return False
        if content.get("info") != {**INFO, "settings": settings} or len(files) != settings[f"num_{split}"]:
            return False
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the data set unless it exists. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m datasets.shapes",
        description="Draw a small data set of shapes in COCO format.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("data/shapes"), help="folder to create")
    parser.add_argument("--num_train", type=int, default=2000, help="training images")
    parser.add_argument("--num_val", type=int, default=300, help="validation images")
    parser.add_argument("--size", type=int, default=96, help="side of the square images in pixels")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws another set")
    settings = vars(parser.parse_args(argv))
    return run_command("datasets.shapes", lambda: _draw_unless_complete(settings.pop("output"), settings))


def _draw_unless_complete(folder: Path, settings: dict[str, int]) -> None:
    output = folder.resolve()
    for name, least in LEAST.items():
        if settings[name] < least:
            raise ValueError(f"`{name}` {settings[name]} must be at least {least}")
    if is_complete(output, **settings):
        print(f"{folder} is complete already")
        return
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(
            f"{folder} exists and is not a complete set of these settings; delete it or choose another --output"
        )
    # Drawn in a temporary folder and renamed, so that an interrupted run leaves nothing that looks like a data set.
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        write_dataset(partial, **settings)
        partial.rename(output)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error}; choose another --output") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{folder}: {settings['num_train']} training and {settings['num_val']} validation images")


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Gradient between two colours + smooth noise + stripes, float (S, S, 3)."""
    y, x = np.mgrid[:size, :size] / size - 0.5
    angles = rng.uniform(0, 2 * np.pi, 2)
    slope, across = (np.cos(a) * x + np.sin(a) * y for a in angles)
    first, second = rng.uniform(60, 195) + rng.uniform(-40, 40, (2, 3))
    canvas = first + (second - first) * 0.4 * (slope[..., None] + 0.5)

    coarse = rng.uniform(0, 255, (6, 6, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64)
    canvas += (smooth - 127.5) * rng.uniform(0.05, 0.25)

    wavelength = rng.uniform(5, 20) / 96
    stripes = np.sin(2 * np.pi * across / wavelength + rng.uniform(0, 2 * np.pi))
    return canvas + stripes[..., None] * rng.uniform(-18, 18, 3)


def _random_outline(rng: np.random.Generator, size: int, category: int) -> np.ndarray:
    """Corners (n, 2) of a shape of random size, rotation and place inside the image."""
    long_side = rng.uniform(*LONG_SIDE) * size
    short_side = max(long_side * rng.uniform(*ASPECT[CATEGORIES[category]]), SHORT_SIDE * size)
    sides = (long_side, short_side) if rng.random() < 0.5 else (short_side, long_side)
    outline = _rotated(rng, category, *sides)
    return outline + rng.uniform(1 - outline.min(0), size - 1 - outline.max(0))


def _rotated(rng: np.random.Generator, category: int, width: float, height: float) -> np.ndarray:
    """Corners (n, 2) of a shape around the origin, tilted by a random angle."""
    angle = rng.uniform(-TILT, TILT)
    cos, sin = np.cos(angle), np.sin(angle)
    return _unit_outline(CATEGORIES[category]) * [width / 2, height / 2] @ np.array([[cos, sin], [-sin, cos]])


def _unit_outline(name: str) -> np.ndarray:
    """Corners (n, 2) in [-1, 1]; an ellipse is a polygon of 48 corners."""
    if name == "rectangle":
        return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=np.float64)
    if name == "triangle":
        return np.array([[0, -1], [1, 1], [-1, 1]], dtype=np.float64)
    count = {"ellipse": 48, "star": 10}[name]
    angles = np.arange(count) * 2 * np.pi / count
    radius = np.where(np.arange(count) % 2, 0.42, 1.0) if name == "star" else 1.0
    return np.stack([radius * np.sin(angles), -radius * np.cos(angles)], 1)


def _coverage(outline: np.ndarray, size: int) -> np.ndarray:
    """The share of each pixel that a polygon covers, (S, S) in [0, 1]."""
    large = Image.new("L", (size * OVERSAMPLING, size * OVERSAMPLING))
    ImageDraw.Draw(large).polygon([tuple(corner) for corner in outline * OVERSAMPLING], fill=255)
    return np.asarray(large.reduce(OVERSAMPLING)) / 255


def _leaves_visible(shapes: Sequence[Shape], mask: np.ndarray) -> bool:
    """Whether every shape stays visible enough if another covers `mask`."""
    covered = mask
    for shape in reversed(shapes):  # later shapes lie above
        if (shape.mask & ~covered).sum() < MIN_VISIBLE * shape.mask.sum():
            return False
        covered = covered | shape.mask
    return True


def _contrasting_colour(rng: np.random.Generator, surroundings: np.ndarray, colours: list[np.ndarray]) -> np.ndarray:
    """A colour (3,) far from the surroundings and from `colours`; it is appended to `colours`."""
    candidates = rng.uniform(10, 245, (32, 3))
    distance = np.linalg.norm(candidates[:, None] - np.stack([surroundings, *colours]), axis=-1).min(1)
    far = np.flatnonzero(distance >= MIN_CONTRAST)
    colours.append(candidates[far[0] if len(far) else distance.argmax()])
    return colours[-1]


def _paint(rng: np.random.Generator, canvas: np.ndarray, cover: np.ndarray, colour: np.ndarray) -> None:
    """Blend a slightly shaded colour into `canvas` in proportion to `cover`."""
    y, x = np.mgrid[: len(canvas), : len(canvas)] / len(canvas) - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    shaded = colour + 50 * (np.cos(angle) * x + np.sin(angle) * y)[..., None]
    canvas += cover[..., None] * (shaded - canvas)


def _paint_crowd(rng: np.random.Generator, canvas: np.ndarray, colours: list[np.ndarray]) -> Shape:
    """Paint tiny shapes of one category and colour close together."""
    size = len(canvas)
    category = int(rng.choice(list(CATEGORIES)))
    colour = _contrasting_colour(rng, canvas.mean((0, 1)), colours)
    centre = rng.uniform(0.25, 0.75, 2) * size
    outlines, mask = [], np.zeros((size, size), dtype=bool)
    for _ in range(14):
        side = rng.uniform(6, 9) / 96 * size
        outline = _rotated(rng, category, side, side) + centre + rng.uniform(-0.17, 0.17, 2) * size
        cover = _coverage(outline, size)
        _paint(rng, canvas, cover, colour)
        outlines.append(outline)
        mask |= cover >= 0.5
    return Shape(category, outlines, mask, crowd=True)


def _finish(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    return (canvas + rng.normal(0, NOISE, canvas.shape)).round().clip(0, 255).astype(np.uint8)


def _annotation(shape: Shape) -> dict:
    """The entry of the annotation file without its ids. The box ends at pixel edges, tight around the mask."""
    rows, columns = (np.flatnonzero(shape.mask.any(axis)) for axis in (1, 0))
    left, top = int(columns[0]), int(rows[0])
    box = [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]
    entry = {"category_id": shape.category_id, "bbox": box, "area": int(shape.mask.sum()), "iscrowd": int(shape.crowd)}
    if shape.crowd:
        entry["segmentation"] = {"size": list(shape.mask.shape), "counts": _run_lengths(shape.mask)}
    return entry


def _run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed RLE: lengths of runs of 0, 1, 0, ... down the columns; the first may be 0."""
    pixels = mask.ravel(order="F")
    ends = np.flatnonzero(np.diff(pixels)) + 1
    lengths = np.diff([0, *ends, len(pixels)]).tolist()
    return [0, *lengths] if pixels[0] else lengths


if __name__ == "__main__":
    sys.exit(main())
