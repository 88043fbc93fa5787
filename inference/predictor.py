"""Detect objects in images with a trained network.

predictor = load("output/run/checkpoint.pth")
found = predictor.predict("photo.jpg")
found.save("drawn.jpg")
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from samdetr.datasets.categories import Categories, checkpoint_categories
from samdetr.datasets.settings import Data
from samdetr.datasets.transforms import ByteImages, EvalTransforms
from samdetr.inference.detections import Detections, check_threshold
from samdetr.inference.engines import ExportedNetwork, is_exported, open_exported
from samdetr.inference.sources import Source, find_images
from samdetr.models.build import build_model
from samdetr.models.checkpoints import (
    INPUT_SETTINGS,
    RUN_SETTINGS,
    check_network,
    chosen_weights,
    network_settings,
    read_checkpoint,
)
from samdetr.models.detector import Detector
from samdetr.util.checkpoint import load_weights, require_finite
from samdetr.util.device import choose_device, place
from samdetr.util.padded_images import pad_images


def load(source: str, *, device: str | torch.device = "auto", raw: bool = False, allow_http: bool = False) -> Predictor:
    """A predictor from a checkpoint, a file or an http(s) URL: one of ours or an official one of a known family.

    A file that export.py wrote (.onnx, .xml, .pt2) runs in its engine.

    Args:
        device: "auto" is a GPU if there is one.
        raw: whether to take the trained weights where the file also has averaged ones (--ema).
        allow_http: whether URLs, of the file and later of images, may be http to another machine.

    Raises:
        ValueError: names the file and what is wrong with it, or the device.
    """
    source = str(source)
    if is_exported(source):
        predictor = _exported(source, device=str(device), raw=raw)
        predictor.allow_http = allow_http
        return predictor
    target = choose_device(str(device))
    checkpoint = read_checkpoint(source, name="source", allow_http=allow_http)
    trunk, config = network_settings(checkpoint["settings"])
    try:
        data = Data.pick(
            {name: checkpoint["settings"][name] for name in INPUT_SETTINGS if name in checkpoint["settings"]}
        )
    except ValueError as error:
        raise ValueError(f"{source} has settings that no network has: {error}") from None
    weights = chosen_weights(checkpoint, raw=raw)
    check_network(trunk, config, weights, source=source)
    require_finite(weights, source=source)
    network, _, postprocess = build_model(trunk, config)
    load_weights(network, weights, source=source)
    sizes = {name: getattr(data, name) for name in INPUT_SETTINGS}
    predictor = Predictor(
        network.eval(),
        postprocess=postprocess,
        categories=checkpoint_categories(checkpoint),
        settings={**trunk.flat(), **config.flat(), **sizes},
        device=target,
        source=source,
    )
    predictor.allow_http = allow_http
    predictor.run_settings = {n: v for n, v in checkpoint["run_settings"].items() if n in RUN_SETTINGS}
    return predictor


def _exported(source: str, *, device: str, raw: bool) -> Predictor:
    """A predictor of an exported file. Raises ValueError."""
    if raw:
        raise ValueError(f"`raw_weights`: {source} has the weights that it was exported with; pass its checkpoint")
    network = open_exported(source, device=device)
    return Predictor(
        network,
        postprocess=network.postprocess,
        categories=network.categories,
        settings=network.about["settings"],
        device=network.device,
        source=source,
        transforms=network.transforms,
    )


class Predictor:
    """A network with what it needs to detect: the size of its input, its classes, its device.

    Args:
        model: the detector; it is moved to `device`.
        postprocess: output of the model and original sizes (B, 2) -> scores, labels, queries, boxes of each image.
        categories: ids and names of its labels; None if they are unknown, which are then called by their numbers.
        settings: those of the network, and `eval_size` and `max_size` of its input; `num_classes` among them.
        device: where to compute.
        source: where the weights come from, for messages.
        transforms: how images are resized; None: as the settings say.

    Attributes:
        allow_http: whether URLs of images may be http to other machines.
        nms: of boxes of one class that overlap by more than this, only the best is kept; None, as published: all.
        run_settings: those of the run that made the weights that go with them, as far as they are known.
    """

    allow_http = False
    nms: float | None = None
    run_settings: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self,
        model: Detector | ExportedNetwork,
        *,
        postprocess: Callable[..., list[dict[str, Tensor]]],
        categories: Categories | None,
        settings: dict[str, Any],
        device: torch.device,
        source: str = "the network",
        transforms: Callable[[Image.Image], Any] | None = None,
    ) -> None:
        self.model, self.settings, self.device, self.source = model, settings, device, source
        place(model, device)  # in the memory format of an evaluation
        self.has_names = categories is not None
        self.categories = categories or _numbered(settings["num_classes"])
        self.transforms = transforms or EvalTransforms(
            short_side=settings["eval_size"], max_size=settings["max_size"], normalize=False
        )
        self._postprocess = postprocess
        self._labels = torch.tensor(sorted(self.categories.names))

    def __repr__(self) -> str:
        return f"<Predictor of {self.source}: {self.settings['model']}, {len(self.categories.names)} classes>"

    @overload
    def predict(
        self, images: Image.Image | np.ndarray | Tensor, *, threshold: float = 0.5, batch_size: int = 4
    ) -> Detections: ...

    @overload
    def predict(
        self, images: list[Any] | tuple[Any, ...], *, threshold: float = 0.5, batch_size: int = 4
    ) -> list[Detections]: ...

    @overload
    def predict(self, images: str | os.PathLike | Source, *, threshold: float = 0.5, batch_size: int = 4) -> Any: ...

    def predict(self, images: Any, *, threshold: float = 0.5, batch_size: int = 4) -> Any:
        """Detect objects. The model is evaluated without gradients and returns to the mode that it was in.

        Args:
            images: a file, folder, pattern such as "photos/*.jpg" or URL; a PIL image; an array (H, W, 3) of uint8 in
                RGB; a tensor (3, H, W), uint8 or floating point in [0, 1]; or a list of these.
            threshold: the least score that is kept, in [0, 1].
            batch_size: the most images at a time. Only images of equal size after resizing share a batch, so that
                no result depends on what else is in the list.

        Returns:
            `Detections` of a single image; a list of them for a folder, a pattern or a list.

        Raises:
            ValueError: an argument out of range, or an image that cannot be found or read; names it.
        """
        check_threshold(threshold)
        if batch_size < 1:
            raise ValueError(f"`batch_size` {batch_size} must be at least 1")
        sources, single = find_images(images, allow_http=self.allow_http)
        found: list[Detections | None] = [None] * len(sources)
        with _evaluating(self.model):
            for batch in self._batches(sources, batch_size):
                indices, tensors, sizes = zip(*batch)
                for index, size, result in zip(indices, sizes, self._detect(tensors, sizes)):
                    found[index] = self._detections(result, size, sources[index], threshold)
        return found[0] if single else found

    def _batches(
        self, sources: Sequence[Source], batch_size: int
    ) -> Iterator[list[tuple[int, Tensor, tuple[int, int]]]]:
        """Batches of index, transformed image and (width, height). Holds few images at a time."""
        waiting: dict[torch.Size, list[tuple[int, Tensor, tuple[int, int]]]] = {}
        for index, source in enumerate(sources):
            image = source.read()
            tensor = self.prepare(image)
            group = waiting.setdefault(tensor.shape, [])
            group.append((index, tensor, image.size))
            if len(group) == batch_size:
                yield waiting.pop(tensor.shape)
            elif sum(map(len, waiting.values())) > 4 * batch_size:
                yield waiting.pop(next(iter(waiting)))  # too many sizes: the group that has waited longest
        yield from waiting.values()

    def prepare(self, image: Image.Image) -> Tensor:
        """An image in RGB as the network takes it, uint8 (3, H, W): resized, not yet normalised."""
        return self.transforms(image).as_subclass(Tensor)

    @torch.no_grad()
    def _detect(self, tensors: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """The best detections, of whatever score; boxes in pixels of pictures of these sizes (width, height)."""
        padded = pad_images(tensors)
        images = ByteImages(padded.images, padded.padding).to(self.device)
        orig_sizes = torch.tensor([size[::-1] for size in sizes], device=self.device)
        results = self._postprocess(self.model(images), orig_sizes)
        return [{name: value.cpu() for name, value in result.items()} for result in results]

    def _detections(
        self, result: dict[str, Tensor], size: tuple[int, int], source: Source, threshold: float
    ) -> Detections:
        # As in evaluation: a class head has outputs for the gaps between category ids, too, and what is not finite
        # is no detection.
        known = torch.isin(result["labels"], self._labels)
        finite = result["scores"].isfinite() & result["boxes"].isfinite().all(1)
        keep = known & finite & (result["scores"] >= threshold)
        columns = {name: result[name][keep] for name in ("boxes", "scores", "labels", "queries")}
        found = Detections(**columns, size=size, categories=self.categories, source=source)
        return found if self.nms is None else found.without_duplicates(self.nms)


def _numbered(num_classes: int) -> Categories:
    labels = range(num_classes)
    return Categories(num_classes, dict(zip(labels, labels)), {label: str(label) for label in labels})


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; each module returns to the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
