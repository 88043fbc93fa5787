"""Drawing of where queries look: salient points in reference boxes, sampling points around a reference, maps.

Boxes are (left, top, right, bottom) and points (x, y), in pixels of the picture that is passed in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from samdetr.util.drawing import INK, PAPER, Colour, class_colour, contact_sheet, line_width, outline, pixel_box

SIDE = 400  # pixels of the longer side of a drawn part
MAP_SIDE = 140  # of a picture with a map, of which there is one for each layer and head
RADIUS, ARM = 5, 10  # pixels: of a salient point, and of a cross from its middle


def view_around(boxes: Tensor, *, size: tuple[int, int], share: float = 0.5) -> Tensor:
    """The part (4,) of a picture (width, height) worth showing for `boxes` (n, 4): their hull and a margin, which is a
    `share` of the hull's longer side."""
    low, high, limit = boxes[:, :2].amin(0), boxes[:, 2:].amax(0), torch.tensor(size)
    margin = ((high - low).max() * share).clamp(min=16)
    return torch.cat([(low - margin).clamp(min=0).minimum(limit - 1), (high + margin).minimum(limit).clamp(min=1)])


def draw_salient_points(image: Image.Image, *, box: Tensor, points: Tensor, view: Tensor | None = None) -> Image.Image:
    """A query's reference `box` (4,) in white and its salient `points` (N, 2), one colour for each attention head.

    Shows the part `view` (4,) of the picture, or all. Points outside are not seen.
    """
    canvas, origin, scale = _part_of(image, view)
    rectangle = pixel_box((box.view(2, 2) - origin).flatten().tolist(), factor=scale, size=canvas.size)
    outline(ImageDraw.Draw(canvas), rectangle, PAPER, line_width(canvas.size))
    for head, centre in enumerate(((points - origin) * scale).tolist()):
        _marker(canvas, centre, RADIUS, class_colour(head))
    return canvas


def draw_sampling_points(
    image: Image.Image, *, reference: Tensor, points: Tensor, areas: Tensor, view: Tensor | None = None
) -> Image.Image:
    """A query's `reference` (2,) as a white cross and the `points` (heads, N, 2) that it samples, one colour for each
    attention head; `areas` (heads, N) are relative to that of a salient point. `view` as in `draw_salient_points`.
    """
    canvas, origin, scale = _part_of(image, view)
    radii, centres = (RADIUS * areas.sqrt()).round().clamp(min=3).int(), (points - origin) * scale
    markers = [
        (radius, centre, class_colour(head))
        for head, (row, places) in enumerate(zip(radii.tolist(), centres.tolist()))
        for radius, centre in zip(row, places)
    ]
    for radius, centre, colour in sorted(markers, reverse=True):  # small ones lie on large ones
        _marker(canvas, centre, radius, colour)
    x, y = ((reference - origin) * scale).round().int().tolist()
    for grown, colour in ((1, INK), (0, PAPER)):
        for dx, dy in ((ARM + grown, 1 + grown), (1 + grown, ARM + grown)):
            ImageDraw.Draw(canvas).rectangle((x - dx, y - dy, x + dx, y + dy), fill=colour)
    return canvas


def map_sheet(image: Image.Image, *, maps: Sequence[Tensor], box: Tensor) -> Image.Image:
    """Maps over the picture: a row for each layer's (heads, H, W), a column for each head, and `box` (4,) in white.

    The largest value of a map has the head's colour, 0 leaves the picture, grey and pale.
    """
    scale = MAP_SIDE / max(image.size)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    pale = ImageOps.grayscale(image.resize(size)).point([80 + grey * 175 // 255 for grey in range(256)]).convert("RGB")
    rows, captions = [], []
    for layer, of_layer in enumerate(maps, 1):
        row = []
        for head, of_head in enumerate(of_layer):
            share = (of_head / of_head.max().clamp(min=1e-30)).nan_to_num(0)
            opacity = Image.fromarray((230 * share).byte().numpy()).resize(size, Image.Resampling.BILINEAR)
            cell = Image.composite(Image.new("RGB", size, class_colour(head)), pale, opacity)
            outline(ImageDraw.Draw(cell), pixel_box(box.tolist(), factor=scale, size=size), PAPER, 1)
            row.append(cell)
        rows.append(row)
        captions.append([f"layer {layer}, head {head}" for head in range(1, len(row) + 1)])
    return contact_sheet(rows, captions)


def sampling_sheet(image: Image.Image, *, references: Tensor, points: Tensor, weights: Tensor) -> Image.Image:
    """Where a query of deformable attention looks: a column for each layer. The first row shows all levels, the others
    show one level each, enlarged, and its share of the heads' weight.

    Args:
        references: (layers, 2), where the query is.
        points: (layers, heads, levels, points, 2), where it samples.
        weights: (layers, heads, levels, points); those of a head sum to 1.
    """
    heads, levels, each = weights.shape[1:]
    size = torch.tensor(image.size)
    rows, captions = [], []
    for part in (list(range(levels)), *([level] for level in range(levels))):
        one = len(part) == 1
        where, much = points[:, :, part].flatten(2, 3), weights[:, :, part].flatten(2)  # (layers, heads, n, ...)
        seen = torch.cat([where.flatten(0, 2).clamp(min=0).minimum(size), references])
        view = view_around(seen.repeat(1, 2), size=image.size, share=0.1) if one else None
        areas = much * levels * each / len(part)  # 1 where all points of one level count alike
        rows.append(
            [
                draw_sampling_points(image, reference=reference, points=place, areas=area, view=view)
                for reference, place, area in zip(references, where, areas)
            ]
        )
        shares = much.sum((1, 2)) / heads
        outside = ((where < 0) | (where > size)).any(-1).flatten(1).sum(1).tolist()
        texts = []
        for layer, (share, number) in enumerate(zip(shares, outside), 1):
            name = f"level {part[0] + 1}: {share:.0%} of weight" if one else "all levels"
            texts.append(f"layer {layer}, {name}, {number} of {much[0].numel()} outside")
        captions.append(texts)
    return contact_sheet(rows, captions)


def _part_of(image: Image.Image, view: Tensor | None) -> tuple[Image.Image, Tensor, float]:
    """The part `view` (4,) of a picture, or all, enlarged to SIDE pixels; its corner (2,) and the factor."""
    x0, y0, x1, y1 = (0, 0, *image.size) if view is None else view.round().int().tolist()
    x1, y1 = max(x1, x0 + 1), max(y1, y0 + 1)
    scale = SIDE / max(x1 - x0, y1 - y0)
    size = (max(round((x1 - x0) * scale), 1), max(round((y1 - y0) * scale), 1))
    canvas = image.convert("RGB").resize(size, Image.Resampling.BICUBIC, box=(x0, y0, x1, y1))
    return canvas, torch.tensor([x0, y0]), scale


def _marker(canvas: Image.Image, centre: Sequence[float], radius: int, colour: Colour) -> None:
    """A disc in a white and a dark ring, which set it off from any background."""
    for grown, shade in ((2, INK), (1, PAPER), (-1, colour)):
        side = 2 * (radius + grown) + 1
        mask = Image.new("L", (4 * side, 4 * side))
        ImageDraw.Draw(mask).ellipse((0, 0, 4 * side - 1, 4 * side - 1), fill=255)
        corner = round(centre[0] - side / 2), round(centre[1] - side / 2)
        canvas.paste(shade, corner, mask.reduce(4))  # drawn larger and reduced: smooth at the rim
