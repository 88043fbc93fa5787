"""The gate: an exported file must detect what the network detects, in its engine, or there is no file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou

from samdetr.datasets.shapes import draw_image
from samdetr.datasets.transforms import ByteImages
from samdetr.inference.engines import ExportedNetwork
from samdetr.inference.predictor import Predictor
from samdetr.inference.sources import Source
from samdetr.models.postprocess import best_detections
from samdetr.util.padded_images import PaddedImages, pad_images

THRESHOLD = 0.3  # detections with a higher score must agree
LEAST_IOU, LEAST_AGREEMENT = 0.99, 0.999
SCORE_DIFFERENCE = 1e-3
SMALLEST = 1e-5  # of the image's sides: coordinates that differ by less are equal
SHARES = ((1.0, 0.75), (0.75, 1.0), (0.5, 1.0))  # height and width of the pictures: three aspect ratios
PICTURES = 9  # three of each


@dataclass
class Agreement:
    """How many detections of one side the other has, too, and by how much the others miss."""

    compared: int = 0
    agreed: int = 0
    least_iou: float = 1.0
    largest_score_difference: float = 0.0

    @property
    def share(self) -> float:
        return self.agreed / self.compared if self.compared else 0.0


@dataclass
class Comparison:
    """Both sides on the same batches: detections `above` the threshold, and the best of each image (`top`), whatever
    their scores."""

    above: Agreement = field(default_factory=Agreement)
    top: Agreement = field(default_factory=Agreement)
    images: int = 0
    shapes: list[str] = field(default_factory=list)  # of the batches

    @property
    def passed(self) -> bool:
        """A network without a detection above the threshold is judged by its best ones."""
        return (self.above if self.above.compared else self.top).share >= LEAST_AGREEMENT

    def to_json(self) -> dict[str, Any]:
        judged, by = self.above, f"detections above {THRESHOLD}"
        if not judged.compared:
            judged, by = (
                self.top,
                f"best detections, none above {THRESHOLD}, scores to {SCORE_DIFFERENCE} of them",
            )
        return {
            "judged_by": by,
            "detections": judged.compared,
            "agreement": judged.share,
            "least_iou": judged.least_iou,
            "largest_score_difference": judged.largest_score_difference,
            "top_detections": self.top.compared,
            "top_agreement": self.top.share,
            "images": self.images,
            "batches": self.shapes,
        }


def pictures(given: Sequence[Source] = ()) -> list[Image.Image]:
    """PICTURES pictures of three aspect ratios, cut from those `given`, or drawn."""
    if given:
        whole = [source.read() for source in islice(given, PICTURES)]
    else:
        drawn = [draw_image(seed=0, split="val", index=index, size=256)[0] for index in range(PICTURES)]
        whole = [Image.fromarray(pixels) for pixels in drawn]
    return [_cut(whole[index % len(whole)], *SHARES[index % len(SHARES)]) for index in range(PICTURES)]


def _cut(picture: Image.Image, height: float, width: float) -> Image.Image:
    """The largest part with this ratio of height to width, in the middle."""
    scale = min(picture.height / height, picture.width / width)
    sides = [max(1, round(scale * share)) for share in (width, height)]
    left, top = (picture.width - sides[0]) // 2, (picture.height - sides[1]) // 2
    return picture.crop((left, top, left + sides[0], top + sides[1]))


def batches(tensors: Sequence[Tensor], size: tuple[int, int] | None) -> Iterator[PaddedImages]:
    """Six pictures alone, those of one aspect ratio together, and three of unlike sizes."""
    ratios = len(SHARES)
    alone = [[each] for each in tensors[ratios:]]
    return batches_of([*alone, *(tensors[k::ratios] for k in range(ratios)), tensors[:ratios]], size)


def batches_of(groups: Iterable[Sequence[Tensor]], size: tuple[int, int] | None) -> Iterator[PaddedImages]:
    """Each group of images (3, H_i, W_i) of uint8 normalised and padded to one size, `size` if the file has one."""
    for group in groups:
        canvas = [] if size is None else [group[0].new_zeros(3, *size)]
        padded = pad_images([*group, *canvas])
        yield ByteImages(padded.images[: len(group)], padded.padding[: len(group)]).to("cpu")


@torch.no_grad()
def compare(reference: Predictor, exported: Predictor, images: Sequence[Image.Image]) -> Comparison:
    """Run both on the same batches. `reference` has the network; its device is where it runs."""
    network = exported.model
    assert isinstance(network, ExportedNetwork)
    found, about = Comparison(), network.about
    for batch in batches([exported.prepare(image) for image in images], about["size"]):
        expected = reference.model(batch.to(reference.device))
        actual = network(batch.to(exported.device))
        found.images += len(batch.images)
        found.shapes.append(" x ".join(map(str, batch.images.shape)))
        if about["raw"]:
            actual = best_detections(actual, top_k=about["top_k"])
        expected = best_detections(expected, top_k=about["top_k"])
        for index in range(len(batch.images)):
            pair = [{name: value[index].cpu() for name, value in side.items()} for side in (expected, actual)]
            count_above(found.above, *pair)
            count_above(found.above, *reversed(pair))
            count_top(found.top, *pair)
            count_top(found.top, *reversed(pair))
    return found


def count_above(agreement: Agreement, wanted: dict[str, Tensor], had: dict[str, Tensor]) -> None:
    """Add the detections above the threshold of one side. One agrees if the other side has its class at its place with
    its score, which may lie below the threshold there."""
    chosen = wanted["scores"] > THRESHOLD
    same = wanted["labels"][:, None] == had["labels"]
    _count(agreement, wanted, had, chosen, same, torch.full_like(wanted["scores"], SCORE_DIFFERENCE))


def count_top(agreement: Agreement, wanted: dict[str, Tensor], had: dict[str, Tensor]) -> None:
    """Add the best detections of one side. Scores must agree relative to themselves: without training all are small.
    What is only as good as the other side's last may be missing there."""
    tolerances = SCORE_DIFFERENCE * wanted["scores"]
    same = (wanted["labels"][:, None] == had["labels"]) & (wanted["queries"][:, None] == had["queries"])
    chosen = same.any(1) | (wanted["scores"] > had["scores"][-1] + tolerances)
    _count(agreement, wanted, had, chosen, same, tolerances)


def _count(
    agreement: Agreement,
    wanted: dict[str, Tensor],
    had: dict[str, Tensor],
    chosen: Tensor,
    same: Tensor,
    tolerances: Tensor,
) -> None:
    """Add the `chosen` (n,) of n detections; `same` (n, m) says which of the other side's each may be."""
    if not chosen.any():
        return
    overlaps = box_iou(wanted["boxes"], had["boxes"]).nan_to_num(0)
    equal = (wanted["boxes"][:, None] - had["boxes"]).abs().amax(2) < SMALLEST  # without area there is no IoU
    overlaps = overlaps.masked_fill(equal, 1).masked_fill(~same, 0)
    differences = (wanted["scores"][:, None] - had["scores"]).abs().nan_to_num(1).masked_fill(~same, 1)
    fits = (overlaps >= LEAST_IOU) & (differences <= tolerances[:, None]) & same
    best = (overlaps - differences + 2 * fits).argmax(1, keepdim=True)  # of the other side, for each
    fit, overlap, difference = (each.gather(1, best)[chosen, 0] for each in (fits, overlaps, differences))
    agreement.compared += len(fit)
    agreement.agreed += int(fit.sum())
    agreement.least_iou = min(agreement.least_iou, overlap.min().item())
    agreement.largest_score_difference = max(agreement.largest_score_difference, difference.max().item())
