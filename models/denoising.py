"""Denoising (DN-DETR, Li et al., CVPR 2022): in training, noised copies of the objects are further queries, whose
objects are known, so that the decoder learns from the first step on what to do with a query near an object.

`Denoising` makes the copies, outside of the network; `DenoisingQueries`, a part of the decoder, makes queries of them;
`Denoising.known` says which query is a copy of which object, for the losses.
Legend: B batch, N objects of all images, G groups, D denoising queries of an image, Q matching queries, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from samdetr.models.layers import inverse_sigmoid
from samdetr.util.box_ops import cxcywh_to_xyxy, xyxy_to_cxcywh

MOST_COPIES = 100  # of the objects of an image, unless a single group has more (DINO's code)
EPS = 1e-3  # of the inverse sigmoid of noised boxes, as published
PADDING = -1  # label of queries that fill up images with fewer objects than another one


@dataclass
class Noised:
    """Copies of the objects: `labels` (B, D), int64, and `boxes` (B, D, 4) as cx, cy, w, h. Where an image has fewer
    objects than another, its label is PADDING, and its box the middle half of the image. `group` (D,) counts groups."""

    labels: Tensor
    boxes: Tensor
    group: Tensor

    @property
    def logits(self) -> Tensor:
        """(B, D, 4), of the boxes."""
        return inverse_sigmoid(self.boxes, eps=EPS)

    def hidden(self, num_queries: int) -> Tensor:
        """Which query, row, must not attend to which, column: (D + Q, D + Q) of bool, denoising queries first.

        Groups do not see each other, since each has a copy of every object. Matching queries see no copy, which would
        show them the objects; copies do see matching queries (DN-DETR, section 4.4, "attention mask").
        """
        group = torch.cat([self.group, self.group.new_full((num_queries,), PADDING)])
        return (group >= 0) & (group != group[:, None])

    def split(self, predictions: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The matching queries' predictions of each layer, with those of denoising queries under "denoising"."""
        number, parts = self.labels.shape[1], []
        for prediction in predictions:
            of_queries = {name: values for name, values in prediction.items() if name.startswith("pred_")}
            rest = {name: values[:, number:] for name, values in of_queries.items()}
            parts.append({**prediction, **rest, "denoising": {n: v[:, :number] for n, v in of_queries.items()}})
        return parts


@dataclass
class Known:
    """The denoising queries that are no padding, group by group (K,): `image`, `query` in it, and `target`, the object
    that it is a copy of, counted through all images. `positive`: places among these K of copies that shall find their
    object; the others (`--contrastive`) shall find nothing."""

    image: Tensor
    query: Tensor
    target: Tensor
    positive: Tensor
    groups: int


