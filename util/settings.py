"""Settings as frozen dataclasses: one line declares a flag, its default, its range and its help text.

    @dataclass(frozen=True, kw_only=True)
    class Trunk(Settings):
        hidden_dim: int = flag(256, "width of the transformer", least=1)

`cli.py` derives the command line from the fields. Errors name a field in backticks; programs print it as a flag.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from samdetr.util.schema import brief

S = TypeVar("S", bound="Settings")


@dataclass(frozen=True, kw_only=True)
class Flag:
    """What the command line and the checks know of a field."""

    help: str  # one phrase
    least: float | None = None
    most: float | None = None
    below: float | None = None  # the smallest value that is too large
    choices: tuple[str | int, ...] | None = None
    metavar: str | None = None  # what stands for the value in `--help`
    on: tuple[str, ...] = ()  # further spellings; of a switch, those that turn it on ...
    off: tuple[str, ...] = ()  # ... and off
    carried: bool = False  # a checkpoint brings its value, since it shapes the network or its input
    hidden: bool = False  # there is no such flag: programs set the field


def flag(default: Any, help: str, **options: Any) -> Any:
    """A field of a settings class; `options` as of `Flag`."""
    return field(default=default, metadata={"flag": Flag(help=help, **options)})


def with_default(settings: type, name: str, default: Any) -> Any:
    """The field `name` of another settings class with another default, for a subclass."""
    (found,) = (each for each in dataclasses.fields(settings) if each.name == name)
    return field(default=default, metadata=found.metadata)


def flags(settings: type | Settings) -> Iterator[tuple[str, Flag]]:
    """Names and flags of the fields of a settings class."""
    for each in dataclasses.fields(settings):
        if "flag" in each.metadata:
            yield each.name, each.metadata["flag"]


@functools.cache
def _hints(settings: type) -> dict[str, Any]:
    return typing.get_type_hints(settings)


def may_be_none(settings: type, name: str) -> bool:
    """Whether a field may be unset: `int | None`."""
    return type(None) in typing.get_args(_hints(settings)[name])


def value_type(settings: type, name: str) -> tuple[type, bool]:
    """The type of one value of a field, and whether the field holds several: `tuple[int, ...]` -> (int, True)."""
    hint = _hints(settings)[name]
    if isinstance(hint, types.UnionType):  # `int | None`
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base class. Construction checks every value against its flag.

    Raises:
        ValueError: names the field, the value and what is allowed.
    """

    def __post_init__(self) -> None:
        for name, declared in flags(self):
            value, (kind, several) = getattr(self, name), value_type(type(self), name)
            if isinstance(value, list):
                object.__setattr__(self, name, value := tuple(value))
            if isinstance(value, tuple) != several:
                raise ValueError(
                    f"`{name}` {brief(value)} is not {'a list' if several else _KINDS.get(kind, 'a value')}"
                )
            if value is None and may_be_none(type(self), name):
                continue
            for single in value if several else (value,):
                _check_type(name, single, kind)
                _check(name, single, declared)

    @classmethod
    def pick(cls: type[S], values: Mapping[str, Any]) -> S:
        """From a flat dict that may hold other classes' fields, too."""
        return cls(**{name: values[name] for name in cls.__dataclass_fields__ if name in values})

    def flat(self) -> dict[str, Any]:
        """Plain values by name, for checkpoints and JSON."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}


def _check_type(name: str, value: Any, kind: type) -> None:
    """Values of files and of Python have whatever type; those of a command line have the right one."""
    wanted = {int: numbers.Integral, float: numbers.Real}.get(kind, kind)
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"`{name}` {brief(value)} is not {_KINDS.get(kind, f'a {kind.__name__}')}")


def _check(name: str, value: Any, declared: Flag) -> None:
    if declared.choices and value not in declared.choices:
        raise ValueError(f"`{name}` {brief(value)} is none of {', '.join(map(str, declared.choices))}")
    # Written so that NaN is refused, too.
    if declared.least is not None and not value >= declared.least:
        raise ValueError(f"`{name}` {brief(value)} must be at least {declared.least:g}")
    if declared.most is not None and not value <= declared.most:
        raise ValueError(f"`{name}` {brief(value)} must be at most {declared.most:g}")
    if declared.below is not None and not value < declared.below:
        raise ValueError(f"`{name}` {value} must be less than {declared.below:g}")
    if isinstance(value, (int, float)) and not abs(value) < sys.float_info.max:
        raise ValueError(f"`{name}` {brief(value)} is not finite")
