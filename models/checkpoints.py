"""Files of weights: checkpoints of ours and official ones, and pretrained backbones."""

import argparse
from http.client import HTTPException
from typing import Any

from torch import Tensor

from samdetr.models.build import FAMILIES
from samdetr.models.detector import Detector
from samdetr.models.settings import FamilyConfig, Trunk
from samdetr.util.checkpoint import read_file
from samdetr.util.settings import flags

# Settings of the network's input in evaluation, which a checkpoint also brings.
INPUT_SETTINGS = ("eval_size", "max_size")


def read_checkpoint(source: str, *, name: str = "resume") -> dict[str, Any]:
    """A checkpoint of ours, or an official one under our names, from a file or an http(s) URL.

    Args:
        source: file or URL.
        name: of the argument whose value is `source`, for messages.

    Returns:
        A dict with at least `model` (weights), `settings` (those that shape the network and its input, as far as the
        file or its weights hold them), `run_settings` (all of the run that made the file, if it is ours) and
        `official`.

    Raises:
        ValueError: no checkpoint, a damaged one, one that holds code, or one of a network that is not built here.
    """
    checkpoint = read_file(source, name=name)
    state = checkpoint.get("model")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"`{name}` {source} holds no weights under 'model' (it has {sorted(map(str, checkpoint))[:8]}); "
            "pass a checkpoint of this project or an official one"
        )
    saved = checkpoint.get("settings", {})
    if isinstance(checkpoint.get("args"), argparse.Namespace):
        saved = vars(checkpoint["args"])
    official = next((family for family in FAMILIES.values() if family.is_official(state)), None)
    model = official.name if official else saved.get("model", "sam_detr")  # early checkpoints predate --model
    if model not in FAMILIES:
        raise ValueError(
            f"`{name}` {source} holds a {model}, and the families here are {', '.join(FAMILIES)}; if a plugin "
            f"registers {model}, pass it with `plugin`"
        )
    family = FAMILIES[model]
    state = family.convert_official(state) if official else state
    kept = [n for kind in (Trunk, family.config) for n, declared in flags(kind) if declared.carried]
    settings = {n: saved[n] for n in (*kept, *INPUT_SETTINGS) if n in saved}
    shown = family.from_weights(state)
    family.check_official({**shown, **saved}, where=f"`{name}` {source}")
    settings |= shown | {"model": model}
    run_settings = saved if "schema_version" in checkpoint else {}
    return {
        **checkpoint,
        "model": state,
        "settings": settings,
        "run_settings": run_settings,
        "official": official is not None,
    }


def network_settings(saved: dict[str, Any]) -> tuple[Trunk, FamilyConfig]:
    """The settings that shape the network of a checkpoint: `saved` (`settings` of `read_checkpoint`), else the family's
    published ones. Raises ValueError."""
    family = FAMILIES[saved["model"]]
    return family.trunk(**saved), family.config.pick({**family.defaults, **saved})


def chosen_weights(checkpoint: dict[str, Any], *, raw: bool = False) -> dict[str, Tensor]:
    """The weights for detection: the averaged ones if the file has them, unless `raw`."""
    if raw or not checkpoint.get("ema"):
        return checkpoint["model"]
    return checkpoint["ema"]["model"]


def load_backbone_weights(detector: Detector, source: str) -> None:
    """Pretrained weights: "imagenet" (of torchvision or timm, downloaded if needed) or a file; "none": no change.

    Raises:
        ValueError: weights that cannot be fetched or do not fit; says how to get and pass a file.
    """
    if source == "none":
        return
    name = detector.backbone.name
    if source == "imagenet":
        try:
            state = detector.backbone.imagenet_weights()
        except (OSError, HTTPException, RuntimeError) as error:  # no network, no space, a proxy's refusal or own page
            raise ValueError(
                f"cannot fetch the ImageNet weights of {name} ({error}); download {detector.backbone.weights_url} "
                "elsewhere and pass it with `backbone_weights` FILE, or train from scratch with `backbone_weights` none"
            ) from None
    else:
        state = read_file(source, name="backbone_weights")
        if isinstance(state.get("model"), dict):  # a detector: its backbone
            weights = chosen_weights(read_checkpoint(source, name="backbone_weights"))
            prefix = "backbone.body."
            state = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    try:
        detector.backbone.load_classifier_weights(state)
    except ValueError as error:
        raise ValueError(f"`backbone_weights` {source} does not fit `backbone` {name}: {error}") from None
