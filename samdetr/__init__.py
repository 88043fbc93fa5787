"""SAM-DETR: the import name of everything here, and its public face.

    samdetr.load("checkpoint.pth").predict("photo.jpg").save("drawn.jpg")

In a checkout the folders beside this one belong to the package, too: `samdetr.models` is models/.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samdetr.inference.detections import Detection as Detection, Detections as Detections
    from samdetr.inference.explain import explain as explain
    from samdetr.inference.predictor import Predictor as Predictor, load as load
    from samdetr.inference.share import (
        from_pretrained as from_pretrained,
        push_to_hub as push_to_hub,
        save_pretrained as save_pretrained,
    )
    from samdetr.models.build import build_model as build_model, register as register
    from samdetr.models.family import Family as Family
    from samdetr.models.semantics_aligner import SemanticsAligner as SemanticsAligner
    from samdetr.models.settings import FamilyConfig as FamilyConfig, Loss as Loss, Trunk as Trunk
    from samdetr.training.comparison import compare_runs as compare_runs
    from samdetr.training.runs import Run as Run, read_run as read_run

__version__ = "0.2.0.dev0"

_CHECKOUT = Path(__file__).resolve().parents[1]
if (_CHECKOUT / "pyproject.toml").is_file() and (_CHECKOUT / "models" / "build.py").is_file():
    __path__.append(str(_CHECKOUT))

# Imported on first use: `import samdetr` alone imports no PyTorch.
_MODULES = {
    "inference.predictor": ("load", "Predictor"),
    "inference.detections": ("Detection", "Detections"),
    "inference.explain": ("explain",),
    "inference.share": ("from_pretrained", "push_to_hub", "save_pretrained"),
    "models.build": ("build_model", "register"),
    "models.family": ("Family",),
    "models.semantics_aligner": ("SemanticsAligner",),
    "models.settings": ("FamilyConfig", "Loss", "Trunk"),
    "training.comparison": ("compare_runs",),
    "training.runs": ("Run", "read_run"),
}
_PUBLIC = {name: f"samdetr.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
