"""Drawing of points: salient points in reference boxes, and sampling points around a reference.

Boxes are (left, top, right, bottom) and points (x, y), in pixels of the picture that is passed in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from samdetr.util.drawing import INK, PAPER, Colour, class_colour, contact_sheet, line_width, outline, pixel_box


def view_around(boxes: Tensor, *, size: tuple[int, int], share: float = 0.5) -> Tensor:
    """The part (4,) of a picture (width, height) worth showing for `boxes` (n, 4): them and a margin all around, as a
    `share` of their longer side together."""
    boxes = torch.as_tensor(boxes, dtype=torch.float32)
    low, high = boxes[:, :2].amin(0), boxes[:, 2:].amax(0)
    limit = torch.tensor(size, dtype=torch.float32)
    margin = ((high - low).max() * share).clamp(min=16)
    return torch.cat([(low - margin).clamp(min=0).minimum(limit - 1), (high + margin).minimum(limit).clamp(min=1)])


def draw_salient_points(
    image: Image.Image, *, box: Tensor, points: Tensor, view: Tensor | None = None, longer_side: int = 400
) -> Image.Image:
    """A query's reference `box` (4,) in white and its salient `points` (N, 2), one colour for each attention head.

    Shows the part `view` (4,) of the picture, or all, at `longer_side` pixels. Points outside are not seen.
    """
    canvas, origin, scale = _part_of(image, view, longer_side)
    corners = (torch.as_tensor(box).float().cpu().view(2, 2) - origin).flatten().tolist()
    rectangle = pixel_box(corners, factor=scale, size=canvas.size)
    outline(ImageDraw.Draw(canvas), rectangle, PAPER, line_width(canvas.size))
    radius = max(longer_side // 75, 3)
    for head, centre in enumerate(((torch.as_tensor(points).float().cpu() - origin) * scale).tolist()):
        _marker(canvas, centre, radius, class_colour(head))
    return canvas


def draw_sampling_points(
    image: Image.Image,
    *,
    reference: Tensor,
    points: Tensor,
    areas: Tensor,
    view: Tensor | None = None,
    longer_side: int = 400,
) -> Image.Image:
    """A query's `reference` (2,) as a white cross and the `points` (heads, N, 2) that it samples, one colour for each
    attention head; `areas` (heads, N) are relative to that of a salient point.

    Shows the part `view` (4,) of the picture, or all, at `longer_side` pixels. Points outside are not seen.
    """
    canvas, origin, scale = _part_of(image, view, longer_side)
    radii = (max(longer_side // 75, 3) * torch.as_tensor(areas).float().cpu().sqrt()).round().clamp(min=3).int()
    centres = (torch.as_tensor(points).float().cpu() - origin) * scale
    markers = [
        (radius, centre, class_colour(head))
        for head, (row, places) in enumerate(zip(radii.tolist(), centres.tolist()))
        for radius, centre in zip(row, places)
    ]
    for radius, centre, colour in sorted(markers, reverse=True):  # small ones lie on large ones
        _marker(canvas, centre, radius, colour)
    x, y = ((torch.as_tensor(reference).float().cpu() - origin) * scale).round().int().tolist()
    arm, drawing = max(longer_side // 40, 6), ImageDraw.Draw(canvas)
    for grown, colour in ((1, INK), (0, PAPER)):
        for dx, dy in ((arm + grown, 1 + grown), (1 + grown, arm + grown)):
            drawing.rectangle((x - dx, y - dy, x + dx, y + dy), fill=colour)
    return canvas


def sampling_sheet(image: Image.Image, *, references: Tensor, points: Tensor, weights: Tensor) -> Image.Image:
    """Where a query of deformable attention looks, layer by layer: a column for each layer; the first row shows all
    levels, the others one level each, enlarged, and say how much of the heads' weight it has.

    Args:
        references: (layers, 2), where the query is.
        points: (layers, heads, levels, points, 2), where it looks.
        weights: (layers, heads, levels, points), how much that counts; those of a head sum to 1.
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
        names = [f"level {part[0] + 1}: {share:.0%} of weight" if one else "all levels" for share in shares]
        outside = ((where < 0) | (where > size)).any(-1).flatten(1).sum(1).tolist()
        captions.append(
            [
                f"layer {layer + 1}, {name}, {number} of {much[layer].numel()} outside"
                for layer, (name, number) in enumerate(zip(names, outside))
            ]
        )
    return contact_sheet(rows, captions)


def _part_of(image: Image.Image, view: Tensor | None, longer_side: int) -> tuple[Image.Image, Tensor, float]:
    """The part `view` (4,) of a picture, or all, at `longer_side` pixels; its corner (2,) and how much larger it is."""
    x0, y0, x1, y1 = (0, 0, *image.size) if view is None else torch.as_tensor(view).round().int().tolist()
    x1, y1 = max(x1, x0 + 1), max(y1, y0 + 1)
    scale = longer_side / max(x1 - x0, y1 - y0)
    size = (max(round((x1 - x0) * scale), 1), max(round((y1 - y0) * scale), 1))
    canvas = image.convert("RGB").resize(size, Image.Resampling.BICUBIC, box=(x0, y0, x1, y1))
    return canvas, torch.tensor([x0, y0]), scale


def _marker(canvas: Image.Image, centre: Sequence[float], radius: int, colour: Colour) -> None:
    """A disc in a white and a dark ring, which set it off from any background."""
    for grown, shade in ((2, INK), (1, PAPER), (-1, colour)):
        _disc(canvas, centre, radius + grown, shade)


def _disc(canvas: Image.Image, centre: Sequence[float], radius: int, colour: Colour) -> None:
    side = 2 * radius + 1
    mask = Image.new("L", (4 * side, 4 * side))
    ImageDraw.Draw(mask).ellipse((0, 0, 4 * side - 1, 4 * side - 1), fill=255)
    corner = round(centre[0] - side / 2), round(centre[1] - side / 2)
    canvas.paste(colour, (*corner, corner[0] + side, corner[1] + side), mask.reduce(4))  # reduced: smooth at the rim
