import contextlib
import io
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import in_processes
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import distributed

from samdetr.datasets.annotations import Annotations
from samdetr.datasets.categories import Categories
from samdetr.datasets.coco_eval import CocoEvaluator
from samdetr.datasets.ground_truth import GroundTruth
from samdetr.datasets.sampler import evaluation_batches

SHARED_DATA = Path(__file__).parents[1].parent / "shared" / "data"
NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
CATEGORIES = [{"id": i, "name": str(i)} for i in (1, 2, 3, 5)]


def ground_truth():
    """13 images of 400 x 300; every fourth is empty, every third has a crowd; objects of all three size classes."""
    rng = np.random.default_rng(0)
    annotations = []
    for image_id in range(1, 14):
        for k in range(0 if image_id % 4 == 0 else rng.integers(2, 7)):
            w, h = rng.integers(8, (30, 90, 200)[k % 3], 2).tolist()
            x, y = rng.integers(0, (400 - w, 300 - h)).tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(rng.choice([1, 2, 3, 5])),
                    "bbox": [x, y, w, h],
                    "area": w * h * 0.8,
                    "iscrowd": int(k == 1 and image_id % 3 == 0),
                }
            )
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 400, "height": 300} for i in range(1, 14)]
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def random_results(content):
    """Shifted ground truth, some of it under another category or twice, and false detections, empty images included.
    Quarters of a pixel, so that no number is rounded on its way through float32."""
    rng = np.random.default_rng(1)
    results = []
    for a in content["annotations"] * 2:
        box = np.array(a["bbox"]) + rng.integers(-12, 13, 4) / 4 * (1 + a["bbox"][2] / 40) // 0.25 * 0.25
        category = a["category_id"] if rng.random() < 0.85 else 1
        results.append({"image_id": a["image_id"], "category_id": category, "bbox": box.clip(1).tolist()})
    for _ in range(200):
        box = (rng.integers(4, 400, 4) / 4).tolist()
        results.append({"image_id": int(rng.integers(1, 14)), "category_id": int(rng.choice([1, 5])), "bbox": box})
    return [{**r, "score": float(np.float32(rng.random()))} for r in results]


def silent_coco(content):
    coco = COCO()
    coco.dataset = json.loads(json.dumps(content))
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def plain_pycocotools(content, results):
    coco = silent_coco(content)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco, coco.loadRes(json.loads(json.dumps(results))), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(NAMES, evaluation.stats.tolist()))


def as_predictions(content, results):
    """What a post-processor gives: image id -> tensors, also for images without detections."""
    predictions = {}
    for image in content["images"]:
        rows = [r for r in results if r["image_id"] == image["id"]]
        boxes = torch.tensor([r["bbox"] for r in rows], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        predictions[image["id"]] = {
            "scores": torch.tensor([r["score"] for r in rows]),
            "labels": torch.tensor([r["category_id"] for r in rows], dtype=torch.int64),
            "boxes": boxes,
        }
    return predictions


def evaluator(content):
    truth = GroundTruth.from_annotations(Annotations(content))
    return CocoEvaluator(truth, Categories.from_annotations(content["categories"]))


def test_equals_pycocotools_on_all_twelve(capsys):
    content = ground_truth()
    results = random_results(content)
    expected = plain_pycocotools(content, results)
    assert all(0.01 < value < 0.99 for value in expected.values()), f"the test tells nothing: {expected}"
    ours = evaluator(content)
    ours.update(as_predictions(content, results))
    assert ours.summarize() == pytest.approx(expected, abs=1e-12)
    assert plain_pycocotools(content, ours.results) == expected
    assert capsys.readouterr().out == ""
    lines = ours.table().splitlines()
    assert len(lines) == 12
    assert lines[1].endswith(f"{expected['AP50']:.3f}")


def awkward(seed):
    """Ground truth and detections of all that is unusual: equal scores and boxes, boxes without area or exactly
    at the limits of the size classes, crowds, images without objects, detections or both, more than 100 detections of
    a class, classes that only one side has, ids that are large or negative."""
    rng = np.random.default_rng(seed)
    image_ids = (rng.choice(1000, 12, replace=False) * (1, 2**40)[seed % 2]).tolist()
    category_ids = (rng.choice(50, 6, replace=False) * (1, 10**9)[seed % 2] - (0, 30)[seed % 2]).tolist()
    annotations, results = [], []
    for image_id in image_ids:
        for _ in range(rng.integers(0, 20) if rng.random() < 0.8 else 0):
            w, h = [(32, 32), (96, 96), (0, 9), *rng.integers(1, 200, (4, 2)).tolist()][rng.integers(7)]
            x, y = rng.integers(-20, 300, 2).tolist()
            category, crowd = int(rng.choice(category_ids[:4])), int(rng.random() < 0.15)
            box = {"image_id": image_id, "category_id": category, "bbox": [x, y, w, h]}
            annotations.append({**box, "id": len(annotations) + 1, "area": w * h, "iscrowd": crowd})
            if rng.random() < 0.8:
                shift = rng.integers(-3, 4, 4).clip(min=[-99, -99, 0, 0])
                results.append({**box, "bbox": (np.array(box["bbox"]) + shift).tolist()})
        for _ in range(rng.choice([0, 5, 250])):
            box, category = rng.integers(0, 200, 4).tolist(), int(rng.choice(category_ids[1:] + category_ids[1:2] * 9))
            results.append({"image_id": image_id, "category_id": category, "bbox": box})
    scores = rng.random(len(results)) if seed % 3 else rng.integers(0, 5, len(results)) / 4
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in image_ids]
    categories = [{"id": i, "name": str(i)} for i in category_ids]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return content, [{**r, "score": float(np.float32(s))} for r, s in zip(results, scores)]


