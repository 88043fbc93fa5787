import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from samdetr.datasets import transforms
from samdetr.datasets.build import collate
from samdetr.datasets.transforms import EvalTransforms, RandomCrop, TrainTransforms, resized_size

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def scene(width, height, *boxes):
    """A grey image with one red rectangle for each xyxy box, and its target."""
    pixels = np.full((height, width, 3), 90, dtype=np.uint8)
    for left, top, right, bottom in boxes:
        pixels[top:bottom, left:right] = (250, 10, 10)
    target = {
        "boxes": tv_tensors.BoundingBoxes(
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), format="XYXY", canvas_size=(height, width)
        ),
        "labels": torch.arange(len(boxes)) + 7,
    }
    return Image.fromarray(pixels), target


def red_box(tensor):
    """xyxy of the red pixels in a normalised tensor (3, H, W), or None."""
    pixels = tensor.numpy().transpose(1, 2, 0) * STD + MEAN
    red = pixels[..., 0] - pixels[..., 1] > 0.47  # half of (250 - 10) / 255
    if not red.any():
        return None
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


@pytest.mark.parametrize(
    ("height", "width", "expected", "torchvisions"),
    [
        (480, 640, (800, 1066), (800, 1066)),  # 800 * 640 / 480 = 1066.67
        (640, 427, (1199, 800), (1199, 800)),  # 800 * 640 / 427 = 1199.06
        (360, 640, (750, 1333), (749, 1333)),  # limited: 1333 * 360 / 640 = 749.81
        (1000, 100, (1330, 133), (1333, 133)),  # limited: 133.3 -> 133, then 133 * 10
        (500, 500, (800, 800), (800, 800)),
    ],
)
def test_size_rule_by_hand_and_where_torchvision_has_another(height, width, expected, torchvisions):
    assert resized_size(height, width, 800, 1333) == expected
    image, target = scene(width, height, (10, 10, 50, 40))
    tensor, target = EvalTransforms()(image, target)
    assert tensor.shape == (3, *expected)
    ratio = np.array([expected[1] / width, expected[0] / height] * 2)
    np.testing.assert_allclose(target["boxes"].numpy()[0], ratio * [10, 10, 50, 40], rtol=1e-6)
    assert v2.Resize(800, max_size=1333)(image).size[::-1] == torchvisions


def test_a_side_never_vanishes():
    assert resized_size(1, 5000, 800, 1333) == (1, 1333)


def test_no_image_becomes_larger_than_its_limit(monkeypatch):
    """DETR's rounding may exceed max_size by 1 %; zooms, published without a limit, have one of four times max_size."""
    sizes = []
    resize = transforms.F.resize
    monkeypatch.setattr(
        transforms.F, "resize", lambda inpt, size, **how: sizes.append(size) or resize(inpt, size, **how)
    )
    for width, height in [(1, 60000), (60000, 1), (3, 20000), (20, 4700), (9000, 40), (1, 1), (2, 700)]:
        for transform in (EvalTransforms(), EvalTransforms(short_side=64, max_size=100), TrainTransforms()):
            tensor, target = transform(*scene(width, height, (0, 0, width, height)))
            limit = 100 if transform.transforms[1].__dict__.get("max_size") == 100 else 1333
            assert max(tensor.shape[1:]) <= 1.01 * limit
            assert target["boxes"].shape[1] == 4
    assert max(max(size) for size in sizes) <= 1.01 * 1333
    whole = [resized_size(300, 300 * ratio, 600, 1333, limit_from=4) for ratio in (1, 4, 8, 9)]
    assert whole == [(600, 600), (600, 2400), (600, 4800), (148, 1332)]


def test_zooms_have_three_sizes(monkeypatch):
    """A square becomes 400, 500 or 600 wide before it is cropped, and about equally often."""
    drawn = []
    monkeypatch.setattr(
        RandomCrop, "forward", lambda self, image, target: (drawn.append(tuple(image.shape)), (image, target))[1]
    )
    transform = TrainTransforms(short_sides=[8], max_size=10)  # which does not limit zooms
    for _ in range(240):
        transform(*scene(9, 9))
    assert set(drawn) == {(3, side, side) for side in (400, 500, 600)}
    assert all(20 < drawn.count(shape) < 60 for shape in set(drawn))


def test_the_published_preset_number_by_number(monkeypatch):
    """Eleven short sides, three zooms, and crops of 384 to 600 pixels anywhere in them: what each step is asked for."""
    sizes, crops = [], []

    def without_pixels(made, real, asked):
        def call(inpt, *place, **how):
            if not isinstance(inpt, tv_tensors.Image):
                return real(inpt, *place, **how)  # boxes
            asked.append(place)
            return tv_tensors.Image(torch.zeros(()).expand(3, *made(*place)))

        return call

    monkeypatch.setattr(transforms.F, "resize", without_pixels(lambda size: size, transforms.F.resize, sizes))
    monkeypatch.setattr(transforms.F, "crop", without_pixels(lambda *place: place[2:], transforms.F.crop, crops))
    transform, sides = TrainTransforms(normalize=False, max_size=None), set()
    for _ in range(400):
        sizes.clear()
        transform(*scene(9, 9))
        if len(sizes) == 1:  # not cropped
            sides |= {tuple(size) for size in sizes[0]}
    assert sides == {(side, side) for side in (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)}
    top, left, height, width = np.array(crops).T
    for place, length in ((top, height), (left, width)):
        assert 384 <= min(length) < 395
        assert 570 < max(length) <= 600
        assert 0 <= min(place) < 10
        assert max(place) > 150  # of 216
        assert 590 < max(place + length) <= 600


