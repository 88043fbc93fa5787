"""Start from the weights of another detector: take what fits, by name and shape, and say what was taken."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from samdetr.datasets.categories import Categories, checkpoint_categories
from samdetr.datasets.settings import Data
from samdetr.models.checkpoints import chosen_weights, read_checkpoint
from samdetr.models.denoising import DenoisingQueries
from samdetr.models.detector import Detector
from samdetr.training.settings import RunSettings
from samdetr.util.checkpoint import require_finite
from samdetr.util.logger import log

# How the source saw its training images; a checkpoint that is resumed leaves this to the command line.
SEEN = ("train_sizes", "crop_augmentation")
BACKBONE = ("backbone", "backbone_norm", "dilation")
CLASS_HEAD = re.compile(r"(^|\.)class_heads?(\.\d+)?$")  # a module whose last layer has a row for each class


@dataclass(frozen=True)
class Pretrained:
    """A detector to start from: ours or an official one."""

    source: str
    checkpoint: dict[str, Any]

    @classmethod
    def read(cls, source: str, *, allow_http: bool = False) -> Pretrained:
        """From a file or URL. Raises ValueError."""
        return cls(source, read_checkpoint(source, name="pretrained", allow_http=allow_http))

    def applied(self, settings: RunSettings, given: Mapping[str, Any]) -> RunSettings:
        """The settings with the source's network and input where the user typed nothing; with its backbone alone if the
        user asked for another family. `given`: values of the flags that were typed. Raises ValueError."""
        saved = self.checkpoint["settings"]
        if given.get("model", saved["model"]) != saved["model"]:
            return settings.replace(**{name: saved[name] for name in BACKBONE if name in saved and name not in given})
        published = Data().flat()  # image sizes of a `preset` go with its network
        seen = {name: self.checkpoint["run_settings"].get(name, published[name]) for name in SEEN}
        chosen = {name: given[name] for name in ("input_proj_norm",) if name in given}
        return settings.with_checkpoint({**seen, **saved}, given).replace(**chosen)

    def weights_for(self, network: Detector, *, raw: bool, backbone: bool = True) -> dict[str, Tensor]:
        """Its weights, averaged ones preferred unless `raw`; those of the backbone if it is the same and `backbone`."""
        weights = chosen_weights(self.checkpoint, raw=raw)
        if backbone and self.checkpoint["settings"].get("backbone", network.backbone.name) == network.backbone.name:
            return weights
        return {name: weight for name, weight in weights.items() if not name.startswith("backbone.")}

    def has_backbone_of(self, network: Detector, *, raw: bool) -> bool:
        """Whether it has all weights of the network's backbone."""
        theirs = self.weights_for(network, raw=raw)
        names = {f"backbone.{name}": w.shape for name, w in network.backbone.state_dict().items()}
        return all(
            name in theirs and theirs[name].shape == shape
            for name, shape in names.items()
            if not name.endswith("num_batches_tracked")
        )

    def load_into(self, network: Detector, categories: Categories, *, raw: bool = False, backbone: bool = True) -> None:
        """Copy what fits, except the backbone unless `backbone`, and log what was copied.

        Class heads keep the rows of classes with the same name. Parameters that have a row for each query or level take
        as many rows as there are. Averaged weights are preferred unless `raw`.

        Raises:
            ValueError: nothing fits.
        """
        theirs, ours = self.weights_for(network, raw=raw, backbone=backbone), network.state_dict()
        require_finite(theirs, source=f"`pretrained` {self.source}")
        rows = class_rows(checkpoint_categories(self.checkpoint), categories)
        of_classes = set(class_parameters(network))
        counts: dict[str, Counter[str]] = {}
        seen = set()  # heads that layers share have several names
        for name, target in ours.items():
            source, classes = theirs.get(name), rows if name in of_classes else None
            copied = 0 if source is None else copy(source, target, classes, has_rows=_has_rows(name))
            if target.data_ptr() not in seen and not name.endswith("num_batches_tracked"):
                left = 0 if source is None else max(source.numel() - copied, 0)
                counts.setdefault(_part(name), Counter()).update(
                    {"loaded": copied, "new": target.numel() - copied, "left out": left}
                )
            seen.add(target.data_ptr())
        for name in theirs.keys() - ours.keys():
            counts.setdefault(_part(name), Counter()).update({"left out": theirs[name].numel()})
        loaded = {part for part, count in counts.items() if count["loaded"]}
        if not loaded:
            raise ValueError(f"`pretrained` {self.source}: nothing fits this network; leave out flags that change it")
        log(_table(self.source, counts))
        if loaded == {"backbone"}:
            log("note: nothing but the backbone fits; the rest of the network starts from random weights")
        elif rows is not None and not rows:
            log("note: none of its classes is in this data set; the class heads start anew")


def class_rows(theirs: Categories | None, ours: Categories) -> dict[int, int] | None:
    """Our label -> their label of the same name, in any letter case. None if these are the same classes, or if their
    names are unknown."""
    if theirs is None or (theirs.names == ours.names and theirs.num_classes == ours.num_classes):
        return None
    labels = {name.casefold().strip(): label for label, name in theirs.names.items()}
    names = {label: name.casefold().strip() for label, name in ours.names.items()}
    return {label: labels[name] for label, name in names.items() if name in labels}


def class_parameters(network: nn.Module) -> Iterator[str]:
    """Names of weights and biases that have a row for each class."""
    for name, module in network.named_modules(remove_duplicate=False):
        if CLASS_HEAD.search(name) and not isinstance(module, nn.ModuleList):
            *_, last = (part for part, layer in module.named_modules() if isinstance(layer, nn.Linear))
            yield from (".".join(filter(None, (name, last, kind))) for kind in ("weight", "bias"))
        elif isinstance(module, DenoisingQueries):
            yield f"{name}.labels.weight"


@torch.no_grad()
def copy(source: Tensor, target: Tensor, class_rows: Mapping[int, int] | None, *, has_rows: bool) -> int:
    """Copy what fits into `target`: these rows if given, all if the shapes are equal, and if it `has_rows`, as many as
    there are. Returns the number of elements that were copied."""
    if source.shape[1:] != target.shape[1:] or source.ndim != target.ndim:
        return 0
    if class_rows is not None:
        for row, other in class_rows.items():
            target[row] = source[other]
        return len(class_rows) * target[:1].numel()
    if source.shape == target.shape:
        target.copy_(source)
        return target.numel()
    if not has_rows:
        return 0
    number = min(len(source), len(target))
    # Of more rows than needed, some from everywhere: queries may be sorted by place.
    target[:number] = source[torch.linspace(0, len(source) - 1, number).round().long()]
    return number * target[:1].numel()


def _has_rows(name: str) -> bool:
    """Whether a parameter may have a row for each query or level: those of layers are called weight and bias."""
    return name.rpartition(".")[2] not in ("weight", "bias", "in_proj_weight", "in_proj_bias")


def _part(name: str) -> str:
    """The module that a parameter is counted with: "encoder", "decoder.layers"."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "decoder" else parts[0]


def _table(source: str, counts: Mapping[str, Counter[str]]) -> str:
    columns = ("loaded", "new", "left out")
    width = max(map(len, counts))
    lines = [f"from {source}, numbers of weights:", f"{'':{width}}" + "".join(f"{name:>14}" for name in columns)]
    for part, count in counts.items():
        lines.append(f"{part:{width}}" + "".join(f"{count[name]:14,}" for name in columns))
    return "\n".join(lines)