@pytest.mark.parametrize("seed", range(6))
def test_equals_pycocotools_where_it_is_awkward(seed):
    content, results = awkward(seed)
    for annotation in content["annotations"]:
        if seed == 2:  # small objects alone: two figures have nothing to say
            annotation["area"] = min(annotation["area"], 900)
    expected = plain_pycocotools(content, results)
    assert expected["AP"] > 0.02
    assert (expected["APl"] == -1) == (seed == 2)
    ours = evaluator(content)
    labels = {category: label for label, category in ours.categories.category_ids.items()}
    ours.update(as_predictions(content, [{**r, "category_id": labels[r["category_id"]]} for r in results]))
    assert ours.summarize() == pytest.approx(expected, abs=1e-12)


def test_ids_of_annotations_do_not_matter():
    """pycocotools takes an object with id 0 for unmatched, and loses all but one of those with equal ids."""
    content = ground_truth()
    results = random_results(content)
    expected = plain_pycocotools(content, results)
    for number, annotation in enumerate(content["annotations"]):
        annotation["id"] = number // 2
    ours = evaluator(content)
    ours.update(as_predictions(content, results))
    assert ours.summarize() == pytest.approx(expected, abs=1e-12)


def test_an_update_has_no_loop_over_detections():
    """As many calls for a thousand detections an image as for ten."""

    def calls(count):
        found = {"scores": torch.rand(count), "labels": torch.randint(0, 6, (count,)), "boxes": torch.rand(count, 4)}
        ours, made = evaluator(ground_truth()), Counter()
        sys.setprofile(lambda frame, event, argument: made.update([event]))
        try:
            ours.update({1: found, 2: found})
        finally:
            sys.setprofile(None)
        assert len(ours.results) == 2 * np.isin(found["labels"], [1, 2, 3, 5]).sum()
        return made

    assert calls(10) == calls(1000)


def test_huge_category_ids_are_mapped_back():
    content = ground_truth()
    results = random_results(content)
    expected = plain_pycocotools(content, results)
    far = {1: 10_000, 2: 20_000, 3: 30_000, 5: 50_000}
    moved = json.loads(json.dumps(content))
    for entry in moved["annotations"]:
        entry["category_id"] = far[entry["category_id"]]
    for entry in moved["categories"]:
        entry["id"] = far[entry["id"]]
    labels = {1: 0, 2: 1, 3: 2, 5: 3}
    ours = evaluator(moved)
    ours.update(as_predictions(moved, [{**r, "category_id": labels[r["category_id"]]} for r in results]))
    assert ours.summarize() == pytest.approx(expected, abs=1e-12)
    assert {r["category_id"] for r in ours.results} <= set(far.values())


