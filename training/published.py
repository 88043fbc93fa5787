"""The published runs of SAM-DETR: published.json has the figures of the official logs, by epoch.

Lists `epoch`, `train_loss` (weighted sum), the last layer's weighted `train_loss_ce`, `train_loss_bbox` and
`train_loss_giou`, `test_loss`, and `coco_eval_bbox`, the 12 figures on COCO val2017. The log of r50_ms_smca_e50
stops one epoch early.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from samdetr.datasets.coco_eval import METRICS
from samdetr.training.settings import RunSettings


@cache
def published() -> dict[str, dict[str, Any]]:
    """All, by name: r50_smca_e12."""
    return json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


def published_by_epoch(name: str, key: str) -> dict[int, float]:
    """A loss of a published run, or one of its metrics; empty if it has none."""
    run = published()[name]
    values = [row[METRICS.index(key)] for row in run["coco_eval_bbox"]] if key in METRICS else run.get(key, ())
    return dict(zip(run["epoch"], values))


@cache
def recipe(name: str) -> RunSettings:
    """The settings of a published run; one image a process."""
    words = name.split("_")
    epochs = int(words[-1].removeprefix("e"))
    names = {"ms": "multiscale", "dc5": "dilation", "smca": "smca"}
    switches = {names[word]: True for word in words if word in names}
    drop = {12: 10, 50: 40}[epochs]
    return RunSettings.from_flat({**switches, "epochs": epochs, "lr_drop": drop}).with_resolved_norm()


def recipe_of(settings: Mapping[str, Any]) -> str | None:
    """The published run that had a network and a number of epochs as in `settings`; None if none had. Older runs lack
    settings that came later, which have their defaults there."""
    known = {**RunSettings.from_flat({}).flat(), "epochs": None, **settings}
    for name in published():
        wanted = recipe(name)
        network = [each.name for part in (wanted.trunk, wanted.family) for each in dataclasses.fields(part)]
        flat = wanted.flat()
        if all(known[each] == flat[each] for each in (*network, "epochs")):
            return name
    return None


_IMAGES = ("train_sizes", "eval_size", "max_size", "crop_augmentation")


def departures(settings: Mapping[str, Any], name: str) -> list[str]:
    """Settings of network, optimisation, losses and images in which a run differs from a published one:
    "lr 0.001 (0.0001)"."""
    wanted = recipe(name)
    flat, parts = wanted.flat(), (wanted.trunk, wanted.family, wanted.optimisation, wanted.loss)
    names = [*(each for part in parts for each in part.flat()), *_IMAGES]
    names.remove("batch_size")  # together with the number of GPUs it is the same
    return [f"{n} {settings[n]} ({flat[n]})" for n in names if settings.get(n, flat[n]) != flat[n]]
