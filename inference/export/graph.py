"""The graph that is exported: a detector and its post-processing, images in, detections out."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from samdetr.models.backbone import apply_frozen_norms
from samdetr.models.detector import Detector
from samdetr.models.postprocess import best_detections
from samdetr.util.padded_images import PaddedImages

OUTPUTS = ("scores", "labels", "boxes", "queries")
RAW_OUTPUTS = ("pred_logits", "pred_boxes")
EXAMPLE = (256, 320)  # height and width that the graph of any size is traced with


class Deployed(nn.Module):
    """Normalised images -> the tensors OUTPUTS, or RAW_OUTPUTS. One input: rows and columns of zeros at the bottom and
    right of an image are its padding."""

    def __init__(self, detector: Detector, *, top_k: int, raw: bool) -> None:
        super().__init__()
        self.detector, self.top_k, self.raw = detector, top_k, raw

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """`images` (B, 3, H, W)."""
        outputs = self.detector(PaddedImages(images, find_padding(images)))
        if not self.raw:
            outputs = best_detections(outputs, top_k=self.top_k)
        return tuple(outputs[name] for name in output_names(raw=self.raw))


def output_names(*, raw: bool) -> tuple[str, ...]:
    """Of the graph."""
    return RAW_OUTPUTS if raw else OUTPUTS


def find_padding(images: Tensor) -> Tensor:
    """`images` (B, 3, H, W) -> (B, H, W), True at the rows below and the columns right of all that is not 0. Normalised
    pixels of uint8 are never 0: the mean is no multiple of 1/255. An image of zeros alone has no padding."""
    lit = (images != 0).any(1)
    rows, columns = beyond_last(lit.any(2)), beyond_last(lit.any(1))
    return rows[:, :, None] | columns[:, None]


def beyond_last(lit: Tensor) -> Tensor:
    """(B, n) -> (B, n), True after the last True; False everywhere if there is none."""
    places = torch.arange(1, lit.shape[1] + 1, device=lit.device)
    last = (lit * places).amax(1, keepdim=True)
    return (places > last) & (last > 0)


@torch.no_grad()
def trace(detector: Detector, *, top_k: int, raw: bool, size: tuple[int, int] | None) -> ExportedProgram:
    """The graph, for batches of any number of images, of the given height and width, or of any.

    Raises:
        ValueError: the network has operations that cannot be traced.
    """
    detector = copy.deepcopy(detector).to("cpu", memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    apply_frozen_norms(detector)
    images = torch.rand(2, 3, *(size or EXAMPLE)) + 0.1
    dynamic = {0: Dim.DYNAMIC} if size else {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}  # type: ignore[attr-defined]
    try:
        graph = Deployed(detector, top_k=top_k, raw=raw)
        return torch.export.export(graph, (images,), dynamic_shapes=(dynamic,), strict=False)
    except Exception as error:  # torch.export raises many kinds
        what = "of this size" if size else "of any size; a fixed `size` may do"
        raise ValueError(f"the network cannot be traced for images {what} ({_first_line(error)})") from error


def least_side(detector: Detector) -> int:
    """Pixels of the shortest side that a graph of any size takes: two cells of the coarsest level."""
    extra = len(detector.projection.levels) - len(detector.backbone.strides)
    return 2 * max(detector.backbone.strides) * 2**extra


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
