"""SAM-DETR: the import name of everything here, and its public face.

In a checkout the folders beside this one (models/, datasets/, ...) are the package's own: `samdetr.models` is models/.
An installed package holds them inside.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

_CHECKOUT = Path(__file__).resolve().parents[1]
if (_CHECKOUT / "pyproject.toml").is_file() and (_CHECKOUT / "models" / "build.py").is_file():
    __path__.append(str(_CHECKOUT))

# Loaded when asked for: `import samdetr` alone imports no PyTorch.
_PUBLIC = {
    "SemanticsAligner": "samdetr.models.semantics_aligner",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
