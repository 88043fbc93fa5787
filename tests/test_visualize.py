"""Pixels where boxes, tags and points must be, and curves that are written whole."""

from itertools import pairwise

import pytest
import torch
from PIL import Image

from samdetr.inference.points import draw_salient_points, draw_sampling_points, sampling_sheet, view_around
from samdetr.util.curves import plot_training_curves
from samdetr.util.drawing import class_colour, contact_sheet, draw_detections

GREY = (128, 128, 128)
NAMES = {1: "person", 2: "bicycle", 3: "traffic light"}


def grey(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), GREY)


def draw(image: Image.Image, boxes: list, labels: list, scores: list | None) -> Image.Image:
    return draw_detections(
        image,
        boxes=torch.tensor(boxes).reshape(-1, 4),
        labels=torch.tensor(labels),
        scores=None if scores is None else torch.tensor(scores),
        class_names=NAMES,
    )


def count(image: Image.Image, colour: tuple[int, int, int]) -> int:
    return {c: n for n, c in image.getcolors(1 << 24)}.get(colour, 0)


@pytest.mark.parametrize(("size", "factor"), [((96, 96), 4), ((800, 600), 1)])
def test_box_edges(size, factor):
    image = grey(*size)
    drawn = draw(image, [[24.0, 40.0, 72.0, 90.0]], [2], [0.5])
    assert drawn.size == (size[0] * factor, size[1] * factor)
    left, top, right, bottom = (factor * edge for edge in (24, 40, 72, 90))
    middle_x, middle_y = (left + right) // 2, (top + bottom) // 2
    for inside in ((left, middle_y), (right - 1, middle_y), (middle_x, top), (middle_x, bottom - 1)):
        assert drawn.getpixel(inside) == class_colour(2), inside
    for outside in ((left - 2, middle_y), (right + 1, middle_y), (middle_x, bottom + 1), (middle_x, middle_y)):
        assert drawn.getpixel(outside) == GREY, outside
    assert image.tobytes() == grey(*size).tobytes()  # the caller's picture stays as it was


@pytest.mark.parametrize("size", [(1333, 800), (96, 96), (40, 300)])
def test_tags_stay_inside_the_picture(size):
    width, height = size
    w, h = width * 0.3, height * 0.3
    white = set()
    for left in (0, (width - w) / 2, width - w):
        for top in (0, (height - h) / 2, height - h):
            drawn = draw(grey(*size), [[left, top, left + w, top + h]], [1], [0.93])
            white.add(count(drawn, (255, 255, 255)))  # the text is white on this class's blue
    assert len(white) == 1  # the whole text at every place
    assert white.pop() > 20


def test_tags_tell_name_and_score_or_number():
    boxes = [[100.0, 100.0, 500.0, 500.0]]
    pictures = [
        draw(grey(640, 600), boxes, [1], [0.93]),
        draw(grey(640, 600), boxes, [1], [0.11]),
        draw(grey(640, 600), boxes, [1], None),
        draw_detections(
            grey(640, 600), boxes=torch.tensor(boxes), labels=torch.tensor([1]), scores=None, class_names={}
        ),
    ]
    assert len({picture.tobytes() for picture in pictures}) == 4


@pytest.mark.parametrize("scores", [[0.9, 0.2], [0.2, 0.9]])
def test_better_scores_lie_on_top(scores):
    wide, high = [50.0, 300.0, 750.0, 500.0], [300.0, 50.0, 500.0, 580.0]
    drawn = draw(grey(800, 600), [wide, high], [1, 2], scores)
    # The left edge of the high box crosses the lower edge of the wide one here.
    assert drawn.getpixel((301, 498)) == class_colour(1 if scores[0] > scores[1] else 2)


def test_small_ground_truth_lies_on_large():
    boxes = [[250.0, 200.0, 400.0, 500.0], [100.0, 100.0, 700.0, 500.0]]
    assert draw(grey(800, 600), boxes, [1, 2], None).getpixel((252, 498)) == class_colour(1)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_degenerate_boxes_and_any_mode(mode):
    boxes = [[50.0, 50.0, 51.0, 51.0], [-30.0, -30.0, 10.0, 10.0], [90.0, 90.0, 200.0, 200.0], [30.0, 30.0, 30.0, 30.0]]
    drawn = draw(grey(96, 96).convert(mode), boxes, [1, 2, 3, 1], [0.1, 0.2, 0.3, 0.4])
    assert drawn.getpixel((202, 203)) != drawn.getpixel((250, 250))  # even a box of one pixel is seen
    assert draw(grey(800, 600).convert(mode), [], [], []).mode == "RGB"


def test_colours_of_classes_differ():
    colours = [class_colour(label) for label in range(91)]
    assert len(set(colours)) == 91
    for first, second in pairwise(colours):
        assert sum(abs(a - b) for a, b in zip(first, second)) > 150


def test_salient_points_and_reference_box():
    image = grey(400, 300)
    points = torch.tensor([[150.0, 150.0], [250.0, 130.0], [10.0, 10.0]])
    box = torch.tensor([120.0, 110.0, 280.0, 190.0])
    whole = draw_salient_points(image, box=box, points=points)
    assert whole.size == (400, 300)
    assert whole.getpixel((150, 150)) == class_colour(0)
    assert whole.getpixel((250, 130)) == class_colour(1)
    assert whole.getpixel((10, 10)) == class_colour(2)
    assert whole.getpixel((120, 170)) == (255, 255, 255)

    part = draw_salient_points(image, box=box, points=points, view=torch.tensor([100.0, 100.0, 300.0, 200.0]))
    assert part.size == (400, 200)  # enlarged twice; pixel (100, 100) is at the corner
    assert part.getpixel((100, 100)) == class_colour(0)
    assert part.getpixel((300, 60)) == class_colour(1)
    assert part.getpixel((40, 140)) == (255, 255, 255)
    assert count(part, class_colour(2)) == 0


