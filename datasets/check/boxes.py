"""What is wrong with boxes. Each box gets at most one verdict: the one that explains the others."""

from __future__ import annotations

from typing import Any

import numpy as np

from samdetr.datasets.annotations import Annotations, number
from samdetr.datasets.check.report import Finding

ROUNDING = 1.0  # pixels by which a box may exceed its image: some formats count from 1, many round
FAR = 0.05  # fraction of the image's side: further outside than by carelessness
# An area is that of a mask, which covers part of the box. Below this share it is compared with the polygon, because
# masks can be that thin: one in 80 images of COCO has 0.017.
THIN = 0.05


def box_verdicts(annotations: Annotations) -> dict[str, np.ndarray]:
    """Masks (N,) of the annotations by kind of fault; they exclude each other."""
    boxes = annotations.boxes
    left, top, width, height = boxes.T
    verdicts = annotations.box_faults()
    usable = ~np.any(list(verdicts.values()), axis=0)
    with np.errstate(invalid="ignore"):
        good = usable & (width > 0) & (height > 0)
    verdicts["box_zero_size"] = usable & ~good

    # Corners or fractions are used for all boxes of an image, but a single box may reveal it.
    fractions = good & _in_fractions(boxes, good)
    good &= ~fractions
    corners = good & _corners(annotations, good)
    good &= ~corners

    columns, rows = annotations.frames.T  # comparisons with NaN (unknown) are False
    with np.errstate(invalid="ignore"):
        outside = good & ((left >= columns) | (top >= rows) | (left + width <= 0) | (top + height <= 0))
        beyond = good & ~outside & ((left < -ROUNDING) | (top < -ROUNDING) | (_overshoot(annotations) > ROUNDING))
    good &= ~outside & ~beyond
    return {
        **verdicts,
        "box_normalised": fractions,
        "box_xyxy": corners,
        "box_outside": outside,
        "box_partly_outside": beyond,
        "area": good & _bad_areas(annotations, good),
    }


def box_findings(annotations: Annotations, *, split: str) -> list[Finding]:
    def describe(row: int) -> str:
        entry = annotations.entries[row]
        text = f"{annotations.name(row)}: bbox {entry.get('bbox')!r:.120}"
        if kind == "area":
            return f"{text}, area {entry.get('area')!r:.40}"
        frame = annotations.frames[row]
        return text if np.isnan(frame).any() else f"{text} in {frame[0]:g} x {frame[1]:g} pixels"

    findings: list[Finding] = []
    for kind, faulty in box_verdicts(annotations).items():
        findings += Finding.of(kind, split, np.flatnonzero(faulty), describe)
    return findings


