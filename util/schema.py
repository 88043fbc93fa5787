"""What nested plain values must look like, such as those of a file that somebody else may have written.

    PLACE = record({"epoch": number(least=0), "names": listed(text)})
    PLACE(content, "'place'")

A rule is a function of a value and its place; it raises ValueError, which names both, if the value breaks it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

Rule = Callable[[Any, str], None]


def brief(value: Any) -> str:
    """A value of whatever kind in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, (dict, list, tuple, set)):
        return f"a {type(value).__name__} of {len(value)}"
    try:
        text = ascii(value)
    except ValueError:  # an integer of thousands of digits
        text = f"an integer of {value.bit_length()} bits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _require(holds: bool, value: Any, place: str, what: str) -> None:
    if not holds:
        raise ValueError(f"{place} is {brief(value)}, not {what}")


def number(*, least: float = -math.inf, most: float = math.inf, whole: bool = True) -> Rule:
    """A finite number in this range; an integer if `whole`. A truth value is none."""
    bounds = [f"{least:g} or more"] if least > -math.inf else []
    bounds += [f"{most:g} at most"] if most < math.inf else []
    what = " and ".join(["an integer" if whole else "a finite number", *bounds])

    def rule(value: Any, place: str) -> None:
        right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        # Compared before it is asked whether it is finite, which needs a value that fits a float.
        _require(right and least <= value <= most and abs(value) < math.inf, value, place, what)

    return rule


def text(value: Any, place: str) -> None:
    """A str that can be written to a file or a terminal: without lone surrogates."""
    _require(isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value), value, place, "a text")


def anything(value: Any, place: str) -> None:
    """No rule."""


def tensor(*, dtype: torch.dtype | None = None) -> Rule:
    """A plain tensor: dense, neither quantised nor nested, of real numbers, on the CPU."""

    def rule(value: Any, place: str) -> None:
        _require(isinstance(value, Tensor), value, place, "a tensor")
        kind = next(
            (
                kind
                for kind, found in {
                    "nested": value.is_nested,
                    "quantised": value.is_quantized,
                    "sparse": value.layout != torch.strided,
                    "of complex numbers": value.is_complex(),
                    "of 8-bit numbers": value.is_floating_point() and value.itemsize == 1,
                    f"on the device {value.device}": value.device.type != "cpu",
                }.items()
                if found
            ),
            None,
        )
        if kind:
            raise ValueError(f"{place} is a tensor that is {kind}, not a plain one of real numbers")
        _require(dtype in (None, value.dtype), value, place, f"one of {dtype}")

    return rule


def record(required: Mapping[str, Rule], *, optional: Mapping[str, Rule] = MappingProxyType({})) -> Rule:
    """A dict that has the keys of `required`, and perhaps of `optional`, with values by their rules. Others are
    ignored."""

    def rule(value: Any, place: str) -> None:
        _require(isinstance(value, dict), value, place, "a dict")
        for name, one in {**required, **optional}.items():
            if name in value:
                one(value[name], f"{place}[{name!r}]" if place else f"{name!r}")
            elif name in required:
                raise ValueError(f"{place or 'the file'} has no {name!r}")

    return rule


def each(one: Rule, *, key: Rule = text) -> Rule:
    """A dict whose keys and values follow rules."""

    def rule(value: Any, place: str) -> None:
        _require(isinstance(value, dict), value, place, "a dict")
        for name, item in value.items():
            key(name, f"a key of {place}")
            one(item, f"{place}[{brief(name)}]")

    return rule


def listed(one: Rule, *, least: int = 0) -> Rule:
    """A list, or tuple, of at least so many values that follow a rule."""

    def rule(value: Any, place: str) -> None:
        _require(isinstance(value, (list, tuple)), value, place, "a list")
        _require(len(value) >= least, value, place, f"a list of {least} or more")
        for index, item in enumerate(value):
            one(item, f"{place}[{index}]")

    return rule


def maybe(one: Rule) -> Rule:
    """None, or what a rule allows."""

    def rule(value: Any, place: str) -> None:
        if value is not None:
            one(value, place)

    return rule
