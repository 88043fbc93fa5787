"""Files of weights: checkpoints of ours and official ones, and pretrained backbones."""

import argparse
from collections.abc import Sequence
from http.client import HTTPException
from typing import Any

import torch
from torch import Tensor

from samdetr.models.build import FAMILIES, build_model
from samdetr.models.detector import Detector
from samdetr.models.settings import FamilyConfig, Trunk
from samdetr.util.checkpoint import check_weights, read_file
from samdetr.util.device import memory
from samdetr.util.download import socket_timeout
from samdetr.util.foreign import kept_elsewhere
from samdetr.util.logger import log
from samdetr.util.schema import anything, brief, each, listed, maybe, number, record, tensor, text
from samdetr.util.settings import flags

_STATE_RULE = each(tensor())
_CATEGORY_RULE = record(
    {"label": number(least=0, most=10**6), "id": number(least=-(2**63), most=2**63 - 1), "name": text}
)
# What the keys of a checkpoint hold, if they are there. What only training reads: training.state.RULES.
RULES = record(
    {},
    optional={
        "ema": maybe(record({"model": _STATE_RULE})),
        "settings": each(anything),
        "categories": listed(_CATEGORY_RULE, least=1),
        "epoch": number(least=0, most=10**9),
    },
)
# Settings of the network's input in evaluation, which a checkpoint also brings.
INPUT_SETTINGS = ("eval_size", "max_size")
# Settings of a run that go with its weights: evaluation repeats some, fine-tuning others. None names a place or a host.
RUN_SETTINGS = ("batch_size", "pad_to_multiple", "amp", "world_size", "train_sizes", "crop_augmentation")


def read_checkpoint(source: str, *, name: str = "resume", allow_http: bool = False) -> dict[str, Any]:
    """A checkpoint of ours, or an official one under our names, from a file or an http(s) URL.

    Args:
        source: file or URL.
        name: of the argument whose value is `source`, for messages.
        allow_http: whether a URL may be http to another machine.

    Returns:
        A dict with at least `model` (weights), `settings` (those that shape the network and its input, as far as the
        file or its weights hold them), `run_settings` (all of the run that made the file, if it is ours) and
        `official`.

    Raises:
        ValueError: no checkpoint, a damaged one, one that holds code, or one of a network that is not built here.
    """
    return _understood(read_file(source, name=name, allow_http=allow_http), source=source, name=name)


def _understood(checkpoint: dict[str, Any], *, source: str, name: str) -> dict[str, Any]:
    """What `read_checkpoint` makes of the content of a file. Raises ValueError."""
    where = f"`{name}` {source}"
    state = checkpoint.get("model")
    if bare := not isinstance(state, dict) and _is_state(checkpoint):
        checkpoint, state = {"model": checkpoint}, checkpoint
    if not isinstance(state, dict) or not _is_state(state):
        what = kept_elsewhere(checkpoint)
        found = f"is {what}: save them alone, as {{'model': ...}}" if what else "holds no weights under 'model'"
        raise ValueError(
            f"{where} {found} (it has {sorted(map(str, checkpoint))[:8]}); pass a checkpoint of this project or an "
            "official one"
        )
    state = _without_prefix(state)
    try:
        RULES(checkpoint, "")
        _STATE_RULE(state, "'model'")
    except ValueError as error:
        raise ValueError(f"{where} is no checkpoint that can be used: {error}; pass another one") from None
    saved = checkpoint.get("settings", {})
    if isinstance(checkpoint.get("args"), argparse.Namespace):
        saved = vars(checkpoint["args"])
    official = next((family for family in FAMILIES.values() if family.is_official(state)), None)
    likely = None if official or saved else _family_of(state)
    if bare and not official and not likely:
        raise ValueError(
            f"{where} holds no weights under 'model' (it has {sorted(state)[:8]}), and is no bare state dict of a "
            "network here; pass a checkpoint of this project or an official one"
        )
    # Early checkpoints predate --model.
    model = official.name if official else likely or saved.get("model", "sam_detr")
    if not isinstance(model, str) or model not in FAMILIES:
        raise ValueError(
            f"{where} holds a {brief(model)}, and the families here are {', '.join(FAMILIES)}; if a plugin "
            f"registers {brief(model)}, pass it with `plugin`"
        )
    if not official and not saved:
        what = "is a bare state dict" if bare else "has weights"
        log(f"note: {source} {what} of a {model}, without settings: flags and defaults say how it is built")
    family = FAMILIES[model]
    state = family.convert_official(state) if official else state
    kept = [n for kind in (Trunk, family.config) for n, declared in flags(kind) if declared.carried]
    settings = {n: saved[n] for n in (*kept, *INPUT_SETTINGS) if n in saved}
    shown = family.from_weights(state)
    if "schema_version" not in checkpoint:
        family.check_official({**shown, **saved}, where=where)
    settings |= shown | {"model": model}
    try:
        network_settings(settings)
        check_labels(checkpoint.get("categories", ()), settings.get("num_classes"))
    except ValueError as error:
        raise ValueError(f"{where} has settings that no network has: {error}; pass another checkpoint") from None
    run_settings = saved if "schema_version" in checkpoint else {}
    return {
        **checkpoint,
        "model": state,
        "settings": settings,
        "run_settings": run_settings,
        "official": official is not None,
    }


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(each, Tensor) for each in value.values())


