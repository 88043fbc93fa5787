"""Pictures of where queries look: salient points, sampling points of deformable attention, maps of attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from samdetr.inference.detections import Detections
from samdetr.inference.points import draw_salient_points, draw_sampling_points, map_sheet, sampling_sheet, view_around
from samdetr.inference.predictor import Predictor
from samdetr.inference.watch import Maps, Sampling, cell_of, watch, watch_maps, watch_sampling
from samdetr.models.attention import LevelAttention
from samdetr.models.detector import Detector
from samdetr.models.ops.module import MSDeformAttn
from samdetr.models.sap_detr.decoder import SAPDecoder
from samdetr.models.semantics_aligner import SemanticsAligner
from samdetr.util.box_ops import cxcywh_to_xyxy
from samdetr.util.drawing import contact_sheet

MOST_QUERIES = 6  # rows of a picture
SALIENT = (SemanticsAligner, SAPDecoder)

# Salient points of decoder layers: reference boxes (Q, 4), cx, cy, w, h, and points (Q, P, 2), relative to the image.
Layers = list[tuple[Tensor, Tensor]]


def explain(
    predictor: Predictor,
    image: Any,
    *,
    threshold: float = 0.5,
    salient_points: bool = False,
    sampling_points: tuple[float, float] | str | None = None,
    attention: bool = False,
    most: int = MOST_QUERIES,
) -> tuple[Detections, dict[str, Image.Image]]:
    """Detect objects in one image, and draw where the queries of the best detections look.

    Args:
        image: a single one, as of `Predictor.predict`.
        threshold: the least score of a detection.
        salient_points: whether to draw the salient points of every decoder layer.
        sampling_points: the position whose deformable attention in the encoder is drawn, x and y as fractions of width
            and height, or "best", the centre of the best detection; None for no such picture.
        attention: whether to draw, for the best detection, the attention of each head of every decoder layer over the
            image, and its prior.
        most: of how many detections points are drawn.

    Returns:
        The detections, and pictures by kind: "points", "sampling" (of the encoder), "sampling_queries" (of the
        decoder, if it has deformable attention), "attention" and "prior" (if it has one). There are none of detections
        if nothing was detected.

    Raises:
        ValueError: as of `predict`, and for points that the network does not have.
    """
    check_points(predictor, salient_points=salient_points, sampling_points=sampling_points, attention=attention)
    with watch_salient_points(predictor.model) as layers:
        found = predictor.predict(image, threshold=threshold)
    pictures: dict[str, Image.Image] = {}
    if salient_points and len(found):
        pictures["points"] = draw_points(found, layers, most=most)
    position = sampling_points
    if isinstance(position, str):
        position = tuple((found.boxes[0].view(2, 2).mean(0) / torch.tensor(found.size)).tolist()) if found else None
    if position is None and not (attention and found):
        return found, pictures
    assert isinstance(predictor.model, Detector)
    # A second pass, because the positions and queries to observe are known only now, and all would be too many.
    best, decoder = found.queries[:most], predictor.model.decoder
    with (
        watch_sampling(predictor.model.encoder, cell_of(position)) if position else nullcontext([]) as encoder_layers,
        watch_sampling(decoder, lambda *_: best) as decoder_layers,
        watch_maps(decoder, best[:1]) as maps,
    ):
        predictor.predict(found.source)
    if position:
        pictures["sampling"] = draw_sampling(found.image, encoder_layers)
        if decoder_layers and len(best):
            pictures["sampling_queries"] = draw_query_sampling(found, decoder_layers)
    if attention and found:
        pictures |= draw_maps(found, maps)
    return found, pictures


def check_points(
    predictor: Predictor,
    *,
    salient_points: bool = False,
    sampling_points: tuple[float, float] | str | None = None,
    attention: bool = False,
) -> None:
    """Require that the network has the points to draw. Raises ValueError."""
    model = predictor.model
    if not isinstance(model, Detector):
        if salient_points or sampling_points is not None or attention:
            name = "salient_points" if salient_points else "attention" if attention else "sampling_points"
            raise ValueError(f"`{name}`: {predictor.source} is exported, without inner values; pass its checkpoint")
        return
    if salient_points and not any(_has(model, kind) for kind in SALIENT):
        raise ValueError(
            f"`salient_points`: the network of {predictor.source} has none, it is a {predictor.settings['model']}"
        )
    if sampling_points is not None and not _has(model.encoder, MSDeformAttn):
        raise ValueError(
            f"`sampling_points`: the encoder of {predictor.source} has no deformable attention; "
            "pass a multi-scale SAM-DETR or a Deformable DETR"
        )
    if attention and not _has(model.decoder, LevelAttention):
        raise ValueError(
            f"`attention`: queries of {predictor.source} attend sampling points, not whole maps; `sampling_points` "
            "best draws them"
        )


def parse_position(text: str) -> tuple[float, float] | str:
    """ "X,Y", two numbers in [0, 1], as numbers; "best" as it is. Raises ValueError."""
    if text == "best":
        return text
    try:
        x, y = (float(number) for number in text.split(","))
        if 0 <= x <= 1 and 0 <= y <= 1:
            return x, y
    except ValueError:
        pass
    raise ValueError(f"`sampling_points` {text} is neither X,Y, two numbers between 0 and 1 like 0.5,0.5, nor best")


def _has(part: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(module, kind) for module in part.modules())


@contextmanager
def watch_salient_points(model: nn.Module) -> Iterator[Layers]:
    """Collect the salient points of every decoder layer, of the first image of a batch, in the order of the layers."""
    layers: Layers = []
    aligned = watch(model, SemanticsAligner, lambda *call: layers.extend(_of_aligner(*call)))
    with aligned, watch(model, SAPDecoder, lambda *call: layers.extend(_of_sap_decoder(*call))):
        yield layers


def _of_aligner(aligner: SemanticsAligner, arguments: dict[str, Any], aligned: Any) -> Layers:
    """The points that a layer found in its reference boxes."""
    return [(arguments["boxes"][0].cpu(), aligned.points[0].cpu())]


def _of_sap_decoder(decoder: SAPDecoder, arguments: dict[str, Any], predictions: list[dict[str, Tensor]]) -> Layers:
    """Every layer's point, with the box around it."""
    return [(layer["pred_boxes"][0].cpu(), layer["pred_points"][0, :, None].cpu()) for layer in predictions]


