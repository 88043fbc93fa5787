"""Metrics by class, the best threshold, the confusion matrix, and the command that needs nothing but two files."""

import contextlib
import csv
import io
import json
import math

import numpy as np
import pytest
from helpers import error_line
from PIL import Image
from pycocotools.cocoeval import COCOeval
from test_coco_eval import NAMES, awkward, silent_coco

from samdetr.datasets.annotations import Annotations
from samdetr.datasets.coco_eval import box_metrics
from samdetr.datasets.coco_eval_file import read_detections
from samdetr.datasets.coco_eval_report import Report
from samdetr.datasets.ground_truth import GroundTruth
from samdetr.main import main
from samdetr.util.class_pictures import draw_confusion


def report(content, results, tmp_path, annotations=None):
    (tmp_path / "results.json").write_text(json.dumps(results))
    annotations = annotations or Annotations(content)
    found, truth = read_detections(tmp_path / "results.json", annotations), GroundTruth.from_annotations(annotations)
    return Report.of(found, truth, annotations.names, box_metrics(found, truth))


def pycocotools_of(content, results, categories):
    """The evaluation of some categories, and its 12 metrics."""
    coco = silent_coco(content)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco, coco.loadRes(json.loads(json.dumps(results))), "bbox")
        evaluation.params.catIds = categories
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation, dict(zip(NAMES, evaluation.stats.tolist()))


def best_of(evaluation):
    """F1, precision, recall and threshold by trying every score, from the matches of pycocotools at IoU 0.5."""
    images = [e for e in evaluation.evalImgs if e and e["aRng"] == [0, 1e10]]
    counted = [
        (score, match > 0)
        for e in images
        for score, match, ignored in zip(e["dtScores"], e["dtMatches"][0], e["dtIgnore"][0])
        if not ignored
    ]
    objects = sum(int((e["gtIgnore"] == 0).sum()) for e in images)
    tried = []
    for threshold in {score for score, _ in counted}:
        chosen = [hit for score, hit in counted if score >= threshold]
        f1 = 2 * sum(chosen) / (len(chosen) + objects)
        tried.append((f1, threshold, sum(chosen) / len(chosen), sum(chosen) / objects if objects else math.nan))
    return objects, len(counted), max(tried, default=None)


@pytest.mark.parametrize("seed", range(6))
def test_every_class_equals_pycocotools(seed, tmp_path):
    content, results = awkward(seed)
    if seed == 4:  # larger than COCO counts, and of negative area
        content["annotations"][0]["area"], content["annotations"][1]["area"] = 2e10, -1
        results[0]["bbox"][2:] = [2e5, 2e5]
    ours = report(content, results, tmp_path)
    ids = sorted(c["id"] for c in content["categories"])
    assert [row["id"] for row in ours.classes] == ids
    found = 0
    for identities, row in [*(([i], row) for i, row in zip(ids, ours.classes)), (ids, ours.total)]:
        evaluation, expected = pycocotools_of(content, results, identities)
        expected = {name: value if value >= 0 else math.nan for name, value in expected.items()}
        assert {name: row[name] for name in NAMES} == pytest.approx(expected, abs=1e-12, nan_ok=True)
        objects, detections, best = best_of(evaluation)
        assert (row["num_objects"], row["num_detections"]) == (objects, detections)
        if objects and best and best[0] > 0:
            found += 1
            assert (row["f1"], row["threshold"], row["precision"], row["recall"]) == pytest.approx(best, abs=1e-12)
        else:
            assert math.isnan(row["threshold"])
    assert found >= 4
    # The diagonal is what precision and recall count; objects and detections of the matrix are those of the table.
    counted = ours.confusion.sum()
    assert np.trace(ours.confusion) == round(ours.total["recall"] * ours.total["num_objects"])
    assert ours.confusion[:-1].sum(1).tolist() == [row["num_objects"] for row in ours.classes]
    assert ours.confusion[:, :-1].sum() == round(np.trace(ours.confusion) / ours.total["precision"])
    assert counted > 0


