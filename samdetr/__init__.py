"""SAM-DETR: the import name of everything here, and its public face.

    from samdetr import load
    load("checkpoint.pth").predict("photo.jpg").save("drawn.jpg")

In a checkout the folders beside this one (models/, datasets/, ...) belong to the package: `samdetr.models` is models/.
An installed package holds them inside.
"""

from __future__ import annotations

import re
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samdetr.inference.detections import Detection, Detections
    from samdetr.inference.explain import explain
    from samdetr.inference.predictor import Predictor, load
    from samdetr.models.build import build_model, register
    from samdetr.models.family import Family
    from samdetr.models.semantics_aligner import SemanticsAligner
    from samdetr.models.settings import FamilyConfig, Loss, Trunk

_CHECKOUT = Path(__file__).resolve().parents[1]
_IN_CHECKOUT = (_CHECKOUT / "pyproject.toml").is_file() and (_CHECKOUT / "models" / "build.py").is_file()
if _IN_CHECKOUT:
    __path__.append(str(_CHECKOUT))

# Name -> its module, imported on first use: `import samdetr` alone imports no PyTorch.
_PUBLIC = {
    "load": "samdetr.inference.predictor",
    "Predictor": "samdetr.inference.predictor",
    "Detections": "samdetr.inference.detections",
    "Detection": "samdetr.inference.detections",
    "explain": "samdetr.inference.explain",
    "SemanticsAligner": "samdetr.models.semantics_aligner",
    "build_model": "samdetr.models.build",
    "register": "samdetr.models.build",
    "Family": "samdetr.models.family",
    "FamilyConfig": "samdetr.models.settings",
    "Trunk": "samdetr.models.settings",
    "Loss": "samdetr.models.settings",
}
__all__ = [
    "Detection", "Detections", "Family", "FamilyConfig", "Loss", "Predictor", "SemanticsAligner", "Trunk",
    "build_model", "explain", "load", "register",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    if name == "__version__":
        return _version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC, "__version__"])


def _version() -> str:
    """Of this code, even if another copy of it is installed."""
    if not _IN_CHECKOUT:
        return version("samdetr")
    found = re.search(r'^version = "(.+)"$', (_CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else "unknown"
