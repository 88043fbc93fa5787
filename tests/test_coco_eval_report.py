"""Metrics by class, the best threshold, the confusion matrix, and the command that needs nothing but two files."""

import contextlib
import csv
import io
import json
import math

import numpy as np
import pytest
from pycocotools.cocoeval import COCOeval
from test_coco_eval import NAMES, awkward, silent_coco

from samdetr.datasets.annotations import Annotations
from samdetr.datasets.coco_eval import box_metrics
from samdetr.datasets.coco_eval_file import read_detections
from samdetr.datasets.coco_eval_report import Report
from samdetr.datasets.ground_truth import GroundTruth


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
