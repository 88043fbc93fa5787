"""Class losses that know how well a box fits: a matched query shall be as sure as its box is good. The contract is that
of models/criterion.py; both replace the focal loss (`--class_loss`)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from samdetr.models.criterion import Loss, Targets, matched_boxes
from samdetr.models.matcher import Matches
from samdetr.util.box_ops import cxcywh_to_xyxy, iou


@torch.no_grad()
def _matched(
    outputs: dict[str, Any], targets: Targets, matches: Matches
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """The places of the matched queries' classes in `pred_logits`, and the IoU (M,) of their boxes."""
    labels = torch.cat([target["labels"] for target in targets])
    predicted, wanted = matched_boxes(outputs, targets, matches)
    overlap = iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted))
    return (matches.image, matches.query, labels[matches.target]), overlap


def ia_bce_loss(*, alpha: float = 0.25, gamma: float = 2.0) -> Loss:
    """`loss_ce` by IA-BCE of Align-DETR (Cai et al., 2023), for one query an object. With the probability p, the IoU u
    and the quality t = p^alpha u^(1 - alpha), at least 0.01 and without gradient:

    at a matched query's class -t log(p) - (1 - t) log(1 - p), elsewhere -p^gamma log(1 - p).
    """

    def loss(outputs: dict[str, Any], targets: Targets, matches: Matches, num_boxes: Tensor) -> dict[str, Tensor]:
        logits = outputs["pred_logits"]  # (B, Q, classes)
        place, overlap = _matched(outputs, targets, matches)
        probability = logits.sigmoid()
        quality = (probability.detach()[place] ** alpha * overlap ** (1 - alpha)).clamp(min=0.01)
        positive = torch.zeros_like(logits).index_put(place, quality)
        negative = (probability**gamma).index_put(place, 1 - quality)
        terms = positive * F.logsigmoid(logits) + negative * F.logsigmoid(-logits)
        return {"loss_ce": -terms.sum() / num_boxes}

    return loss


def mal_loss(*, gamma: float = 1.5) -> Loss:
    """`loss_ce` by MAL, the matchability-aware loss of DEIM (Huang et al., CVPR 2025). With the probability p and the
    IoU q:

    at a matched query's class -q^gamma log(p) - (1 - q^gamma) log(1 - p), elsewhere -p^gamma log(1 - p), whose weight
    p^gamma is without gradient, as in the published code.
    """

    def loss(outputs: dict[str, Any], targets: Targets, matches: Matches, num_boxes: Tensor) -> dict[str, Tensor]:
        logits = outputs["pred_logits"]
        place, overlap = _matched(outputs, targets, matches)
        positive = torch.zeros_like(logits).index_put(place, overlap**gamma)
        negative = (logits.detach().sigmoid() ** gamma).index_put(place, 1 - overlap**gamma)
        terms = positive * F.logsigmoid(logits) + negative * F.logsigmoid(-logits)
        return {"loss_ce": -terms.sum() / num_boxes}

    return loss
