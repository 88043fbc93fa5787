"""SAP-DETR's losses and matching costs. The contracts are those of models/criterion.py and models/matcher.py.

Legend: S predictions matched at once, Q queries, n objects of one image, M matched pairs.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from samdetr.models import matcher
from samdetr.models.criterion import Loss, Targets, matched_boxes, sigmoid_focal_loss
from samdetr.models.matcher import Cost, Matches, focal_change
from samdetr.util.box_ops import cxcywh_to_xyxy, generalized_iou, iou

EPS = 1e-6  # added to the divisors of IoU and GIoU
OUTSIDE = 9999.0  # published weight of `outside_cost`: a point outside an object matches it only if none is inside
giou_cost = partial(matcher.giou_cost, eps=EPS)


def object_class_cost(*, alpha: float) -> Cost:
    """Focal class cost of the probability of being an object and of its class."""

    def cost(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
        probability = outputs["pred_logits"].sigmoid() * outputs["pred_objs"].sigmoid()  # (S, Q, classes)
        return focal_change(probability[..., targets["labels"]], alpha=alpha)

    return cost


def corner_l1_cost(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    """Sum of absolute differences of left, top, right, bottom."""
    predicted, wanted = cxcywh_to_xyxy(outputs["pred_boxes"]), cxcywh_to_xyxy(targets["boxes"])
    return (predicted[..., :, None, :] - wanted).abs().sum(-1)


def outside_cost(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    """1 where the salient point is outside the object's box, else 0."""
    points = outputs["pred_points"]
    return _outside(points[..., :, None, :], targets["boxes"]).to(points.dtype)


def _outside(points: Tensor, boxes: Tensor) -> Tensor:
    """Whether points (..., 2) are outside boxes (..., 4), cx, cy, w, h; on the edge is inside."""
    corners = cxcywh_to_xyxy(boxes)
    return ((points < corners[..., :2]) | (points > corners[..., 2:])).any(-1)


def corner_box_losses(
    outputs: dict[str, Any], targets: Targets, matches: Matches, num_boxes: Tensor
) -> dict[str, Tensor]:
    """`loss_bbox`, L1 on left, top, right, bottom, and `loss_giou`, of the matched pairs, by the number of boxes."""
    predicted, wanted = _matched_corners(outputs, targets, matches)
    overlap = generalized_iou(predicted, wanted, eps=EPS)
    return {"loss_bbox": (predicted - wanted).abs().sum() / num_boxes, "loss_giou": (1 - overlap).sum() / num_boxes}


def object_loss(*, alpha: float, detach_target: bool = False) -> Loss:
    """`loss_ce_obj`: focal loss of being an object over all queries, divided by the number of boxes. The target
    of a matched query is the IoU of its box, of all others 0.

    As published the target is part of the graph, so boxes also learn from this loss, perhaps towards a smaller IoU;
    `detach_target` detaches it.
    """

    def loss(outputs: dict[str, Any], targets: Targets, matches: Matches, num_boxes: Tensor) -> dict[str, Tensor]:
        logits = outputs["pred_objs"][..., 0]  # (B, Q)
        overlap = iou(*_matched_corners(outputs, targets, matches), eps=EPS)
        wanted = torch.zeros_like(logits)
        wanted[matches.image, matches.query] = overlap.detach() if detach_target else overlap
        return {"loss_ce_obj": sigmoid_focal_loss(logits, wanted, alpha=alpha).sum() / num_boxes}

    return loss


def inner_loss(outputs: dict[str, Any], targets: Targets, matches: Matches, num_boxes: Tensor) -> dict[str, Tensor]:
    """`loss_inner`: matched points outside their object's box, divided by the number of boxes. A count: no gradient."""
    points = outputs["pred_points"][matches.image, matches.query]  # (M, 2)
    _, boxes = matched_boxes(outputs, targets, matches)
    return {"loss_inner": _outside(points, boxes).sum().to(points.dtype) / num_boxes}


def _matched_corners(outputs: dict[str, Any], targets: Targets, matches: Matches) -> tuple[Tensor, ...]:
    """Predicted and target boxes (M, 4) as left, top, right, bottom."""
    return tuple(cxcywh_to_xyxy(boxes) for boxes in matched_boxes(outputs, targets, matches))
