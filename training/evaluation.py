"""`--eval`: of a network, or of a file of detections."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from samdetr.datasets.coco_eval_file import evaluate_files
from samdetr.datasets.coco_eval_report import Report
from samdetr.training.run import Parts
from samdetr.training.settings import RunSettings
from samdetr.util.distributed import is_main
from samdetr.util.files import write_json
from samdetr.util.logger import log


def write_evaluation(parts: Parts) -> None:
    """Evaluate the network; show the metrics, and write them and the detections. Raises ValueError."""
    images = parts.data.val_images
    if not images.annotated and not parts.folder:
        raise ValueError(
            f"{images.annotation_file} has no annotations to compare with; keep the detections: `output_dir`"
        )
    metrics, evaluator = parts.evaluate()
    bad = metrics.get("nonfinite_images", 0)
    if bad and not parts.settings.run.allow_nonfinite:
        raise ValueError(
            f"{parts.source.path}: outputs of {bad} of {len(images)} images are not finite (with `amp` "
            f"{parts.settings.speed.amp}); `allow_nonfinite` evaluates them as images without detections"
        )
    if not is_main():
        return
    report = None
    if images.annotated:
        categories = parts.data.categories
        names = {identity: categories.names[label] for label, identity in categories.category_ids.items()}
        assert evaluator.metrics is not None
        report = Report.of(evaluator.detections, evaluator.ground_truth, names, evaluator.metrics)
        _show(report, images.annotation_file)
    else:
        log(f"{images.annotation_file} has no annotations: there are detections, no figures")
        metrics = {}
    if parts.folder:
        with _writing(parts.folder.path) as output:
            write_json(output / "detections.json", evaluator.results, indent=None)
            facts = {"resume": parts.source.path, "settings": parts.saved_settings()}
            _write(output, report, metrics, facts)
        log(f"detections{' and figures' if report else ''} are in {parts.folder.path}")


def evaluate_file(settings: RunSettings) -> None:
    """Show, and write if there is an output folder, the metrics of the file `detections`, compared with the file
    `annotations`. Raises ValueError."""
    run = settings.run
    report = evaluate_files(run.detections, run.annotations)
    _show(report, run.annotations)
    if run.output_dir:
        with _writing(Path(run.output_dir)) as output:
            _write(output, report, {}, {"detections": run.detections, "annotations": run.annotations})
        log(f"figures are in {run.output_dir}")


def _show(report: Report, file: str | Path) -> None:
    log(report.table())
    if not report.total["num_objects"]:
        log(f"warning: AP is undefined (-1): {file} has no object that is not a crowd")


def _write(output: Path, report: Report | None, metrics: dict[str, Any], facts: dict[str, Any]) -> None:
    write_json(output / "eval.json", {**metrics, **(report.to_json() if report else {}), **facts})
    if report:
        report.write_tables(output)
        report.draw(output)


@contextmanager
def _writing(folder: Path) -> Iterator[Path]:
    """The folder, made if it is new, for a body that writes into it. Raises ValueError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except OSError as error:
        raise ValueError(
            f"cannot write to `output_dir` {folder}: {error.strerror or error}; repair it or name another folder"
        ) from None
