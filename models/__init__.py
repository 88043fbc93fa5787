"""The published networks. `samdetr.models.build.build_model` makes one."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name in ("build_model", "register"):  # looked up late: a part of a network needs no table of all families
        from samdetr.models import build

        return getattr(build, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