@dataclass(frozen=True, kw_only=True)
class Denoising:
    """Makes noised copies of objects.

    Args:
        groups: copies of each object (DN-DETR: 5); fewer, but at least one, if an image of the batch has so many
            objects that there were more than MOST_COPIES.
        num_classes: labels are replaced by one of so many.
        box_noise: the centre moves by up to this times half the size, width and height change by up to this times
            themselves (DN-DETR, section 4.3: lambda_1 = lambda_2 = 0.4).
        label_noise: probability that a label is replaced by a random one, perhaps the same (gamma = 0.2, there).
        contrastive: each group has two copies of an object (DINO, Zhang et al., ICLR 2023, section 3.3). Both corners
            of the box move by up to `box_noise` times half its size (lambda_1), and of the second copy by one to two
            times as much (lambda_2): this one shall find nothing.
    """

    groups: int
    num_classes: int
    box_noise: float
    label_noise: float
    contrastive: bool

    def known(self, counts: Sequence[int], device: torch.device) -> Known:
        """Where the copies stand; `counts` are the numbers of objects of the images."""
        return _known(self.groups, self.contrastive, tuple(counts), device)

    @torch.no_grad()
    def __call__(self, targets: Sequence[dict[str, Tensor]]) -> Noised:
        """Copies of the objects of a batch: for each image `labels` (n,) and `boxes` (n, 4). Random numbers come from
        PyTorch's generator, whose state checkpoints keep, as for dropout."""
        boxes = torch.cat([target["boxes"] for target in targets])
        known = self.known([len(target["labels"]) for target in targets], boxes.device)
        number = len(known.target)
        flip = torch.rand(number, device=boxes.device)
        new = torch.randint(self.num_classes, (number,), device=boxes.device)
        move = torch.rand(number, 4, device=boxes.device, dtype=boxes.dtype)
        return self.noised(targets, known, flip, new, move)

    def noised(
        self, targets: Sequence[dict[str, Tensor]], known: Known, flip: Tensor, new: Tensor, move: Tensor
    ) -> Noised:
        """The same with given numbers for each known query (K,): uniform `flip`; `new`, the label that it then gets;
        uniform `move` (K, 4)."""
        labels, boxes = (torch.cat([target[name] for target in targets]) for name in ("labels", "boxes"))
        labels = torch.where(flip < self.label_noise, new, labels[known.target])
        boxes = (self._contrast if self.contrastive else self._move)(boxes[known.target], known, 2 * move - 1)
        largest = max((len(target["labels"]) for target in targets), default=0)
        length = largest * (2 if self.contrastive else 1)
        shape = (len(targets), known.groups * length)
        all_labels, all_boxes = labels.new_full(shape, PADDING), boxes.new_full((*shape, 4), 0.5)
        all_labels[known.image, known.query] = labels
        all_boxes[known.image, known.query] = boxes.clamp(0, 1)
        group = torch.arange(known.groups, device=boxes.device).repeat_interleave(length)
        return Noised(all_labels, all_boxes, group)

    def _move(self, boxes: Tensor, known: Known, by: Tensor) -> Tensor:
        """`by` (K, 4) in [-1, 1]."""
        sizes = boxes[:, 2:]
        return boxes + by * torch.cat([sizes / 2, sizes], -1) * self.box_noise

    def _contrast(self, boxes: Tensor, known: Known, by: Tensor) -> Tensor:
        further = torch.ones_like(by).index_fill_(0, known.positive, 0)
        by = by + further * torch.where(by < 0, -1, 1)
        corners = cxcywh_to_xyxy(boxes) + by * boxes[:, 2:].repeat(1, 2) / 2 * self.box_noise
        return xyxy_to_cxcywh(corners.clamp(0, 1))


@lru_cache(1)  # a batch asks twice: for its copies, then for their losses
def _known(wanted_groups: int, contrastive: bool, counts: tuple[int, ...], device: torch.device) -> Known:
    """A group is as long as the largest image's, and begins with the copies that shall find their object."""
    largest, kinds = max(counts, default=0), 2 if contrastive else 1
    groups = max(min(wanted_groups, MOST_COPIES // max(largest, 1)), 1)
    objects = [(image, place) for image, count in enumerate(counts) for place in range(count)]
    rows = [
        (image, (group * kinds + kind) * largest + place, target, kind)
        for group in range(groups)
        for kind in range(kinds)
        for target, (image, place) in enumerate(objects)
    ]
    table = torch.tensor(rows, dtype=torch.int64).view(-1, 4)
    positive = (table[:, 3] == 0).nonzero()[:, 0]
    image, query, target, positive = (x.to(device, non_blocking=True) for x in (*table.T[:3], positive))
    return Known(image, query, target, positive, groups)


class DenoisingQueries(nn.Module):
    """Content of denoising queries: the label's embedding, N(0, 1), and last a 1 (DN-DETR, section 4.5: the indicator);
    0 for padding. Matching queries keep their content, so that nothing of this is left after training.

    Args:
        position: also project the sine encoding of boxes (B, D, 2 C) to a position, for decoders that do not compute
            one from a query's box.
    """

    def __init__(self, *, num_classes: int, hidden_dim: int, position: bool = False):
        super().__init__()
        self.labels = nn.Embedding(num_classes, hidden_dim - 1)
        self.position = nn.Linear(2 * hidden_dim, hidden_dim) if position else None

    def forward(self, noised: Noised) -> Tensor:
        """(B, D, C)."""
        content = nn.functional.pad(self.labels(noised.labels.clamp(min=0)), (0, 1), value=1.0)
        return content * (noised.labels >= 0)[..., None]
