"""COCO evaluation, pycocotools beside what main.py uses: `python benchmarks/evaluator.py`.

Made-up ground truth and detections: about seven objects an image, crowds and images without objects among them, and
detections around them, with scores of three digits so that many are equal. Both paths get the same predictions, batch
by batch as tensors:

    pycocotools   a list with a dict for each detection, loadRes, evaluate, accumulate, summarize
    ours          CocoEvaluator's update and summarize
    with report   the same and the metrics of each class, as --eval

"collect" is what every batch costs while the network runs, "figures" what follows the last batch. Paths take turns in
every round; times are medians over rounds. The exit status is 1 if one of the twelve figures differs by more than 1e-9.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import time
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # started by its path: find the packages from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from benchmarks.report import positive, surroundings, write
from samdetr.datasets.annotations import Annotations
from samdetr.datasets.categories import Categories
from samdetr.datasets.coco_eval import METRICS, CocoEvaluator
from samdetr.datasets.coco_eval_report import Report
from samdetr.datasets.ground_truth import GroundTruth

BATCH = 16


def make(*, images: int, detections: int, categories: int) -> tuple[dict, list[dict[int, dict[str, Tensor]]]]:
    """The content of an annotation file, and predictions in batches as the post-processor gives them."""
    rng = np.random.default_rng(0)
    annotations, predictions = [], {}
    for image_id in range(1, images + 1):
        count = 0 if image_id % 50 == 0 else int(rng.integers(1, 15))
        sizes = rng.uniform(8, np.array([40, 120, 400])[np.arange(count) % 3, None], (count, 2))
        boxes = np.concatenate([rng.uniform(0, (640, 480), (count, 2)) - sizes / 2, sizes], 1)
        present = rng.integers(1, categories + 1, 1 + count // 2)  # the objects of an image are of few kinds
        labels = rng.choice(present, count)
        for k, (box, label) in enumerate(zip(boxes.tolist(), labels.tolist())):
            crowd = int(k == 0 and image_id % 11 == 0)
            annotations.append({"image_id": image_id, "category_id": label, "bbox": box, "iscrowd": crowd})
        # A third are near objects, mostly of the right class, the others anywhere.
        near = min(detections // 3, 4 * count)
        which = np.arange(near) % max(count, 1)
        around = boxes[which] + rng.normal(0, 0.12, (near, 4)) * np.tile(sizes[which], 2)
        anywhere = rng.uniform((0, 0, 5, 5), (500, 400, 200, 200), (detections - near, 4))
        found = np.concatenate([around, anywhere])
        found[:, 2:] = found[:, :2] + found[:, 2:].clip(1)
        kinds = rng.integers(1, categories + 1, detections)
        right = np.flatnonzero(rng.random(near) < 0.8)
        kinds[right] = labels[which[right]]
        scores = (rng.random(detections) * np.where(np.arange(detections) < near, 1, 0.3)).round(3)
        predictions[image_id] = {
            "scores": torch.tensor(scores, dtype=torch.float32),
            "labels": torch.tensor(kinds),
            "boxes": torch.tensor(found, dtype=torch.float32),
        }
    for number, annotation in enumerate(annotations, 1):
        annotation |= {"id": number, "area": 0.7 * annotation["bbox"][2] * annotation["bbox"][3]}
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in predictions],
        "annotations": annotations,
        "categories": [{"id": i, "name": str(i)} for i in range(1, categories + 1)],
    }
    ids = list(predictions)
    return content, [{i: predictions[i] for i in ids[k : k + BATCH]} for k in range(0, len(ids), BATCH)]


def by_pycocotools(content: dict, batches: list) -> tuple[float, float, list[float]]:
    """Seconds to collect, seconds for the figures, and these."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = content
        truth.createIndex()
        begin = time.perf_counter()
        results = []
        for batch in batches:
            for image_id, found in batch.items():
                boxes = found["boxes"].double()
                boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
                results += [
                    {"image_id": image_id, "category_id": label, "bbox": box, "score": score}
                    for box, label, score in zip(boxes, found["labels"].tolist(), found["scores"].tolist())
                ]
        middle = time.perf_counter()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return middle - begin, time.perf_counter() - middle, evaluation.stats.tolist()


def by_ours(content: dict, batches: list, *, report: bool = False) -> tuple[float, float, list[float]]:
    truth = GroundTruth.from_annotations(Annotations(content))
    evaluator = CocoEvaluator(truth, Categories.from_annotations(content["categories"]))
    begin = time.perf_counter()
    for batch in batches:
        evaluator.update(batch)
    middle = time.perf_counter()
    figures = list(evaluator.summarize().values())
    if report:
        assert evaluator.metrics is not None
        Report.of(evaluator.detections, truth, {}, evaluator.metrics)
    return middle - begin, time.perf_counter() - middle, figures


PATHS = {"pycocotools": by_pycocotools, "ours": by_ours, "with report": partial(by_ours, report=True)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=positive, default=5000)
    parser.add_argument("--detections", type=positive, default=100, help="of an image")
    parser.add_argument("--categories", type=positive, default=80)
    parser.add_argument("--rounds", type=positive, default=3, help="to take the median of")
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    packages = ("torch", "numpy", "pycocotools", "faster-coco-eval")
    about = surroundings(packages=packages, device="cpu", threads=1)
    print(f"{args.images} images, {args.detections} detections of each, {args.categories} categories", flush=True)

    content, batches = make(images=args.images, detections=args.detections, categories=args.categories)
    parts = ("collect", "figures", "total")
    times: dict[str, dict[str, list[float]]] = {path: {part: [] for part in parts} for path in PATHS}
    stats = {}
    for number in range(args.rounds):
        for path, work in PATHS.items():
            collect, figures, stats[path] = work(content, batches)
            for part, value in zip(parts, (collect, figures, collect + figures)):
                times[path][part].append(value)
        print(
            f"round {number + 1}: " + ", ".join(f"{path} {times[path]['total'][-1]:.2f} s" for path in PATHS),
            flush=True,
        )

    medians = {path: {part: statistics.median(times[path][part]) for part in parts} for path in PATHS}
    ratios = {part: medians["pycocotools"][part] / medians["ours"][part] for part in parts}
    print(f"{'':12}" + "".join(f"{part:>12}" for part in parts) + f"{'images/s':>12}")
    for path in PATHS:
        cells = "".join(f"{medians[path][part]:10.3f} s" for part in parts)
        print(f"{path:12}{cells}{args.images / medians[path]['total']:12.0f}")
    print(f"{'ratio':12}" + "".join(f"{ratios[part]:11.1f}x" for part in parts))
    difference = max(abs(a - b) for a, b in zip(stats["pycocotools"], stats["ours"]))
    print(f"largest difference of the {len(METRICS)} figures: {difference:.1e}; AP {stats['ours'][0]:.4f}")
    report = {
        **about,
        "images": args.images,
        "detections": args.detections,
        "categories": args.categories,
        "seconds": times,
        "median_s": medians,
        "ratio": ratios,
        "figures": {path: dict(zip(METRICS, values)) for path, values in stats.items()},
        "largest_difference": difference,
    }
    write(args.json, report)
    return int(difference > 1e-9)


if __name__ == "__main__":
    sys.exit(main())