def shapes_of(*rows, score=None):
    """Boxes of 10 x 10 pixels: (image, class, left), and a score for detections."""
    found = []
    for image, category, left, *score in rows:
        entry = {"image_id": image, "category_id": category, "bbox": [left, 0, 10, 10]}
        found.append(entry | dict(zip(("score",), score)))
    return found


def small(names=("cat", "dog", "owl"), objects=()):
    """Two images of 200 x 200 and classes with the ids 1, 2, ..."""
    objects = shapes_of(*objects) if objects and isinstance(objects[0], tuple) else objects
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 200, "height": 200} for i in (1, 2)],
        "annotations": [{"id": n, "area": 100, **entry} for n, entry in enumerate(objects, 1)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)],
    }


def test_best_f1_and_confusion_matrix_by_hand(tmp_path):
    content = small(objects=[(1, 1, 0), (1, 1, 50), (1, 2, 100), (2, 2, 0)])
    content["annotations"].append({**shapes_of((1, 1, 150))[0], "id": 9, "area": 100, "iscrowd": 1})
    results = shapes_of(
        (1, 1, 0, 0.9),  # a cat
        (1, 1, 1, 0.8),  # the same cat again
        (1, 2, 50, 0.8),  # a cat taken for a dog
        (1, 2, 100, 0.7),  # a dog
        (1, 1, 100, 0.95),  # a cat where the dog is: the dog's own detection comes first all the same
        (1, 1, 150, 0.85),  # in a crowd, which does not count
        (2, 3, 0, 0.7),  # a dog taken for an owl
        (2, 2, 100, 0.2),  # nothing, and below the threshold
    )
    ours = report(content, results, tmp_path)
    # All: 0.7 finds 2 of 4 objects with 6 detections, 0.9 finds 1 with 2.
    assert (ours.total["f1"], ours.total["threshold"]) == (pytest.approx(2 * 2 / (6 + 4)), 0.7)
    assert (ours.total["precision"], ours.total["recall"]) == (pytest.approx(2 / 6), 0.5)
    assert ours.confusion.tolist() == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [2, 0, 0, 0]]
    cat, dog, owl = ours.classes
    assert (cat["f1"], cat["threshold"], cat["precision"], cat["recall"]) == (pytest.approx(2 / 4), 0.9, 0.5, 0.5)
    assert (dog["f1"], dog["threshold"], dog["precision"], dog["recall"]) == (pytest.approx(2 / 4), 0.7, 0.5, 0.5)
    assert (owl["num_objects"], owl["num_detections"]) == (0, 1)
    assert all(math.isnan(owl[name]) for name in (*NAMES, "f1", "precision", "recall", "threshold"))
    assert "1 of 3 classes have no objects here and no metrics: owl" in ours.table()


def test_equal_scores_are_not_parted(tmp_path):
    ours = report(small(objects=[(1, 1, 0)]), shapes_of((1, 1, 0, 0.5), (1, 1, 50, 0.5)), tmp_path)
    assert (ours.total["f1"], ours.total["precision"], ours.total["recall"]) == (pytest.approx(2 / 3), 0.5, 1.0)


def test_exchanged_classes_are_seen_though_no_threshold_finds_anything(tmp_path):
    ours = report(small(objects=[(1, 1, 0), (2, 2, 0)]), shapes_of((1, 2, 0, 0.1), (2, 1, 0, 0.9)), tmp_path)
    assert (ours.total["f1"], ours.total["precision"], ours.total["recall"]) == (0, 0, 0)
    assert math.isnan(ours.total["threshold"])
    assert ours.confusion.tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_of_equal_overlaps_the_last_object_and_of_wrong_classes_the_best_score_count(tmp_path):
    # The first cat overlaps both objects equally. It takes the second, so the other cat finds the first, at 8 / 12.
    ours = report(small(objects=[(1, 1, 10), (1, 1, 14)]), shapes_of((1, 1, 12, 0.9), (1, 1, 8, 0.8)), tmp_path)
    assert ours.total["recall"] == 1
    results = shapes_of((1, 1, 0, 0.5), (1, 2, 50, 0.6), (1, 3, 50, 0.7), (1, 2, 100, 0.6))
    ours = report(small(objects=[(1, 1, 0), (1, 1, 50)]), results, tmp_path)
    assert ours.confusion.tolist() == [[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 2, 0, 0]]