def test_sampling_points_and_reference():
    image = grey(400, 300)
    points = torch.tensor([[[150.0, 150.0], [350.0, 60.0]], [[250.0, 130.0], [-9.0, 130.0]]])  # two heads
    areas = torch.tensor([[4.0, 1.0], [1.0, 0.0]])
    drawn = draw_sampling_points(image, reference=torch.tensor([200.0, 200.0]), points=points, areas=areas)
    for head, (x, y), radius in ((0, (150, 150), 10), (0, (350, 60), 5), (1, (250, 130), 5)):
        assert drawn.getpixel((x + radius - 2, y)) == class_colour(head)  # four times the area is twice the radius
        assert drawn.getpixel((x - radius - 5, y)) == GREY
    assert drawn.getpixel((200, 200)) == drawn.getpixel((192, 200)) == drawn.getpixel((200, 208)) == (255, 255, 255)
    assert drawn.getpixel((206, 206)) == GREY  # a cross, not a disc
    assert min(drawn.getpixel((0, y)) for y in range(300)) == GREY  # what lies outside is not pulled in


def test_sampling_sheet_enlarges_each_level_and_counts_what_is_outside(monkeypatch):
    """Two layers, one head, two levels of two points; the second layer's coarse points are out of the picture."""
    captions = []
    monkeypatch.setattr(
        "samdetr.inference.points.contact_sheet", lambda r, c: captions.extend(c) or contact_sheet(r, c)
    )
    first = [[[90.0, 50.0], [110.0, 50.0]], [[50.0, 50.0], [150.0, 60.0]]]
    second = [[[99.0, 50.0], [101.0, 50.0]], [[-1.0, 50.0], [100.0, 101.0]]]
    points = torch.tensor([[first], [second]])
    weights = torch.tensor([[[[0.25, 0.25], [0.25, 0.25]]], [[[0.6, 0.1], [0.3, 0.0]]]])
    sheet = sampling_sheet(grey(200, 100), references=torch.full((2, 2), 50.0), points=points, weights=weights)
    assert captions == [
        ["layer 1, all levels, 0 of 4 outside", "layer 2, all levels, 2 of 4 outside"],
        ["layer 1, level 1: 50% of weight, 0 of 2 outside", "layer 2, level 1: 70% of weight, 0 of 2 outside"],
        ["layer 1, level 2: 50% of weight, 0 of 2 outside", "layer 2, level 2: 30% of weight, 2 of 2 outside"],
    ]
    # 400 pixels wide: the whole picture, 34..126 x 34..66 around level 1's points and the reference, 0..166 x 34..100.
    greys = 400 * (200 + round(400 * 32 / 92) + round(400 * 66 / 166))
    assert 0.97 * 2 * greys < count(sheet, GREY) < 2 * greys  # markers cover the rest


def test_view_holds_all_boxes_and_stays_in_the_picture():
    boxes = torch.tensor([[10.0, 20.0, 50.0, 40.0], [30.0, 30.0, 110.0, 70.0]])
    assert view_around(boxes, size=(400, 300)).tolist() == [0, 0, 160, 120]  # half of the longer side (100) around
    assert view_around(boxes, size=(130, 300)).tolist() == [0, 0, 130, 120]


def test_sheet_places_pictures_below_their_captions():
    red, blue, small = (Image.new("RGB", s, c) for s, c in (((60, 50), "red"), ((40, 50), "blue"), ((20, 30), "lime")))
    sheet = contact_sheet([[red, blue], [small]], [["a", "b"], ["c"]])
    for picture, colour in ((red, (255, 0, 0)), (blue, (0, 0, 255)), (small, (0, 255, 0))):
        assert count(sheet, colour) == picture.width * picture.height
    pair = contact_sheet([[grey(300, 200), grey(300, 200)]], [["detections", "ground truth"]])
    assert count(pair, GREY) >= 2 * 300 * 200
    assert pair.width > 600
    assert pair.height > 200


def log_line(epoch: int, **more) -> dict:
    losses = {"train_loss": 10.0 / (epoch + 1), "train_loss_ce": 0.9, "train_loss_bbox": 0.4, "train_loss_giou": None}
    return {"epoch": epoch, "train_lr": 1e-4, **losses, **more}


def test_training_curves(tmp_path):
    tested = {"test_loss": 11.0, "test_coco_eval_bbox": [0.3, 0.5] + [0.1] * 10}
    logs = {
        "one.png": [log_line(0)],
        "many.png": [log_line(epoch, **(tested if epoch % 2 else {})) for epoch in range(6)],
        "untested.png": [log_line(epoch) for epoch in range(6)],
        "resumed.png": [log_line(5, train_lr=3.0)] + [log_line(epoch) for epoch in range(6)],
    }
    for name, lines in logs.items():
        plot_training_curves(lines, tmp_path / name)
    pictures = {name: Image.open(tmp_path / name).tobytes() for name in logs}
    assert pictures["many.png"] != pictures["untested.png"]
    assert pictures["resumed.png"] == pictures["untested.png"]  # the later line of an epoch counts

    with pytest.raises(ValueError, match="nosuchformat"):
        plot_training_curves([log_line(0)], tmp_path / "curves.nosuchformat")
    assert {path.name for path in tmp_path.iterdir()} == set(logs)
