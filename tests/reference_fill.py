"""The state that the reference figures were made in: weights made from their names, and two images with objects.

Nothing random is stored. Every array comes from NumPy's PCG64, seeded with the CRC-32 of a name - of the official
parameter, or `image0`, `target0`, ... - so that any implementation can be put into the same state by itself.
Everything is float64 but counters, labels and sizes.
"""

from __future__ import annotations

import zlib

import numpy as np

IMAGE_SIZES = ((160, 192), (128, 224))  # height, width: each larger in one, so that both are padded in a batch
OBJECTS = (5, 3)

# What multiplies a matrix's 1 / sqrt(fan in), by a part of its name; the first that matches counts. Branches that join
# a residual stream are weak, so that the tokens of a deep stack stay apart.
_MATRIX_GAINS = {
    "bbox_embed": 1.2,
    "sampling_offsets": 0.5,
    "input_proj": 4.0,
    "cross_attn.out_proj": 2.0,
    "out_proj": 0.4,
    "output_proj": 0.4,
    "linear2": 0.4,
}
_OTHER_MATRICES = 1.4


def generator(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def weights(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The parameter or buffer with this official name."""
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    draw = generator(name)

    def normal(mean: float, deviation: float) -> np.ndarray:
        return mean + deviation * draw.standard_normal(shape)

    if name.endswith("running_var"):
        return draw.uniform(0.5, 1.5, shape)
    if name.endswith("running_mean"):
        return normal(0, 0.1)
    if any(part in name for part in ("query_embed", "refpoint", "tgt_embed")):
        return normal(0, 1.5)
    if "level_embed" in name:
        return normal(0, 0.5)
    if name.split(".")[-1] == "bias":
        if "sampling_offsets" in name:
            return normal(0, 2)
        return normal(-2, 0.3) if "class_embed" in name else normal(0, 0.05)
    if len(shape) == 1:  # the scale of a norm; the last one of a bottleneck is weak, as it joins a residual stream
        return draw.uniform(0.1, 0.3, shape) if ".bn3." in name else draw.uniform(0.6, 1.2, shape)
    gain = next((gain for part, gain in _MATRIX_GAINS.items() if part in name), _OTHER_MATRICES)
    return normal(0, gain / np.sqrt(np.prod(shape[1:], dtype=int)))


def images() -> list[np.ndarray]:
    """Two normalised images (3, height, width): noise with twelve plain rectangles on it."""
    pictures = []
    for index, (height, width) in enumerate(IMAGE_SIZES):
        draw = generator(f"image{index}")
        picture = 0.3 * draw.standard_normal((3, height, width))
        for _ in range(12):
            top, left = draw.integers(0, height - 40), draw.integers(0, width - 40)
            tall, wide = draw.integers(30, 90, 2)
            picture[:, top : top + tall, left : left + wide] += 2 * draw.standard_normal((3, 1, 1))
        pictures.append(picture)
    return pictures


def targets(num_classes: int = 91) -> list[dict[str, np.ndarray]]:
    """For each image `labels` (n,), `boxes` (n, 4) as normalised cx, cy, w, h, all inside, and `orig_size` (2,)."""
    objects = []
    for index, number in enumerate(OBJECTS):
        draw = generator(f"target{index}")
        sizes = draw.uniform(0.08, 0.5, (number, 2))
        centres = sizes / 2 + draw.uniform(0, 1, (number, 2)) * (1 - sizes)
        labels = draw.integers(1, num_classes, number)
        boxes = np.concatenate([centres, sizes], axis=1)
        objects.append({"labels": labels, "boxes": boxes, "orig_size": 3 * np.array(IMAGE_SIZES[index])})
    return objects
