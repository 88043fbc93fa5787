"""One-to-one assignment of queries to objects at the least total cost (DETR, section 3.1).

Legend: S predictions matched at once (decoder layers), B batch, Q queries, n objects of one image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from samdetr.util.box_ops import cxcywh_to_xyxy, generalized_iou

Cost = Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]


@dataclass
class Matches:
    """Matched pairs of a batch, image by image: `image`, `query` and `target` (M,), int64; `target` counts through the
    objects of all images. M = number of objects (of queries, for an image with more objects than queries)."""

    image: Tensor
    query: Tensor
    target: Tensor


def focal_class_cost(*, alpha: float) -> Cost:
    """Change of a query's focal loss if it took the object's class."""

    def cost(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
        return focal_change(outputs["pred_logits"].sigmoid()[..., targets["labels"]], alpha=alpha)

    return cost


def position_class_cost(*, alpha: float) -> Cost:
    """The same, position-modulated (Stable-DINO, Liu et al., ICCV 2023, section 3.3): of the probability times
    sqrt(s), s = (GIoU + 1) / 2."""

    def cost(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
        fit = ((1 - giou_cost(outputs, targets)) / 2).clamp(min=0).sqrt()
        return focal_change(outputs["pred_logits"].sigmoid()[..., targets["labels"]] * fit, alpha=alpha)

    return cost


def focal_change(probability: Tensor, *, alpha: float, gamma: float = 2.0) -> Tensor:
    """Focal loss of a probability (S, Q, n) whose target is 1, less that for the target 0."""
    negative = (1 - alpha) * probability**gamma * -(1 - probability + 1e-8).log()
    positive = alpha * (1 - probability) ** gamma * -(probability + 1e-8).log()
    return positive - negative


def l1_cost(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    """Sum of absolute differences of cx, cy, w, h."""
    return (outputs["pred_boxes"][..., :, None, :] - targets["boxes"]).abs().sum(-1)


def giou_cost(outputs: dict[str, Tensor], targets: dict[str, Tensor], *, eps: float = 0.0) -> Tensor:
    """Negative generalised IoU."""
    predicted, wanted = cxcywh_to_xyxy(outputs["pred_boxes"]), cxcywh_to_xyxy(targets["boxes"])
    return -generalized_iou(predicted[..., :, None, :], wanted, eps=eps)


def stack_predictions(predictions: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """`pred_*` of all predictions: (S, B, Q, ...) each."""
    names = [name for name in predictions[0] if name.startswith("pred_")]
    return {name: torch.stack([prediction[name] for prediction in predictions]) for name in names}


class HungarianMatcher:
    """Assignment under a weighted sum of costs.

    Args:
        costs: (weight, cost) pairs. A cost takes the predictions of one image - `pred_logits` (S, Q, classes),
            `pred_boxes` (S, Q, 4), and all else that the decoder predicts - with its `labels` (n,) and `boxes` (n, 4).
            It returns (S, Q, n).
    """

    def __init__(self, *, costs: Sequence[tuple[float, Cost]]):
        self.costs = [(weight, cost) for weight, cost in costs if weight != 0]
        if not self.costs:
            raise ValueError("the matching costs are all 0; give `set_cost_class`, `set_cost_bbox` or `set_cost_giou`")

    def __call__(self, predictions: Sequence[dict[str, Any]], targets: Sequence[dict[str, Tensor]]) -> list[Matches]:
        """Match each prediction of a batch (one per decoder layer) separately."""
        return self.match_all([(predictions, targets)])[0]

    @torch.no_grad()
    def match_all(
        self, groups: Sequence[tuple[Sequence[dict[str, Any]], Sequence[dict[str, Tensor]]]]
    ) -> list[list[Matches]]:
        """The same for several groups of predictions and targets, whose numbers of queries may differ.

        Costs are computed only between queries and objects of the same image, together for the predictions of a group;
        those of all groups reach the host in one transfer. Non-finite costs count as very large, so that the loss can
        be computed and reported.
        """
        costs, shapes = [], []
        for predictions, targets in groups:
            stacked = stack_predictions(predictions)
            for image, target in enumerate(targets):
                outputs = {name: values[:, image] for name, values in stacked.items()}
                first, *others = [weight * cost(outputs, target) for weight, cost in self.costs]
                cost = sum(others, start=first)  # (S, Q, n)
                costs.append(cost.flatten())
                shapes.append(cost.shape)
        device = costs[0].device
        on_host = torch.cat(costs).nan_to_num(nan=1e9, posinf=1e9, neginf=1e9).cpu().split([len(c) for c in costs])
        found = iter([cost.view(shape).numpy() for cost, shape in zip(on_host, shapes)])
        return [_assign([next(found) for _ in targets], len(predictions), device) for predictions, targets in groups]


def _assign(costs: list[np.ndarray], steps: int, device: torch.device) -> list[Matches]:
    """The matches of each step by the costs (S, Q, n) of each image; equally many in each step, sent together."""
    table: list[list[tuple[int, int, int]]] = [[] for _ in range(steps)]
    first = 0
    for image, cost in enumerate(costs):
        for rows, of_step in zip(table, cost):
            query, target = linear_sum_assignment(of_step)
            rows += [(image, q, first + t) for q, t in zip(query, target)]
        first += cost.shape[2]
    found = torch.tensor(table, dtype=torch.int64).view(steps, -1, 3).to(device, non_blocking=True)
    return [Matches(*of_step.unbind(-1)) for of_step in found]
