"""Boxes: two formats and the generalised IoU (Rezatofighi et al., CVPR 2019), pairwise and row by row.

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


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU of xyxy boxes in [-1, 1], broadcast over all axes but the last: row by row for equal shapes,
    pairwise for `a[:, None]` and `b[None]`.

    A pair of boxes without any area has IoU 0 instead of 0 / 0, so that a degenerate prediction cannot
    turn a training step into NaN.
    """
    intersection = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = box_area(a) + box_area(b) - intersection
    tiny = torch.finfo(union.dtype).tiny
    return intersection / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)