def draw_maps(found: Detections, layers: list[Maps]) -> dict[str, Image.Image]:
    """Of the best detection: "attention", and "prior" if there is one."""
    kinds = {
        "prior": [of.prior[0] for of in layers if of.prior is not None],
        "attention": [of.weights[0] for of in layers],
    }
    image, box = found.image, found.boxes[0]
    return {name: map_sheet(image, maps=maps, box=box) for name, maps in kinds.items() if maps}


def draw_points(found: Detections, layers: Layers, *, most: int = MOST_QUERIES) -> Image.Image:
    """A row for each of the best detections, a column for each decoder layer."""
    image, size = found.image, torch.tensor(found.size)

    def draw(_: int, query: int) -> list[Image.Image]:
        boxes = torch.stack([cxcywh_to_xyxy(box[query]) * size.repeat(2) for box, _ in layers])  # (layers, 4)
        view = view_around(boxes, size=found.size)
        return [
            draw_salient_points(image, box=b, points=p[query] * size, view=view) for b, (_, p) in zip(boxes, layers)
        ]

    return _sheet(found.select(slice(most)), draw)


def draw_query_sampling(found: Detections, layers: list[Sampling]) -> Image.Image:
    """A row for each of the best detections, of which `layers` have the points; a column for each decoder layer."""
    image, size = found.image, torch.tensor(found.size)

    def draw(row: int, _: int) -> list[Image.Image]:
        references = torch.stack([layer.reference[row, 0, :2] for layer in layers]) * size
        places = torch.stack([layer.points[row].flatten(1, 2) for layer in layers]) * size  # (layers, heads, n, 2)
        areas = torch.stack([layer.weights[row].flatten(1) for layer in layers]) * places.shape[2]
        seen = torch.cat([places.flatten(0, 2).clamp(min=0).minimum(size), references, found.boxes[row].view(2, 2)])
        view = view_around(seen.repeat(1, 2), size=found.size, share=0.1)
        return [
            draw_sampling_points(image, reference=reference, points=points, areas=area, view=view)
            for reference, points, area in zip(references, places, areas)
        ]

    return _sheet(found.select(slice(len(layers[0].points))), draw)


def _sheet(found: Detections, draw: Callable[[int, int], list[Image.Image]]) -> Image.Image:
    """For each detection, what `draw(row, query)` returns: a picture for each decoder layer."""
    rows, captions, names = [], [], found.drawn_names
    for row, detection in enumerate(found):
        rows.append(draw(row, detection.query))
        title = f"{names[detection.label]} {detection.score:.2f}, query {detection.query}"
        captions.append([f"{title}, layer {layer}" for layer in range(1, len(rows[-1]) + 1)])
    return contact_sheet(rows, captions)


def draw_sampling(image: Image.Image, layers: list[Sampling]) -> Image.Image:
    """A column for each encoder layer, of the one query that was watched."""
    size = torch.tensor(image.size)
    return sampling_sheet(
        image,
        references=torch.stack([layer.reference[0, 0, :2] for layer in layers]) * size,
        points=torch.stack([layer.points[0] for layer in layers]) * size,
        weights=torch.stack([layer.weights[0] for layer in layers]),
    )