def _without_prefix(state: dict[Any, Tensor]) -> dict[Any, Tensor]:
    """Names without what DataParallel, torch.compile and others put before all of them."""
    for prefix in ("module.", "_orig_mod.", "model."):
        while all(isinstance(name, str) and name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _family_of(state: dict[str, Tensor]) -> str | None:
    """The family whose network has most of these names; None if none has any."""
    shared = {}
    for family in FAMILIES.values():
        with torch.device("meta"):
            shared[family.name] = len(build_model(family.trunk())[0].state_dict().keys() & state.keys())
    best = max(shared, key=lambda name: shared[name])
    return best if shared[best] else None


def check_labels(categories: Sequence[dict[str, Any]], num_classes: int | None) -> None:
    """Require labels that are distinct, as are the ids, and outputs of the class heads. Raises ValueError."""
    for kind in ("label", "id"):
        values = [row[kind] for row in categories]
        if len(set(values)) < len(values):
            raise ValueError(f"'categories' has a {kind} twice")
    largest = max((row["label"] for row in categories), default=0)
    if num_classes is not None and largest >= num_classes:
        raise ValueError(f"'categories' has the label {largest}, the weights have {num_classes} classes")


def check_network(trunk: Trunk, config: FamilyConfig, state: dict[str, Tensor], *, source: str) -> None:
    """Require weights to be those of the network of these settings, before it takes memory. Raises ValueError."""
    if trunk.enc_layers + trunk.dec_layers > len(state):
        raise ValueError(
            f"{source} does not fit the network: `enc_layers` {trunk.enc_layers} and `dec_layers` {trunk.dec_layers} "
            f"are more layers than it has tensors, {len(state)}"
        )
    try:
        network = _without_memory(trunk, config)
    except ValueError as error:
        raise ValueError(f"{source} does not fit the network: {error}") from None
    if network:
        check_weights(network, state, source=source)


def check_memory(trunk: Trunk, config: FamilyConfig) -> None:
    """Require memory for the network of these settings, before it is built. Raises ValueError."""
    network = _without_memory(trunk, config)
    need = sum(value.nbytes for value in network.state_dict().values()) if network else 0
    if need > memory():
        raise ValueError(
            f"a network of `hidden_dim` {trunk.hidden_dim}, `dim_feedforward` {trunk.dim_feedforward}, `enc_layers` "
            f"{trunk.enc_layers}, `dec_layers` {trunk.dec_layers} and `num_queries` {trunk.num_queries} takes "
            f"{need / 1e9:.1f} GB, this machine has {memory() / 1e9:.1f} GB; make it smaller"
        )


def _without_memory(trunk: Trunk, config: FamilyConfig) -> Detector | None:
    """The network on the device "meta"; None for a family from outside that needs numbers to be built."""
    try:
        with torch.device("meta"):
            return build_model(trunk, config)[0]
    except (NotImplementedError, RuntimeError):
        return None


def network_settings(saved: dict[str, Any]) -> tuple[Trunk, FamilyConfig]:
    """The settings that shape the network of a checkpoint: `saved` (`settings` of `read_checkpoint`), else the family's
    published ones. Raises ValueError."""
    family = FAMILIES[saved["model"]]
    return family.trunk(**saved), family.config.pick({**family.defaults, **saved})


def chosen_weights(checkpoint: dict[str, Any], *, raw: bool = False) -> dict[str, Tensor]:
    """The weights for detection: the averaged ones if the file has them, unless `raw`."""
    if raw or not checkpoint.get("ema"):
        return checkpoint["model"]
    return _without_prefix(checkpoint["ema"]["model"])


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
            with socket_timeout():
                state = detector.backbone.imagenet_weights()
        except (OSError, HTTPException, RuntimeError) as error:  # no network, no space, a proxy's refusal or own page
            raise ValueError(
                f"cannot fetch the ImageNet weights of {name} ({error}); download {detector.backbone.weights_url} "
                "elsewhere and pass it with `backbone_weights` FILE, or train from scratch with `backbone_weights` none"
            ) from None
    else:
        state = read_file(source, name="backbone_weights")
        if isinstance(state.get("model"), dict):  # a detector: its backbone
            weights = chosen_weights(_understood(state, source=source, name="backbone_weights"))
            prefix = "backbone.body."
            state = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    try:
        detector.backbone.load_classifier_weights(state)
    except ValueError as error:
        raise ValueError(f"`backbone_weights` {source} does not fit `backbone` {name}: {error}") from None