@pytest.fixture
def evaluated(tmp_path, capsys):
    """`samdetr eval --detections`: status, what is printed, and the folder that is written into."""

    def run(content, results, *flags):
        files = {"detections": results, "annotations": content}
        for name, value in files.items():
            if value is not None:
                text = value if isinstance(value, str) else json.dumps(value)
                (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
        words = [w for name in files for w in (f"--{name}", str(tmp_path / f"{name}.json"))]
        status = main(["--eval", *words, "--output_dir", str(tmp_path / "out"), *flags])
        printed = capsys.readouterr()
        return status, printed.out, printed.err, tmp_path / "out"

    return run


def test_files_of_any_names(evaluated):
    """A name with commas, formulas, line breaks, unknown letters or half a character spoils no file."""
    names = ["$x_1$", '_hid\nden,"q"', "\ud800", "\U0001033f", "a" * 99]
    content = small(names, [(1, 1, 0), (1, 2, 50)])
    status, printed, _, folder = evaluated(content, shapes_of((1, 1, 0, 0.5), (1, 2, 100, 0.25)))
    assert status == 0
    with open(folder / "per_class.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [*names[:2], "\\ud800", *names[3:]]
    assert (rows[0]["AP"], rows[1]["AP50"], rows[1]["threshold"], rows[2]["AP"]) == ("1.0", "0.0", "", "")
    with open(folder / "confusion_matrix.csv", encoding="utf-8", newline="") as file:
        matrix = list(csv.reader(file))
    assert [row[0] for row in matrix[1:]] == matrix[0][1:] == [row["name"] for row in rows] + ["background"]
    assert [len(row) for row in matrix] == [7] * 7
    facts = json.loads((folder / "eval.json").read_text())
    assert [row["name"] for row in facts["classes"]] == names
    assert (facts["AP"], facts["coco_eval_bbox"][0], facts["coco_eval_bbox"][3]) == (0.5, 0.5, 0.5)
    assert (facts["APm"], facts["coco_eval_bbox"][4]) == (None, -1)
    assert facts["classes"][1]["best_f1"] == {"f1": 0, "precision": 0, "recall": 0, "threshold": None}
    assert facts["classes"][2]["best_f1"] == dict.fromkeys(("f1", "precision", "recall", "threshold"))
    assert "3 of 5 classes have no objects" in printed
    assert printed.count("pictures show ids") == 1
    for name in ("confusion_matrix.png", "precision_recall.png"):
        assert Image.open(folder / name).size > (500, 300)


def test_ids_as_text_or_floats(evaluated):
    results = [{"image_id": "1", "category_id": 1.0, "bbox": ["0", 0, "10.0", 10], "score": "0.5"}]
    status, _, _, folder = evaluated(small(objects=[(1, 1, 0)]), results)
    assert status == 0
    assert json.loads((folder / "eval.json").read_text())["AP"] == 1


def test_nothing_detected_and_nothing_to_detect(evaluated):
    status, _, _, folder = evaluated(small(objects=[(1, 1, 0)]), [])
    facts = json.loads((folder / "eval.json").read_text())
    assert (status, facts["AP"], facts["best_f1"]["precision"], facts["best_f1"]["recall"]) == (0, 0, None, 0)
    status, printed, _, folder = evaluated(small(), [])
    assert (status, json.loads((folder / "eval.json").read_text())["AP"]) == (0, None)
    assert "AP is undefined (-1)" in printed


GOOD = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10], "score": 0.5}


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ([GOOD, {**GOOD, "image_id": 7}, {**GOOD, "image_id": 8}], "entry 1 has image_id 7, which 'images' of"),
        ([{**GOOD, "image_id": True}], "entry 0 has image_id True"),
        ([{**GOOD, "category_id": "cat"}], "entry 0 has category_id 'cat', which 'categories' of"),
        ([{k: v for k, v in GOOD.items() if k != "category_id"}], "entry 0 has no 'category_id'; pass COCO results"),
        ([{"image_id": 1, "category_id": 1, "score": 1, "segmentation": {}}], "entry 0 has only a mask, no 'bbox'"),
        ([{**GOOD, "bbox": [], "segmentation": []}], "entry 0 has only a mask, no 'bbox'"),
        ([{k: v for k, v in GOOD.items() if k != "bbox"}], "entry 0 has no 'bbox': add [left, top, width, height]"),
        ([{**GOOD, "bbox": [0, 0, -1, 1]}], "entry 0 has bbox [0, 0, -1, 1]; it must be four finite numbers"),
        ([{**GOOD, "bbox": [0, 0, 1e999, 1]}], "entry 0 has bbox [0, 0, inf, 1]"),
        ([{**GOOD, "score": math.nan}], "entry 0 has score nan; it must be a finite number"),
        ([{**GOOD, "score": None}], "entry 0 has score None"),
        ([{k: v for k, v in GOOD.items() if k != "score"}], "entry 0 has no 'score'"),
        ([GOOD, 3], "entry 1 is 3, no object; pass COCO results"),
        (small(), "holds an object instead of a list; it looks like an annotation file; pass COCO results"),
        ("3", "holds 3 instead of a list"),
        ("[{", "is not JSON"),
        (None, "detections.json does not exist; check the path"),
    ],
)
def test_detections_that_cannot_be_evaluated(results, expected, evaluated):
    status, _, error, folder = evaluated(small(objects=[(1, 1, 0)]), results)
    assert status == 2
    assert expected in error_line(error)
    assert "detections.json" in error
    assert not folder.exists()
    if isinstance(results, list) and len(results) == 3:
        assert "(2 of 3 entries have this fault)" in error


