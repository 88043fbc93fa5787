"""The set prediction loss: match, then penalise classes, boxes and overlaps of every decoder layer and of proposals.

A loss is a function `(outputs, targets, matches, num_boxes) -> dict of scalars`; the criterion takes a list of them.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samdetr.models.denoising import Denoising, Noised
from samdetr.models.matcher import HungarianMatcher, Matches, stack_predictions
from samdetr.util.box_ops import cxcywh_to_xyxy, generalized_iou
from samdetr.util.distributed import reduce_mean
from samdetr.util.sections import section

Targets = Sequence[dict[str, Tensor]]
Loss = Callable[[dict[str, Any], Targets, Matches, Tensor], dict[str, Tensor]]


def sigmoid_focal_loss(logits: Tensor, wanted: Tensor, *, alpha: float, gamma: float = 2.0) -> Tensor:
    """Focal loss (Lin et al., ICCV 2017, eq. 5) of every logit; `wanted` is 0 or 1. Same shape as `logits`."""
    probability = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    miss = probability + wanted - 2 * probability * wanted  # 1 - probability of what is wanted
    return (alpha * wanted + (1 - alpha) * (1 - wanted)) * miss**gamma * cross_entropy


def focal_loss(*, alpha: float) -> Loss:
    """`loss_ce`: focal loss over all queries and classes, divided by the number of boxes."""

    def loss(outputs: dict[str, Any], targets: Targets, matches: Matches, num_boxes: Tensor) -> dict[str, Tensor]:
        logits = outputs["pred_logits"]  # (B, Q, classes)
        wanted = torch.zeros_like(logits)
        labels = torch.cat([t["labels"] for t in targets])
        wanted[matches.image, matches.query, labels[matches.target]] = 1
        # The reference takes the mean over queries and multiplies by their number: the sum.
        return {"loss_ce": sigmoid_focal_loss(logits, wanted, alpha=alpha).sum() / num_boxes}

    return loss


def matched_boxes(outputs: dict[str, Any], targets: Targets, matches: Matches) -> tuple[Tensor, Tensor]:
    """Predicted and target boxes (M, 4) of the matched pairs, as cx, cy, w, h."""
    wanted = torch.cat([t["boxes"] for t in targets])[matches.target]
    return outputs["pred_boxes"][matches.image, matches.query], wanted


def box_losses(
    outputs: dict[str, Any], targets: Targets, matches: Matches, num_boxes: Tensor, *, eps: float = 0.0
) -> dict[str, Tensor]:
    """`loss_bbox`, L1 on cx, cy, w, h, and `loss_giou`, of the matched pairs, divided by the number of boxes."""
    predicted, wanted = matched_boxes(outputs, targets, matches)
    overlap = generalized_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted), eps=eps)
    return {"loss_bbox": (predicted - wanted).abs().sum() / num_boxes, "loss_giou": (1 - overlap).sum() / num_boxes}


@torch.no_grad()
def cardinality_error(
    outputs: dict[str, Any], targets: Targets, matches: Matches, num_boxes: Tensor
) -> dict[str, Tensor]:
    """`cardinality_error`: difference between the numbers of non-empty predictions and of objects, for the log.

    As in the reference, so that logs compare: a query counts as empty if its best class is the last one, which means
    little if no class is "no object".
    """
    logits = outputs["pred_logits"]
    found = (logits.argmax(-1) != logits.shape[-1] - 1).sum(1)
    there = torch.as_tensor([len(t["labels"]) for t in targets]).to(logits.device, non_blocking=True)
    return {"cardinality_error": (found - there).abs().to(logits.dtype).mean()}


@torch.no_grad()
def class_error(outputs: dict[str, Any], targets: Targets, matches: Matches, num_boxes: Tensor) -> dict[str, Tensor]:
    """`class_error`: per cent of matched queries whose best class is wrong, for the log; 100 without any object."""
    labels = torch.cat([t["labels"] for t in targets])[matches.target]
    right = outputs["pred_logits"][matches.image, matches.query].argmax(-1) == labels
    return {"class_error": 100 - 100 * right.sum().to(outputs["pred_logits"].dtype) / max(len(labels), 1)}


class SetCriterion(nn.Module):
    """Losses of every decoder layer, each matched anew.

    Args:
        matcher: assigns queries to objects.
        losses: computed for every layer; names get the suffix `_0`, `_1`, ... in all layers except the last.
        final_losses: computed for the last layer alone.
        denoising_losses: computed for the denoising queries of every layer, if there are any.
        weights: weight of each loss term, by its name without suffix; other terms are only reported.
        auxiliary: whether the earlier layers count (`aux_loss`).

    `denoising` makes the denoising queries of training, if any.
    """

    def __init__(
        self,
        *,
        matcher: HungarianMatcher,
        losses: Sequence[Loss],
        final_losses: Sequence[Loss] = (),
        denoising_losses: Sequence[Loss] = (),
        weights: dict[str, float],
        auxiliary: bool = True,
    ):
        super().__init__()
        self.matcher, self.losses, self.final_losses = matcher, list(losses), list(final_losses)
        self.denoising_losses = list(denoising_losses)
        self.weights, self.auxiliary = dict(weights), auxiliary
        self.denoising: Denoising | None = None

    def noised(self, targets: Targets) -> Noised | None:
        """Noised copies of the objects, for the network; None in evaluation and without denoising."""
        return self.denoising(targets) if self.denoising and self.training else None

    def count(self, targets: Targets, like: Tensor) -> Tensor:
        """The divisor of losses: the number of boxes, at least 1; a scalar of the type and device of `like`."""
        num_boxes = like.new_full((), sum(len(t["labels"]) for t in targets))  # filled on the device
        if self.training:
            # Averaged over processes, so that their mean gradient is that of the joint batch. In evaluation they have
            # different numbers of batches and must not wait for each other.
            num_boxes = reduce_mean({"num_boxes": num_boxes})["num_boxes"]
        return num_boxes.clamp(min=1)

    def forward(self, outputs: dict[str, Any], targets: Targets, num_boxes: Tensor | None = None) -> dict[str, Tensor]:
        """
        Args:
            outputs: the detector's dict. Its `enc_outputs`, if any, are matched and penalised like a layer, with class
                0 for every object; suffix `_enc`. So are denoising queries, whose matches are known; suffix `_dn`.
            targets: for each image `labels` (n,), int64, and `boxes` (n, 4) as normalised cx, cy, w, h.
            num_boxes: of `count`, if these images are a part of a larger batch.
        Returns:
            Every term, unweighted. `total` makes the weighted sum.
        """
        predictions = [*(outputs["aux_outputs"] if self.auxiliary else []), outputs]
        groups: list[tuple[list[dict[str, Any]], Targets]] = [(predictions, targets)]
        if "enc_outputs" in outputs:
            anything = [target | {"labels": torch.zeros_like(target["labels"])} for target in targets]
            groups.append(([outputs["enc_outputs"]], anything))
        with section("matching"):
            matches, *of_proposals = self.matcher.match_all(groups)
        if num_boxes is None:
            num_boxes = self.count(targets, outputs["pred_logits"])

        (*of_layers, of_final) = _stacked(self.losses, predictions, targets, matches, num_boxes)
        terms = dict(of_final)
        for loss in self.final_losses:
            terms |= loss(outputs, targets, matches[-1], num_boxes)
        for layer, of_layer in enumerate(of_layers):
            terms |= {f"{name}_{layer}": term for name, term in of_layer.items()}
        for match, (proposals, objects) in zip(of_proposals, groups[1:]):
            (of_these,) = _stacked(self.losses, proposals, objects, match, num_boxes)
            terms |= {f"{name}_enc": term for name, term in of_these.items()}
        if "denoising" in outputs:
            terms |= self._denoising_terms([layer["denoising"] for layer in predictions], targets, num_boxes)
        return terms

    def _denoising_terms(
        self, predictions: Sequence[dict[str, Any]], targets: Targets, num_boxes: Tensor
    ) -> dict[str, Tensor]:
        """The terms of denoising queries without padding, as of one image. The divisor is the number of boxes times
        that of groups: in one process, the number of denoised objects, as published."""
        assert self.denoising is not None
        known = self.denoising.known([len(t["labels"]) for t in targets], num_boxes.device)
        predictions = [
            {name: values[known.image, known.query][None] for name, values in layer.items()} for layer in predictions
        ]
        positive = known.positive
        match = Matches(torch.zeros_like(positive), positive, known.target[positive])
        divisor = num_boxes * known.groups
        *layers, final = _stacked(self.denoising_losses, predictions, targets, [match] * len(predictions), divisor)
        for loss in self.final_losses:
            final |= loss(predictions[-1], targets, match, divisor)
        terms = {f"{name}_dn": term for name, term in final.items()}
        for layer, of_layer in enumerate(layers):
            terms |= {f"{name}_dn_{layer}": term for name, term in of_layer.items()}
        return terms

    def weighted(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The terms that training minimises, times their weights."""
        return {name: term * self.weights[_plain(name)] for name, term in terms.items() if _plain(name) in self.weights}


def _stacked(
    losses: Sequence[Loss],
    predictions: Sequence[dict[str, Any]],
    targets: Targets,
    matches: Sequence[Matches],
    num_boxes: Tensor,
) -> list[dict[str, Tensor]]:
    """The terms of each prediction, computed for all at once, as all have equally many matches. The time goes into the
    number of operations, not into these small tensors."""

    def of_one(prediction: dict[str, Tensor], *match: Tensor) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        for loss in losses:
            terms |= loss(prediction, targets, Matches(*match), num_boxes)
        return terms

    match = (torch.stack([getattr(m, part) for m in matches]) for part in ("image", "query", "target"))  # (S, M)
    terms = torch.vmap(of_one)(stack_predictions(predictions), *match)
    return [{name: values[step] for name, values in terms.items()} for step in range(len(predictions))]


def _plain(name: str) -> str:
    """The name of a term without the suffixes of its queries and its layer."""
    return re.sub(r"(_dn)?(_(\d+|enc))?$", "", name)