def area_fits(areas: np.ndarray, width: np.ndarray, height: np.ndarray) -> np.ndarray:
    """Whether areas are positive and no larger than the boxes, with a tolerance of half a pixel per side and 1 %."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.isfinite(areas) & (areas > 0) & (areas <= 1.01 * (width + 1) * (height + 1))


def _overshoot(annotations: Annotations) -> np.ndarray:
    """Pixels by which boxes exceed the right or bottom border, whichever is more."""
    with np.errstate(invalid="ignore", over="ignore"):
        return (annotations.boxes[:, :2] + annotations.boxes[:, 2:] - annotations.frames).max(1, initial=-np.inf)


def _in_fractions(boxes: np.ndarray, good: np.ndarray) -> np.ndarray:
    """Boxes within the first pixel, which must be fractions of the image.

    Integers (a box around exactly that pixel) count only if most boxes lie there.
    """
    with np.errstate(invalid="ignore"):
        small = good & (boxes >= 0).all(1) & (boxes <= 1.05).all(1)
        return small if small.sum() > 0.5 * good.sum() else small & (boxes != np.rint(boxes)).any(1)


def _corners(annotations: Annotations, good: np.ndarray) -> np.ndarray:
    """Boxes that are [left, top, right, bottom].

    Read as sizes, their right and bottom put the box's end far outside the image. If a fifth of a split's boxes end far
    outside and nearly all are valid corners, all are corners. Otherwise a box that ends far outside is recognised by a
    polygon that fits the corners, or by an area that is usual for the corners and far too small for the size; the other
    boxes of its image are then corners as well.
    """
    boxes, frames, areas = annotations.boxes, annotations.frames, annotations.areas
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        known = good & ~np.isnan(frames).any(1)
        far = known & ((boxes[:, :2] + boxes[:, 2:]) > (1 + FAR) * frames + ROUNDING).any(1)
        in_order = (boxes[:, 2:] > boxes[:, :2]).all(1) & (boxes[:, 2:] <= frames + ROUNDING).all(1)
        possible = known & in_order & (boxes[:, :2] >= -ROUNDING).all(1)
        far &= possible
        if far.sum() >= max(3, 0.2 * known.sum()) and possible.sum() >= 0.98 * known.sum():
            return possible
        if not far.any():
            return far
        of_corners, of_size = areas / (boxes[:, 2:] - boxes[:, :2]).prod(1), areas / boxes[:, 2:].prod(1)
        others = of_size[good & ~far & (areas > 0)]
        usual = min(1.0, float(np.median(others))) if len(others) else 1.0  # share of the box covered by its mask
        sure = far & (of_corners <= 1.02) & (of_corners > usual / 3) & (of_size < usual / 3)
    for row in np.flatnonzero(far & ~sure):
        polygons = [p for p in _polygons(annotations.entries[row].get("segmentation")) if len(p)]
        if polygons:
            corners = np.concatenate(polygons)
            sure[row] = np.abs(np.concatenate([corners.min(0), corners.max(0)]) - boxes[row]).max() <= 2
    images = set(annotations.image[sure]) - set(annotations.image[good & ~possible])
    return sure | (possible & np.isin(annotations.image, list(images)))


def _bad_areas(annotations: Annotations, good: np.ndarray) -> np.ndarray:
    """Areas that are present, and not positive, larger than the box or far too small for it.

    If nearly all areas without a mask equal those of the boxes, all of them must.
    """
    width, height = annotations.boxes[:, 2:].T
    areas, box_areas = annotations.areas, width * height
    judged = good & np.array(["area" in entry for entry in annotations.entries], bool)
    bad = judged & ~area_fits(areas, width, height)
    has_mask = np.array([bool(entry.get("segmentation")) for entry in annotations.entries], bool)
    with np.errstate(invalid="ignore"):
        maskless = judged & ~has_mask
        unlike = maskless & ~(abs(areas - box_areas) <= 0.01 * box_areas + width + height + 1)
        if maskless.sum() >= 20 and unlike.sum() <= 0.05 * maskless.sum():
            bad |= unlike
        thin = judged & ~bad & (areas < THIN * box_areas)
    for row in np.flatnonzero(thin):
        mask = _mask_area(annotations.entries[row].get("segmentation"))
        bad[row] = areas[row] < (THIN * box_areas[row] if mask is None else 0.3 * mask)
    return bad


def _polygons(segmentation: Any) -> list[np.ndarray]:
    """Corners (n, 2) of each polygon; none for run lengths and malformed entries."""
    try:
        return [np.array(part, np.float64).reshape(-1, 2) for part in segmentation if isinstance(part, list) and part]
    except (TypeError, ValueError, OverflowError):
        return []


def _mask_area(segmentation: Any) -> float | None:
    """Pixels that polygons or run lengths cover; None without either. 0 for compressed run lengths, so that any area
    passes."""
    if isinstance(segmentation, dict):
        lengths = segmentation.get("counts")
        if isinstance(lengths, list) and all(isinstance(length, (int, float)) for length in lengths):
            return sum(map(number, lengths[1::2]))
        return 0.0
    polygons = _polygons(segmentation)
    if not polygons:
        return None
    after = [np.roll(polygon, -1, 0) for polygon in polygons]
    return sum(abs((p[:, 0] * n[:, 1] - p[:, 1] * n[:, 0]).sum()) / 2 for p, n in zip(polygons, after))