def test_boxes_of_another_form_are_pointed_out(evaluated):
    content = small(objects=[(1, 1, 0)])
    corners = [{**GOOD, "bbox": [100 + k, 100, 150 + k, 150]} for k in range(10)]
    assert "not the corners" in evaluated(content, corners)[1]
    fractions = [{**GOOD, "bbox": [0.5, 0.5, 0.25, 0.25]}] * 10
    assert "are they fractions?" in evaluated(content, fractions)[1]
    assert "warning" not in evaluated(content, [{**GOOD, "bbox": [100 + k, 100, 50, 50]} for k in range(10)])[1]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--eval --detections a.json", "--detections needs what to compare with: pass --annotations FILE"),
        ("--eval --annotations a.json", "--annotations is what --detections FILE is compared with"),
        ("--detections a.json --annotations b.json", "--detections is for --eval"),
        ("--eval --detections a.json --annotations b.json --resume c.pth", "--detections evaluates a file, --resume"),
        ("--eval --detections a.json --annotations b.json", "annotation file b.json does not exist"),
    ],
)
def test_flags(flags, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(flags.split()) == 2
    assert expected in error_line(capsys.readouterr().err)


def test_a_picture_of_many_classes_stays_small(tmp_path):
    """Labels that do not fit are left out; the background keeps its own."""
    counts = np.eye(601, dtype=int)
    labels = [str(k) for k in range(600)] + ["background"]
    draw_confusion(tmp_path / "matrix.png", counts=counts, labels=labels, families=["DejaVu Sans"], title="many")
    assert max(Image.open(tmp_path / "matrix.png").size) < 2400
