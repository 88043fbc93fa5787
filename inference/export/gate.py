"""The gate: an exported file must detect what the network detects, in its engine, or there is no file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    """Every picture alone, those of one aspect ratio together, and three of unlike sizes, padded; all padded to `size`,
    if the file has one."""
    ratios = len(SHARES)
    groups = [[each] for each in tensors[ratios:]] + [list(tensors[k::ratios]) for k in range(ratios)]
    for group in [*groups, list(tensors[:ratios])]:
        padded = pad_images(group)
        if size:
            canvas = group[0].new_zeros(3, *size)  # makes the batch as large
            padded = pad_images([*group, canvas])
            padded = PaddedImages(padded.images[:-1], padded.padding[:-1])
        yield ByteImages(padded.images, padded.padding).to("cpu")


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
    """Add the detections above the threshold of one side. One agrees if the other side has the class at the place, with
    the score; one whose score is nearer to the threshold than scores may differ is there on both sides, then."""
    for row in (wanted["scores"] > THRESHOLD).nonzero()[:, 0].tolist():
        _count(agreement, wanted, row, had, had["labels"] == wanted["labels"][row], SCORE_DIFFERENCE)


def count_top(agreement: Agreement, wanted: dict[str, Tensor], had: dict[str, Tensor]) -> None:
    """Add the best detections of one side. Scores must agree relative to themselves: without training all are small.
    What is as good as the other side's last may be missing there."""
    last = had["scores"][-1]
    for row in range(len(wanted["scores"])):
        tolerance = SCORE_DIFFERENCE * wanted["scores"][row].item()
        same = (had["labels"] == wanted["labels"][row]) & (had["queries"] == wanted["queries"][row])
        if same.any() or wanted["scores"][row] > last + tolerance:
            _count(agreement, wanted, row, had, same, tolerance)


def _count(
    agreement: Agreement, wanted: dict[str, Tensor], row: int, had: dict[str, Tensor], same: Tensor, tolerance: float
) -> None:
    """Add one detection; `same` says which ones of the other side it may be."""
    agreement.compared += 1
    if not same.any():
        agreement.least_iou = 0.0
        return
    box, boxes = wanted["boxes"][row], had["boxes"][same]
    equal = (boxes - box).abs().amax(1) < SMALLEST  # of boxes without area there is no IoU
    overlaps = box_iou(box[None], boxes)[0].nan_to_num(0).masked_fill(equal, 1)
    differences = (had["scores"][same] - wanted["scores"][row]).abs().nan_to_num(1)
    fits = (overlaps >= LEAST_IOU) & (differences <= tolerance)
    best = int((overlaps - differences + 2 * fits).argmax())
    agreement.agreed += bool(fits[best])
    agreement.least_iou = min(agreement.least_iou, overlaps[best].item())
    agreement.largest_score_difference = max(agreement.largest_score_difference, differences[best].item())
