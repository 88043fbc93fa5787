"""Pictures of detections and ground truth, and sheets of several pictures.

Boxes are (left, top, right, bottom), in pixels of the picture that is passed in.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest

from PIL import Image, ImageDraw
from torch import Tensor

from samdetr.util.fonts import Font

Colour = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]  # first and last pixel that belong to it

_LEGIBLE_SIDE = 384  # pixels; a picture whose shorter side is less is enlarged ...
_LONGEST_SIDE = 1400  # ... unless its longer side would exceed this
INK, PAPER = (24, 24, 27), (255, 255, 255)


def class_colour(label: int) -> Colour:
    """A vivid colour that depends on the label alone; near labels get colours far apart."""
    # Steps of the golden section never return to a hue, and three shades in turn separate hues that come close.
    saturation, value = ((0.80, 1.00), (0.60, 0.95), (0.95, 0.80))[label // 7 % 3]
    red, green, blue = colorsys.hsv_to_rgb((0.02 + label * 0.618034) % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_detections(
    image: Image.Image, *, boxes: Tensor, labels: Tensor, scores: Tensor | None, class_names: Mapping[int, str]
) -> Image.Image:
    """The picture with `boxes` (n, 4), and the class name and score of each on a tag.

    `labels` (n,), `scores` (n,), or None for ground truth. A label without a name is shown as a number. Better scores
    (without scores: smaller boxes) lie on top. A small picture comes back enlarged by a whole factor.
    """
    factor = max(min(-(-_LEGIBLE_SIDE // min(image.size)), _LONGEST_SIDE // max(image.size)), 1)
    canvas = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    drawing = ImageDraw.Draw(canvas)
    line, font = line_width(canvas.size), _font(canvas.size)

    rectangles = [pixel_box(box, factor=factor, size=canvas.size) for box in boxes.tolist()]
    texts = [class_names.get(label, str(label)) for label in labels.tolist()]
    colours = [class_colour(label) for label in labels.tolist()]
    if scores is None:
        merit = [-(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in rectangles]
    else:
        merit = scores.tolist()
        texts = [f"{name} {score:.2f}" for name, score in zip(texts, merit)]
    from_worst = sorted(range(len(rectangles)), key=lambda i: merit[i])

    for i in from_worst:
        outline(drawing, rectangles[i], colours[i], line)
    tags: dict[int, Rectangle] = {}
    for i in reversed(from_worst):  # the best choose their place first
        texts[i] = _shorten(texts[i], font=font, width=canvas.width - 2 * _tag_margin(font))
        tags[i] = _place_tag(rectangles[i], _tag_size(texts[i], font), canvas.size, list(tags.values()))
    for i in from_worst:  # after all outlines, which would cross the text
        drawing.rectangle(tags[i], fill=colours[i])
        red, green, blue = colours[i]
        ink = INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else PAPER  # on bright colours, on dark ones
        x0, y0, _, y1 = tags[i]
        font.draw(drawing, (x0 + _tag_margin(font), (y0 + y1 + 1) / 2), texts[i], fill=ink)
    return canvas


def contact_sheet(rows: Sequence[Sequence[Image.Image]], captions: Sequence[Sequence[str]]) -> Image.Image:
    """Pictures in rows and columns, each below its caption; columns are as wide and rows as high as need be."""
    assert [len(row) for row in rows] == [len(row) for row in captions], "one caption a picture"
    widths = [max(column) for column in zip_longest(*([picture.width for picture in row] for row in rows), fillvalue=0)]
    heights = [max(picture.height for picture in row) for row in rows]
    font = _font(rows[0][0].size)
    gap, strip = round(font.size * 0.6), round(font.size * 1.9)

    sheet = Image.new("RGB", (sum(widths) + gap * (len(widths) + 1), sum(heights) + (strip + gap) * len(rows)), PAPER)
    drawing = ImageDraw.Draw(sheet)
    top = 0
    for row, texts, height in zip(rows, captions, heights):
        left = gap
        for picture, text, width in zip(row, texts, widths):
            text = _shorten(text, font=font, width=width)
            font.draw(drawing, (left + (width - font.getlength(text)) / 2, top + strip / 2), text, fill=INK)
            sheet.paste(picture, (left + (width - picture.width) // 2, top + strip))
            left += width + gap
        top += strip + height + gap
    return sheet


def shrunk(image: Image.Image, longest: int) -> tuple[Image.Image, float]:
    """The image, its longer side reduced to at most `longest` pixels, and the factor."""
    factor = min(longest / max(image.size), 1)
    return image.resize((max(round(image.width * factor), 1), max(round(image.height * factor), 1))), factor


def line_width(size: tuple[int, int]) -> int:
    return max(round(min(max(size), 2 * min(size)) / 350), 3)


def _font(size: tuple[int, int]) -> Font:
    return Font(max(round(min(max(size), 2 * min(size)) / 62), 13))


def pixel_box(box: Sequence[float], *, factor: float, size: tuple[int, int]) -> Rectangle:
    """First and last pixel of a box in a picture enlarged by `factor`: inside it, and not thinner than a line."""
    ends = []
    for low, high, side in ((box[0], box[2], size[0]), (box[1], box[3], size[1])):
        first, last = round(low * factor), round(high * factor) - 1
        short = 2 * line_width(size) + 1 - (last - first)
        if short > 0:
            first, last = first - short // 2, last + (short + 1) // 2
        ends.append((min(max(first, 0), side - 1), min(max(last, 0), side - 1)))
    (x0, x1), (y0, y1) = ends
    return x0, y0, x1, y1


def outline(drawing: ImageDraw.ImageDraw, box: Rectangle, colour: Colour, width: int) -> None:
    """A frame just inside the box, with a dark hairline on both sides to set it off from any background."""
    x0, y0, x1, y1 = box
    drawing.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=INK)
    if min(x1 - x0, y1 - y0) > 2 * width + 2:
        drawing.rectangle((x0 + width, y0 + width, x1 - width, y1 - width), outline=INK)
    drawing.rectangle(box, outline=colour, width=width)


def _tag_margin(font: Font) -> int:
    return max(round(font.size / 5), 2)


def _tag_size(text: str, font: Font) -> tuple[int, int]:
    # The height is the font's and not the text's, so that all tags are equally high.
    return round(font.getlength(text)) + 2 * _tag_margin(font), font.height(text) + 2


def _shorten(text: str, *, font: Font, width: int) -> str:
    """`text`, or its beginning and "..", whatever fits in `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "..") > width:
        text = text[:-1]
    return text + ".."


def _place_tag(box: Rectangle, tag: tuple[int, int], picture: tuple[int, int], taken: Sequence[Rectangle]) -> Rectangle:
    """Where a tag (width, height) of `box` covers least of the tags already there; best above the left end."""
    x0, y0, x1, y1 = box
    width, height = tag
    above, inside, below = [y0 - height], [y0, y1 - height + 1], [y1 + 1]
    heights = above + inside + below if y1 - y0 > 3 * height else above + below + inside  # cover no small object
    candidates = []
    for y in heights:
        for x in (x0, x1 - width + 1):
            if 0 <= y <= picture[1] - height or y == y0:
                left = min(max(x, 0), max(picture[0] - width, 0))
                top = min(max(y, 0), max(picture[1] - height, 0))
                candidates.append((left, top, left + width - 1, top + height - 1))

    def overlap(a: Rectangle, b: Rectangle) -> int:
        sides = (min(a[axis + 2], b[axis + 2]) - max(a[axis], b[axis]) + 1 for axis in (0, 1))
        return math.prod(max(side, 0) for side in sides)

    return min(candidates, key=lambda spot: sum(overlap(spot, other) for other in taken))
