"""Boxes: two formats, the IoU and the generalised IoU (Rezatofighi et al., CVPR 2019), pairwise and row by row.

"cxcywh" is (centre x, centre y, width, height), "xyxy" is (left, top, right, bottom); any unit, last axis 4.
"""

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def box_area(boxes: Tensor) -> Tensor:
    """Area of xyxy boxes (..., 4) -> (...)."""
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)


def _intersection_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    intersection = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    return intersection, box_area(a) + box_area(b) - intersection


def _quotient(part: Tensor, whole: Tensor, eps: float) -> Tensor:
    return part / (whole + eps).clamp(min=torch.finfo(whole.dtype).tiny)


def iou(a: Tensor, b: Tensor, *, eps: float = 0.0) -> Tensor:
    """IoU of xyxy boxes in [0, 1]; all else as in `generalized_iou`."""
    return _quotient(*_intersection_and_union(a, b), eps)


def generalized_iou(a: Tensor, b: Tensor, *, eps: float = 0.0) -> Tensor:
    """GIoU of xyxy boxes in [-1, 1], broadcast over all axes but the last: row by row for equal shapes,
    pairwise for `a[:, None]` and `b[None]`.

    A pair of boxes without any area has IoU 0 instead of 0 / 0, so that a degenerate prediction cannot
    turn a training step into NaN. `eps` is added to every divisor, as some implementations do.
    """
    intersection, union = _intersection_and_union(a, b)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    return _quotient(intersection, union, eps) - _quotient(hull - union, hull, eps)
