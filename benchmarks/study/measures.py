"""What a network's decoder looks at while it is evaluated, seen from outside by hooks.

Everything is about matched queries: those that the criterion's matcher gives an object in the last decoder layer.
"Inside" is inside the object's box; a cell of a map is inside if its centre is. Legend: B batch, Q queries, M matched
queries of a batch, N heads, C channels, L cells of a level, P salient points.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from samdetr.inference.watch import watch
from samdetr.models.attention import LevelAttention
from samdetr.models.criterion import SetCriterion
from samdetr.models.deformable_detr.decoder import DeformableDecoderLayer
from samdetr.models.detector import Detector
from samdetr.models.feature_levels import FeatureLevel, cell_centres, valid_ratio
from samdetr.models.ops.module import MSDeformAttn
from samdetr.models.sam_detr import decoder as sam
from samdetr.models.sap_detr import decoder as sap
from samdetr.models.sap_detr.points import boxes_around
from samdetr.models.semantics_aligner import SemanticsAligner
from samdetr.models.spatial_prior import SeparablePrior

SATURATED = 0.95  # of the way from a box's centre to its side

# For each image the number of each matched query's object; ids and numbers are text, as keys in JSON are.
Assignment = Mapping[str, Mapping[str, int]]


def instability(before: Assignment, after: Assignment) -> float:
    """DN-DETR's IS (Li et al., CVPR 2022, section 3.1): the number of queries whose object is not the one of an epoch
    before, no object counting as one; mean over images."""
    changed = 0
    for image, new in after.items():
        old = before[image]
        changed += sum(old.get(query, -1) != new.get(query, -1) for query in old.keys() | new.keys())
    return changed / len(after)


def is_inside(boxes: Tensor, points: Tensor) -> Tensor:
    """Whether points (M, ..., 2) lie in boxes (M, 4), cx, cy, w, h -> (M, ...)."""
    boxes = boxes.view(len(boxes), *[1] * (points.ndim - 2), 4)
    return ((points - boxes[..., :2]).abs() * 2 <= boxes[..., 2:]).all(-1)


def products(rows: Tensor, cells: Tensor, image: Tensor) -> Tensor:
    """Products of rows (M, N, C) with the cells (B, N or 1, L, C) of the images (M,) that they belong to, which must be
    in order -> (M, N, L). One image after another, so that no map is copied for each of its rows."""
    counts = image.bincount(minlength=len(cells)).tolist()
    found = [(part.transpose(0, 1) @ of_image.mT).transpose(0, 1) for part, of_image in zip(rows.split(counts), cells)]
    return torch.cat(found)


def similarity(content: Tensor, features: Tensor, image: Tensor) -> Tensor:
    """Cosines of contents (M, N, C) with the features (B, L, C) of their images (M,), mean over N -> (M, L)."""
    return products(F.normalize(content, dim=-1), F.normalize(features, dim=-1)[:, None], image).mean(1)


def mean_of(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean of the values (M, L) that are `chosen` (M, L) -> (M,), not a number where none is."""
    return (values * chosen).sum(1) / chosen.sum(1)


def attention_weights(
    query: Tensor, key: Tensor, image: Tensor, *, padding: Tensor | None = None, prior: Tensor | None = None
) -> Tensor:
    """What queries (M, N, D) attend of the keys (B, N or 1, L, D) of their images (M,), given `padding` (M, L) and
    `prior` (M, N or 1, L) -> (M, N, L)."""
    logits = products(query * query.shape[-1] ** -0.5, key, image)
    if prior is not None:
        logits = logits + prior
    if padding is not None:
        logits = logits.masked_fill(padding[:, None], -torch.inf)
    return logits.softmax(-1)


