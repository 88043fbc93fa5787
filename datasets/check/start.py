"""The check at the start of a run: from what the run has read anyway, without decoding images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from samdetr.datasets.annotations import Annotations
from samdetr.datasets.check.files import FileState
from samdetr.datasets.check.report import by_severity
from samdetr.datasets.check.splits import Split, all_findings, check_split, listed_sizes
from samdetr.datasets.coco import CocoDetection


def check_loaded(annotations: Annotations, dataset: CocoDetection, *, split: str, num_queries: int) -> Split:
    """Check a split that a run has loaded: `dataset`, whose `check_files` was called, and its `annotations`.

    Neither the annotation file nor an image file is read again.
    """
    states = {name: FileState(size=size) for name, size in listed_sizes(annotations).items()}
    for index, fault in dataset.known_faults.items():
        states[dataset.images[index].file_name] = FileState(*fault)
    return check_split(annotations, states, split=split, folder=dataset.image_folder, num_queries=num_queries)


def start_lines(splits: Sequence[Split], root: Path) -> list[str]:
    """Warnings and errors of the data in `root`, a line each, and where to find more; none for clean data.

    Two splits must be train and val, in this order.
    """
    lines = [finding.line() for finding in by_severity(all_findings(splits)) if finding.severity != "note"]
    if lines:
        lines.append(f"python -m datasets.check {root} shows everything, decodes images too, and repairs with --fix")
    return lines
