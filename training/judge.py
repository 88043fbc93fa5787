"""Whether a run follows a published one: `compare` in training, `samdetr compare --against` afterwards."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from samdetr.training import learning_rate
from samdetr.training.published import departures, published, published_by_epoch, recipe, recipe_of
from samdetr.training.settings import RunSettings

# What both the published logs and ours have, by what it is called here; losses are weighted.
KEYS = {
    "train_loss": "loss", "train_loss_ce": "ce", "train_loss_bbox": "bbox", "train_loss_giou": "giou",
    "test_loss": "test loss", "AP": "AP",
}  # fmt: skip
_REPEATED = (("r50_ms_e12", "r50_ms_e50"), ("r50_ms_smca_e12", "r50_ms_smca_e50"))  # alike up to the first drop
_CLASSES = 80  # of COCO


@dataclass(frozen=True)
class Difference:
    """A loss or AP of an epoch beside the published one. `change` and `allowed` are relative for losses, absolute for
    AP."""

    key: str
    here: float
    there: float
    allowed: float

    @property
    def change(self) -> float:
        return self.here - self.there if self.key == "AP" else self.here / self.there - 1

    @property
    def outside(self) -> bool:
        return not abs(self.change) <= self.allowed  # true of NaN

    def __str__(self) -> str:
        return f"{KEYS[self.key]} {self._signed(self.change)}"

    def at_length(self) -> str:
        allowed = self._signed(self.allowed).removeprefix("+")
        return f"{KEYS[self.key]} {self.here:.4g} for {self.there:.4g} ({self._signed(self.change)}, at most {allowed})"

    def _signed(self, change: float) -> str:
        return f"{change:+.4f}" if self.key == "AP" else f"{100 * change:+.1f} %"


@cache
def allowed(key: str) -> float:
    """How far a run like a published one may be from it at one epoch.

    The larger of five standard deviations of the published curves around smooth ones, and of 1.25 times the largest
    difference of runs that were published twice. The deviations are those of all curves together, by their third
    differences (of independent errors these have 20 times the variance, of a smooth curve hardly any) at one learning
    rate, without the first epochs, where curves bend; medians, so that single jumps do not count.
    """
    thirds, repeats = [], []
    scale = (lambda value: value) if key == "AP" else math.log
    for name in published():
        values = list(published_by_epoch(name, key).values())[: recipe(name).optimisation.lr_drop]
        curve = list(map(scale, values))
        thirds += [abs(d - 3 * c + 3 * b - a) for a, b, c, d in zip(curve, curve[1:], curve[2:], curve[3:])][2:]
    for first, second in _REPEATED:
        one, other = published_by_epoch(first, key), published_by_epoch(second, key)
        drop = recipe(first).optimisation.lr_drop
        repeats += [Difference(key, other[epoch], one[epoch], 0).change for epoch in range(drop)]
    deviation = statistics.median(thirds) / (0.6745 * math.sqrt(20))  # 0.6745: median of |x| of a normal distribution
    return max(5 * deviation, 1.25 * max(map(abs, repeats)))


def differences(values: Mapping[str, float], epoch: int, *, name: str) -> list[Difference]:
    """Of an epoch's losses and AP, by KEYS, from those of the published run; of those that both have."""
    found = []
    for key in KEYS:
        there = published_by_epoch(name, key).get(epoch)
        if there is not None and key in values:
            found.append(Difference(key, values[key], there, allowed(key)))
    return found


def verdict(values: Mapping[str, float], epoch: int, *, name: str) -> list[str]:
    """Lines on an epoch: the differences, and a warning if there are any outside of what is allowed."""
    found = differences(values, epoch, name=name)
    if not found:
        return []
    lines = [f"against {name}: {', '.join(map(str, found))}"]
    if far := [each.at_length() for each in found if each.outside]:
        lines.append(
            f"warning: epoch {epoch} is further from {name} than repeated runs are: {', '.join(far)}; "
            "docs/published.md says what causes this"
        )
    return lines


def published_name(name: str, settings: Mapping[str, Any], *, flag: str = "compare") -> str:
    """The published run that a `flag` names: that of the settings for "auto"; names of scripts will do, too.

    Raises ValueError: there is none.
    """
    names = ", ".join(published())
    if name == "auto":
        found = recipe_of(settings)
        if found is None:
            raise ValueError(f"`{flag}` auto: no published run has this network and number of epochs; pass {names}")
        return found
    short = name.rsplit("/", 1)[-1].removesuffix(".sh").removesuffix("_4gpu").removesuffix("_8gpu")
    if short not in published():
        raise ValueError(f"`{flag}` {name} is no published run; pass auto, {names}")
    return short


def introduction(settings: RunSettings, *, name: str, images_per_step: int, classes: int) -> str:
    """A line on what is compared with what."""
    flat = settings.with_resolved_norm().flat()
    others = departures(flat, name)
    theirs = learning_rate.reference(recipe(name))[1]
    if images_per_step != theirs:
        others.append(f"images a step {images_per_step} ({theirs})")
    if classes != _CLASSES:
        others.append(f"classes {classes} ({_CLASSES})")
    text = f"every epoch is compared with the published run {name}"
    return f"{text}, from which this one differs: {', '.join(others)}" if others else text


def table(epochs: Sequence[tuple[int, Mapping[str, float]]], *, name: str) -> list[str]:
    """Lines on a whole run, of its epochs by number."""
    lines, judged, far = [], 0, 0
    for epoch, values in epochs:
        of_epoch = verdict(values, epoch, name=name)
        judged, far = judged + bool(of_epoch), far + (len(of_epoch) > 1)
        lines += [f"epoch {epoch} {of_epoch[0]}", *of_epoch[1:]] if of_epoch else []
    if not judged:
        return [f"no epoch to compare with {name}"]
    return [*lines, f"{far} of {judged} epochs are further from {name} than repeated runs are"]
