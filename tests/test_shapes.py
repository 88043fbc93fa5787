import json

import numpy as np
import pytest
import torch
from matplotlib.path import Path as Outline
from PIL import Image
from pycocotools import mask as coco_mask

from samdetr.datasets import shapes
from samdetr.datasets.coco import CocoDetection
from samdetr.datasets.coco_eval import CocoEvaluator
from samdetr.datasets.transforms import EvalTransforms
from samdetr.util.box_ops import cxcywh_to_xyxy

SETTINGS = ["--num_train", "8", "--num_val", "40"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("shapes") / "set"
    assert shapes.main(["--output", str(folder), *SETTINGS]) == 0
    return folder


def read(folder, split):
    return json.loads((folder / "annotations" / f"instances_{split}2017.json").read_text())


def test_the_same_seed_draws_the_same_set(folder, tmp_path, capsys):
    again = tmp_path / "deeper" / "again"
    assert shapes.main(["--output", str(again), *SETTINGS]) == 0
    for split, count in [("train", 8), ("val", 40)]:
        name = f"annotations/instances_{split}2017.json"
        assert (folder / name).read_bytes() == (again / name).read_bytes()
        names = sorted(p.name for p in (folder / f"{split}2017").iterdir())
        assert len(names) == count
        for name in names:
            a, b = (np.asarray(Image.open(f / f"{split}2017" / name)) for f in (folder, again))
            assert np.array_equal(a, b)

    file = again / "annotations" / "instances_val2017.json"
    written = file.stat().st_mtime_ns
    assert shapes.main(["--output", str(again), *SETTINGS]) == 0
    assert shapes.main(["--output", str(again), *SETTINGS, "--seed", "1"]) == 2
    assert file.stat().st_mtime_ns == written
    (again / "train2017" / "000000000001.jpg").unlink()
    assert shapes.main(["--output", str(again), *SETTINGS]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all("again" in line and "delete it or choose another --output" in line for line in errors)


def test_images_differ_by_seed_split_and_index_alone():
    def draw(**changes):
        pixels, _ = shapes.draw_image(**{"seed": 0, "split": "train", "index": 1, "size": 96, **changes})
        return pixels

    assert np.array_equal(draw(), draw())
    assert not any(np.array_equal(draw(), draw(**c)) for c in ({"seed": 1}, {"split": "val"}, {"index": 2}))
    assert draw(size=128).shape == (128, 128, 3)


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    draw_image = shapes.draw_image

    def interrupted(**kwargs):
        if kwargs["index"] == 3:
            raise KeyboardInterrupt
        return draw_image(**kwargs)

    monkeypatch.setattr(shapes, "draw_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shapes.main(["--output", str(tmp_path / "set"), *SETTINGS])
    assert list(tmp_path.iterdir()) == []


def test_what_the_files_hold(folder):
    train, val = read(folder, "train"), read(folder, "val")
    assert [c["id"] for c in val["categories"]] == [1, 2, 3, 5]
    assert {a["category_id"] for a in val["annotations"]} == {1, 2, 3, 5}
    for content, crowds in [(train, 1), (val, 2)]:
        assert sum(a["iscrowd"] for a in content["annotations"]) == crowds
    assert not {i["id"] for i in train["images"]} & {i["id"] for i in val["images"]}
    objects = {i["id"]: 0 for i in val["images"]}
    for a in val["annotations"]:
        objects[a["image_id"]] += not a["iscrowd"]
    assert min(objects.values()) == 0
    assert max(objects.values()) == 3
    for crowd in (a for a in train["annotations"] + val["annotations"] if a["iscrowd"]):
        rle = coco_mask.frPyObjects(crowd["segmentation"], 96, 96)
        assert coco_mask.area(rle) == crowd["area"]
        assert coco_mask.toBbox(rle).tolist() == crowd["bbox"]


def test_boxes_are_tight_around_what_is_drawn(folder):
    """Outlines filled anew by another library, at 8 x 8 points a pixel."""
    annotations = {}
    for a in read(folder, "val")["annotations"]:
        annotations.setdefault(a["image_id"] - 9, []).append(a)  # the first of val follows 8 of train
    points = (np.arange(96 * 8) + 0.5) / 8
    points = np.stack(np.meshgrid(points, points), -1).reshape(-1, 2)
    checked = 0
    for index, entries in sorted(annotations.items())[:15]:
        pixels, drawn = shapes.draw_image(seed=0, split="val", index=index, size=96)
        assert len(drawn) == len(entries)
        covered = np.zeros((96, 96), dtype=bool)
        for shape, entry in reversed(list(zip(drawn, entries))):
            inside = np.any([Outline(o).contains_points(points) for o in shape.outlines], 0)
            cover = inside.reshape(96, 8, 96, 8).mean((1, 3))
            mask = shape.mask
            assert mask[cover > 0.75].all()
            assert not mask[cover < 0.25].any()
            rows, columns = np.nonzero(mask)
            x, y, w, h = entry["bbox"]
            assert [x, y, x + w - 1, y + h - 1] == [columns.min(), rows.min(), columns.max(), rows.max()]
            assert entry["area"] == len(rows)
            visible = mask & ~covered
            assert visible.sum() >= 0.7 * mask.sum()
            covered |= mask
            if not entry["iscrowd"]:
                checked += 1
                # the colour inside stands out from a frame of two pixels around the box
                frame = np.zeros((96, 96), dtype=bool)
                frame[max(y - 2, 0) : y + h + 2, max(x - 2, 0) : x + w + 2] = True
                frame[y : y + h, x : x + w] = False
                for other in drawn:
                    frame &= ~other.mask
                if frame.any():
                    assert np.linalg.norm(pixels[visible].mean(0) - pixels[frame].mean(0)) > 40
    assert checked > 20  # of at most three shapes in each of the images above


def test_ground_truth_given_back_is_perfect(folder):
    dataset = CocoDetection(
        image_folder=folder / "val2017",
        annotation_file=folder / "annotations" / "instances_val2017.json",
        transforms=EvalTransforms(short_side=96),
        train=False,
    )
    dataset.check_files()
    evaluator = CocoEvaluator(dataset.ground_truth, dataset.categories)
    for _, target in (dataset[i] for i in range(len(dataset))):
        evaluator.update(
            {
                target["image_id"].item(): {
                    "scores": torch.ones(len(target["labels"])),
                    "labels": target["labels"],
                    "boxes": cxcywh_to_xyxy(target["boxes"]) * 96,
                }
            }
        )
    figures = evaluator.summarize()
    assert [figures[name] for name in ("AP", "AP75", "AR100")] == pytest.approx([1, 1, 1], abs=1e-6)