def edge_distance(boxes: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Of points (M, P, 2) and their boxes (M, 4): the share of x and y beyond SATURATED of the way from centre to side,
    and the mean distance to the nearest side in halves of the box, negative outside -> (M,) each."""
    offsets = ((points - boxes[:, None, :2]) * 2 / boxes[:, None, 2:]).abs()
    return (offsets > SATURATED).float().mean((1, 2)), (1 - offsets.amax(-1)).mean(1)


class Measures:
    """Watches `network` and `criterion` while it is entered; `summary` is of all batches that they saw.

    Figures of a layer, each the mean over matched queries (and over their heads):

        reference_l1     L1 distance of the reference box that enters the layer from the object's box
        cosine_inside    cosine of the content that cross-attention gets with the encoded features inside the object's
        cosine_outside   box, and with those outside; none for deformable attention without an aligner
        attention        share of the cross-attention inside the object's box
        area             share of the map's cells inside: what even attention has there
        saturated, edge  of salient points, as of `edge_distance`
    """

    def __init__(self, network: Detector, criterion: SetCriterion) -> None:
        self.network, self.criterion = network, criterion
        self.seconds = 0.0  # of the processor
        self._matches: dict[str, dict[str, int]] = {}
        self._objects = 0
        self._values: dict[tuple[int, str], list[Tensor]] = defaultdict(list)
        self._now: dict[str, Any] = {}  # what was seen of the layer that is being computed
        self._layers: list[dict[str, Any]] = []  # of the layers of the batch

    def __enter__(self) -> Measures:
        self._stack = ExitStack()
        enter, decoder = self._stack.enter_context, self.network.decoder
        for kind, name in ((sam.CrossAttention, "content"), (sap.CrossAttention, "queries")):
            enter(watch(decoder, kind, lambda _, given, __, name=name: self._see(content=given[name])))
        enter(watch(decoder, SemanticsAligner, lambda module, _, found: self._see(aligner=module, aligned=found)))
        enter(watch(decoder, MSDeformAttn, lambda module, given, _: self._see(deformable=module, sampled=given)))
        enter(patch.object(LevelAttention, "attend", self._spy(LevelAttention.attend)))
        for kind in (sam.SAMDecoderLayer, sap.SAPDecoderLayer, DeformableDecoderLayer):
            enter(watch(decoder, kind, lambda _, given, __: self._end_layer(given)))
        enter(
            watch(
                self.criterion, SetCriterion, lambda _, given, __: self._end_batch(given["outputs"], given["targets"])
            )
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def summary(self) -> dict[str, Any]:
        layers: dict[int, dict[str, float]] = defaultdict(dict)
        for (layer, name), values in self._values.items():
            layers[layer][name] = float(torch.cat(values).nanmean())
        return {
            "matches": self._matches,
            "objects": self._objects / max(len(self._matches), 1),
            "layers": [layers[layer] for layer in sorted(layers)],
            "seconds": self.seconds,
        }

    def _see(self, **what: Any) -> None:
        self._now |= what

    def _spy(self, attend: Any) -> Any:
        def spy(module: LevelAttention, query: Tensor, key: Tensor, level: FeatureLevel, prior: Any) -> Tensor:
            self._see(query=query, key=key, padding=level.token_padding, prior=prior)
            return attend(module, query, key, level, prior)

        return spy

    def _end_layer(self, given: dict[str, Any]) -> None:
        self._layers.append({**self._now, **given})
        self._now = {}

    def _end_batch(self, outputs: dict[str, Any], targets: Sequence[dict[str, Tensor]]) -> None:
        start = time.process_time()
        (found,) = self.criterion.matcher([outputs], targets)
        ids = [str(int(target["image_id"])) for target in targets]
        first = [0]
        for name, target in zip(ids, targets):
            self._matches[name] = {}
            first.append(first[-1] + len(target["boxes"]))
        for image, query, target in zip(found.image.tolist(), found.query.tolist(), found.target.tolist()):
            self._matches[ids[image]][str(query)] = target - first[image]
        self._objects += first[-1]
        boxes = torch.cat([target["boxes"] for target in targets])[found.target]  # (M, 4)
        for number, layer in enumerate(self._layers):
            for name, values in _of_layer(layer, found.image, found.query, boxes).items():
                self._values[number, name].append(values.cpu())
        self._layers = []
        self.seconds += time.process_time() - start


def _of_layer(seen: Mapping[str, Any], image: Tensor, query: Tensor, boxes: Tensor) -> dict[str, Tensor]:
    """The figures of one layer for the matched queries, whose objects have these boxes -> (M,) each."""
    if "at" in seen:  # a SAP-DETR layer knows sides, no box
        reference = boxes_around(seen["at"].points, seen["at"].distances)[image, query]
    else:
        reference = seen["boxes"][image, query]
    level: FeatureLevel = seen["level"]
    height, width = level.features.shape[2:]
    centres = cell_centres(height, width, boxes.device).flatten(0, 1) / boxes.new_tensor([width, height])  # (L, 2)
    padding = level.token_padding[image]
    inside = is_inside(boxes, centres / level.valid_ratio[image, None]) & ~padding  # (M, L)
    found = {"reference_l1": (reference - boxes).abs().sum(-1), "area": inside.sum(1) / (~padding).sum(1)}

    content = seen["aligned"].content if "aligned" in seen else seen.get("content")
    if content is not None:
        cosines = similarity(content[image, query].view(len(boxes), -1, content.shape[-1]), level.tokens, image)
        found["cosine_inside"] = mean_of(cosines, inside)
        found["cosine_outside"] = mean_of(cosines, ~inside & ~padding)
    if "query" in seen:
        rows_columns = seen["prior"] and SeparablePrior(*(part[image, :, query] for part in seen["prior"]))
        weights = attention_weights(
            seen["query"][image, :, query], seen["key"], image, padding=padding,
            prior=rows_columns and rows_columns.dense(),
        )  # fmt: skip
        found["attention"] = (weights * inside[:, None]).sum(-1).mean(1)
    if "deformable" in seen:
        found["attention"] = _deformable_share(seen["deformable"], seen["sampled"], image, query, boxes)
    if "aligner" in seen and seen["aligner"].resample == "points":
        found["saturated"], found["edge"] = edge_distance(reference, seen["aligned"].points[image, query])
    return found


def _deformable_share(
    attention: MSDeformAttn, given: Mapping[str, Any], image: Tensor, query: Tensor, boxes: Tensor
) -> Tensor:
    """The weight of the points inside, all levels together -> (M,)."""
    asked = given["query"][image, query][:, None]
    shapes, reference = given["level_shapes"], given["reference"][image, query][:, None]
    points = attention.locate(asked, reference, shapes)[:, 0]  # (M, N, levels, K, 2)
    if given["padding"] is not None:
        levels = given["padding"].split([height * width for height, width in shapes], 1)
        ratios = torch.stack([valid_ratio(level.unflatten(1, shape)) for level, shape in zip(levels, shapes)], 1)
        points = points / ratios[image][:, None, :, None]
    inside = is_inside(boxes, points.flatten(1, 3)).view(points.shape[:-1])
    return (attention.weigh(asked)[:, 0] * inside).sum((2, 3)).mean(1)
