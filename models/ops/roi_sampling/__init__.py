"""RoIAlign, and bilinear samples between its bins."""

from __future__ import annotations

from torch import Tensor


def roi_sampling(cells: Tensor, boxes: Tensor, points: Tensor | None = None, *, bins: int = 7) -> Tensor:
    """RoIAlign (He et al., ICCV 2017, section 3) of boxes, or of points inside them.

    Aligned, with adaptive sampling: equal to torchvision.ops.roi_align(..., sampling_ratio=-1, aligned=True) up to
    rounding, and deterministic in backward. With `points`, equal to F.grid_sample of its result.

    Args:
        cells: (B, H, W, C), the map.
        boxes: (B, Q, 4), left, top, right, bottom in cells, 0 at the first cell's edge. A box may reach out of the map
            but not be longer than it. They get no gradient, as in RoIAlign.
        points: (B, Q, P, 2), x, y; -1 and 1 are the edges of the box. Beyond the centres of the outermost bins the
            value falls to 0 within a bin.
        bins: number of bins along each axis of a box.
    Returns:
        All bins, (B, Q, bins, bins, C), y before x; with points, bilinear samples between the bins, (B, Q, P, C).
    Raises:
        ValueError: shapes that do not fit.
    """
    batch, number = boxes.shape[:2]
    if cells.ndim != 4 or boxes.ndim != 3 or boxes.shape != (cells.shape[0], number, 4):
        raise ValueError(
            f"cells and boxes: expected (B, H, W, C) and (B, Q, 4), got {tuple(cells.shape)} and {tuple(boxes.shape)}"
        )
    if points is not None and (points.ndim != 4 or points.shape != (batch, number, points.shape[2], 2)):
        raise ValueError(f"points: expected {(batch, number)} of (P, 2) each, got {tuple(points.shape)}")
    boxes = boxes.detach()
    positions = None if points is None else (points + 1) * (bins / 2) - 0.5  # in bins, 0 at the centre of the first
    # Imported here, so that the aligner in another project needs little of this one.
    from samdetr.models.ops.roi_sampling.binding import KERNELS

    run = KERNELS.compiled if KERNELS.take(cells, boxes, positions) else KERNELS.plain
    return run(cells, boxes, positions, bins)
