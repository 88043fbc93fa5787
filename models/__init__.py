"""The published networks. `build_model` makes one; `register` adds a family from outside."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name not in ("build_model", "register"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from samdetr.models import build  # late: a part of a network needs no table of all families

    return getattr(build, name)