def test_pixels_are_pils_bilinear_and_imagenets_normalisation():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    tensor = EvalTransforms(short_side=40, max_size=None)(noise)  # shrinking shows whether it is antialiased
    expected = np.asarray(noise.resize((53, 40), Image.Resampling.BILINEAR))
    levels = 255 * (tensor.numpy().transpose(1, 2, 0) * STD + MEAN)
    np.testing.assert_allclose(levels, levels.round(), atol=1e-3)
    np.testing.assert_allclose(levels, expected, atol=1.001)
    assert (abs(levels - expected) > 0.5).mean() < 0.02
    assert tensor.dtype == torch.float32

    # Of bytes, normalised later: the same to the bit, and zero where padded.
    unpadded = EvalTransforms(short_side=40, max_size=None, normalize=False)(noise)
    batch, _ = collate([(unpadded, {"labels": torch.zeros(0)}), (unpadded[:, 7:, 9:], {"labels": torch.zeros(0)})])
    images = batch.to("cpu")
    assert torch.equal(images.images[0], tensor)
    assert torch.equal(images.images[1, :, :33, :44], tensor[:, 7:, 9:])
    assert not images.images[1].masked_select(images.padding[1]).any()


def test_boxes_follow_the_pixels_through_flips_crops_and_sizes():
    transforms = TrainTransforms(short_sides=[200, 260], max_size=400)
    shapes, lost = set(), 0
    for _ in range(40):
        tensor, target = transforms(*scene(300, 200, (30, 40, 90, 150)))
        found = red_box(tensor)
        shapes.add(tuple(tensor.shape))
        if found is None:
            lost += 1
            assert target["boxes"].shape == (0, 4)
            assert target["labels"].shape == (0,)
            continue
        assert target["labels"].tolist() == [7]
        np.testing.assert_allclose(target["boxes"].numpy()[0], found, atol=1.5)
    assert len(shapes) > 10, "crops differ"
    assert lost < 20


def test_half_is_flipped_and_half_is_cropped():
    transforms = TrainTransforms(short_sides=[30], max_size=None)
    cropped = flipped = 0
    for _ in range(120):
        tensor, target = transforms(*scene(80, 60, (0, 0, 20, 60), (5, 5, 6, 6)))
        cropped += tensor.shape[-2:] != (30, 40)
        if tensor.shape[-2:] == (30, 40):
            flipped += bool(target["boxes"][0, 0] > 20)
    assert 40 < cropped < 80
    assert 0.3 < flipped / (120 - cropped) < 0.7


def test_without_crop_only_flip_and_size_vary():
    transforms = TrainTransforms(short_sides=[48, 96], crop=False, flip=0.0)
    seen = {tuple(transforms(*scene(96, 48, (0, 0, 10, 10)))[0].shape) for _ in range(20)}
    assert seen == {(3, 48, 96), (3, 96, 192)}
    _, target = TrainTransforms(short_sides=[48], crop=False, flip=1.0)(*scene(96, 48, (0, 0, 10, 20)))
    assert target["boxes"].tolist() == [[86, 0, 96, 20]]


def test_crop_sides_clipped_boxes_and_dropped_labels():
    crop = RandomCrop(sides=(384, 600))
    sizes = []
    emptied = False
    for _ in range(200):
        image, target = crop(*scene(900, 400, (0, 0, 30, 30), (100, 0, 700, 400)))
        sizes.append(image.size)
        boxes = target["boxes"]
        assert ((boxes[:, 2:] > boxes[:, :2]) & (boxes[:, :2] >= 0)).all()
        assert (boxes[:, 2:] <= torch.tensor(image.size)).all()
        assert boxes.canvas_size == image.size[::-1]
        assert target["labels"].tolist() in ([7, 8], [8])
        image, target = crop(*scene(900, 400, (0, 0, 30, 30)))
        emptied |= target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)
    widths, heights = zip(*sizes)
    assert (min(heights), max(heights)) == (384, 400)  # of 17 values in 200 draws
    assert 384 <= min(widths) < 400
    assert 580 < max(widths) <= 600
    assert emptied
    assert crop(*scene(90, 50))[0].size == (90, 50)  # an image below 384 stays whole


def test_torch_alone_governs_the_randomness():
    transforms = TrainTransforms(short_sides=[60, 70, 80])

    def draw(seed, other):
        torch.manual_seed(seed)
        random.seed(other)
        np.random.seed(other)
        return [transforms(*scene(120, 100, (10, 10, 60, 60))) for _ in range(4)]

    for (a, target_a), (b, target_b) in zip(draw(1, 1), draw(1, 2)):
        assert torch.equal(a, b)
        assert torch.equal(target_a["boxes"], target_b["boxes"])
    assert any(a.shape != b.shape or not torch.equal(a, b) for (a, _), (b, _) in zip(draw(1, 1), draw(2, 1)))