def test_no_detection_at_all_and_labels_in_gaps():
    content = ground_truth()
    ours = evaluator(content)
    ours.update(as_predictions(content, []))
    nothing = ours.summarize()
    assert list(nothing) == NAMES
    assert set(nothing.values()) == {0.0}
    assert ours.results == []

    results = random_results(content)
    ours = evaluator(content)
    noise = [{**r, "category_id": gap} for r, gap in zip(results, [0, 4, 6] * 9)]
    ours.update(as_predictions(content, results + noise))
    assert ours.summarize() == pytest.approx(plain_pycocotools(content, results), abs=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_detection_with_a_score_or_box_that_is_no_number_is_dropped_alone(value):
    content = ground_truth()
    first = content["annotations"][0]
    left, top, width, height = first["bbox"]
    found = {
        "scores": torch.tensor([0.5, value, 0.25]),
        "labels": torch.full((3,), first["category_id"]),
        "boxes": torch.tensor([[left, top, left + width, top + height]] * 3, dtype=torch.float32),
    }
    found["boxes"][2, 1] = value
    annotations = Annotations(content)
    evaluator = CocoEvaluator(
        GroundTruth.from_annotations(annotations), Categories.from_annotations(annotations.categories)
    )
    evaluator.update({first["image_id"]: found})
    assert [(row["score"], row["bbox"]) for row in evaluator.results] == [(0.5, first["bbox"])]
    assert evaluator.summarize()["AR1"] > 0


def test_widths_of_boxes_are_not_rounded_to_float32():
    content = ground_truth()
    image, category = content["images"][0]["id"], CATEGORIES[0]["id"]
    corners, score = torch.tensor([[0.1, 0.7, 1000.3, 700.9]]), torch.tensor([0.3])
    ours = evaluator(content)
    ours.update({image: {"scores": score, "labels": torch.tensor([category]), "boxes": corners}})
    left, top, right, bottom = corners[0].tolist()
    wanted = {"bbox": [left, top, right - left, bottom - top], "score": score.item()}
    assert ours.results == [{"image_id": image, "category_id": category, **wanted}]
    assert wanted["bbox"][2:] != (corners[0, 2:] - corners[0, :2]).tolist()


def test_only_updated_images_count():
    content = ground_truth()
    results = random_results(content)
    some = {1, 2, 3, 4}
    part = {
        "images": [i for i in content["images"] if i["id"] in some],
        "annotations": [a for a in content["annotations"] if a["image_id"] in some],
        "categories": CATEGORIES,
    }
    ours = evaluator(content)
    ours.update({i: p for i, p in as_predictions(content, results).items() if i in some})
    expected = plain_pycocotools(part, [r for r in results if r["image_id"] in some])
    assert ours.summarize() == pytest.approx(expected, abs=1e-12)


def batches(length: int, *, processes: int, rank: int, world_size: int, batch_size: int = 2) -> list[list[int]]:
    return evaluation_batches(
        order=range(length), batch_size=batch_size, processes=processes, rank=rank, world_size=world_size
    )


def test_each_image_is_evaluated_by_one_process():
    for length, world in [(13, 2), (7, 3), (1, 2), (6, 3)]:
        parts = [batches(length, processes=world, rank=r, world_size=world) for r in range(world)]
        assert sorted(i for part in parts for batch in part for i in batch) == list(range(length))
    assert batches(9, processes=2, rank=0, world_size=2) == [[0, 2], [4, 6], [8]]
    assert batches(9, processes=2, rank=1, world_size=2) == [[1, 3], [5, 7]]


def test_other_processes_repeat_the_batches_of_a_run():
    of_two = [[0, 2], [1, 3], [4, 6], [5, 7], [8]]
    assert batches(9, processes=2, rank=0, world_size=1) == of_two
    of_three = [batches(9, processes=2, rank=r, world_size=3) for r in range(3)]
    assert sorted(batch for part in of_three for batch in part) == sorted(of_two)


def evaluate_one_share(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    content = ground_truth()
    predictions = as_predictions(content, random_results(content))
    ours = evaluator(content)
    ids = [image["id"] for image in content["images"]]
    share = [ids[i] for batch in batches(len(ids), processes=2, rank=rank, world_size=2) for i in batch]
    for image_id in [*share, ids[0]]:  # the first image in both processes
        ours.update({image_id: predictions[image_id]})
    figures = ours.summarize()
    (folder / f"{rank}.json").write_text(json.dumps([figures, len(share), len(ours.results)]))
    distributed.destroy_process_group()


def test_two_processes_give_the_figures_of_one(tmp_path):
    in_processes(evaluate_one_share, (tmp_path,), 2)
    content = ground_truth()
    results = random_results(content)
    expected = plain_pycocotools(content, results)
    for rank, images in enumerate((7, 6)):
        figures, *counts = json.loads((tmp_path / f"{rank}.json").read_text())
        assert figures == pytest.approx(expected, abs=1e-12)
        assert counts == [images, len(results)]


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="../shared/data with real COCO annotations is not here")
def test_real_ground_truth_given_back_is_perfect():
    content = json.loads((SHARED_DATA / "coco_tiny" / "annotations" / "instances_val2017.json").read_text())
    ours = evaluator(content)
    ours.update(as_predictions(content, [{**a, "score": 1.0} for a in content["annotations"] if not a["iscrowd"]]))
    figures = ours.summarize()
    assert [figures[name] for name in ("AP", "AP50", "AP75")] == pytest.approx([1, 1, 1], abs=1e-6)
