"""From a checkpoint to an exported file: trace, write, compare, keep."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from samdetr.datasets.annotations import Annotations
from samdetr.datasets.categories import Categories
from samdetr.datasets.ground_truth import GroundTruth
from samdetr.datasets.transforms import FitInto
from samdetr.inference.engines import need
from samdetr.inference.export import gate
from samdetr.inference.export.formats import FORMATS
from samdetr.inference.export.graph import least_side, output_names, trace
from samdetr.inference.export.reduced import as_truth, average_precision
from samdetr.inference.predictor import Predictor, load
from samdetr.inference.sources import Source, find_images
from samdetr.models.checkpoints import network_settings
from samdetr.models.detector import Detector
from samdetr.util.files import write_json
from samdetr.util.logger import log
from samdetr.util.padded_images import IMAGENET_MEAN, IMAGENET_STD

CALIBRATION = 100  # images that int8 takes its scales from, at most
LARGEST = 10_000  # pixels of a side


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to export, and how.

    Attributes:
        format: a key of FORMATS.
        output: the file; "": beside the checkpoint, under its name.
        size: height and width; None: any.
        raw: without post-processing.
        half: 16-bit products.
        int8: images for 8-bit products; "": none.
        images, annotations: what fewer bits are judged by, and pictures for the comparison; "": drawn ones, or those of
            `int8`; and the network's own detections.
        most_drop: of AP, by fewer bits.
        overwrite: whether files that are there may be replaced.
    """

    format: str
    output: str = ""
    size: tuple[int, int] | None = None
    raw: bool = False
    half: bool = False
    int8: str = ""
    images: str = ""
    annotations: str = ""
    most_drop: float = 0.02
    overwrite: bool = False

    @property
    def precision(self) -> str:
        return "half" if self.half else "int8" if self.int8 else "float32"

    def check(self) -> None:
        """Raises ValueError."""
        chosen = FORMATS[self.format]
        if self.half and self.int8:
            raise ValueError("`half` and `int8` exclude each other; pass one of them")
        if self.precision != "float32" and not chosen.reduced:
            raise ValueError(f"`format` {self.format} has no `{self.precision}`; pass onnx or openvino")
        if self.precision != "float32" and self.raw:
            raise ValueError(f"`{self.precision}` is judged by detections, which `raw` has not; leave one of them out")
        if self.annotations and not (self.images or self.int8):
            raise ValueError("`annotations` needs the images that they are of: pass `images`")
        if not 0 <= self.most_drop <= 1:
            raise ValueError(f"`most_drop` {self.most_drop} is not between 0 and 1")
        if self.size and not all(1 <= side <= LARGEST for side in self.size):
            raise ValueError(f"`size` {self.size[0]} {self.size[1]}: sides go from 1 to {LARGEST} pixels")
        if chosen.packages:
            need(*chosen.packages, what=f"`format` {self.format}")

    def file(self, source: str) -> Path:
        """Where to write. Raises ValueError if something is there already."""
        suffix = FORMATS[self.format].suffix
        base = Path(source.rsplit("/", 1)[-1]) if "://" in source else Path(source)
        file = Path(self.output) if self.output else base.with_suffix(suffix)
        if file.suffix.lower() != suffix:
            raise ValueError(f"`output` {file}: a file of `format` {self.format} ends in {suffix}")
        if not file.parent.is_dir():
            raise ValueError(f"`output` {file}: there is no folder {file.parent}; make it first")
        for each in self.files(file):
            if each.exists() and (each.is_dir() or not self.overwrite):
                raise ValueError(f"`output` {each} exists; pass another `output`, or `overwrite`")
        return file

    def files(self, file: Path) -> list[Path]:
        """The file last, the parts that it needs and its report before."""
        parts = [file.with_suffix(suffix) for suffix in FORMATS[self.format].parts]
        return [*parts, report_file(file), file]


def report_file(file: Path) -> Path:
    """Of an exported file."""
    return file.with_name(f"{file.name}.json")


def export(source: str, request: Request, *, raw_weights: bool = False, allow_http: bool = False) -> dict[str, Any]:
    """Export a checkpoint, and return the report.

    The file appears if it detects what the network does, `passed` in the report; else nothing is written.

    Raises:
        ValueError: bad input, a missing package, or a network or size that cannot be exported.
    """
    request.check()
    file = request.file(source)
    predictor = load(source, device="cpu", raw=raw_weights, allow_http=allow_http)
    if not isinstance(predictor.model, Detector):
        raise ValueError(f"`source` {source} is an exported file; pass the checkpoint")
    if request.size:
        predictor.transforms = FitInto(*request.size)  # as the file is used
    calibration = find_images(request.int8)[0] if request.int8 else []
    given = find_images(request.images)[0] if request.images else calibration
    about = describe(predictor, request)
    begin = time.monotonic()
    log(f"tracing {source}")
    size = request.size
    program = trace(predictor.model, top_k=about["top_k"], raw=request.raw, size=size)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".export-") as folder:
        temporary = Path(folder) / file.name
        log(f"writing {request.format}, {request.precision}")
        prepared = [prepare(each.read(), predictor, size) for each in islice(calibration, CALIBRATION)]
        shown = gate.pictures(given)
        with _one_line(f"`format` {request.format}: the network cannot be written"):
            FORMATS[request.format].write(program, temporary, about, prepared or None)
        seconds = time.monotonic() - begin
        exported = load(str(temporary), device="cpu")
        log("comparing it with the network")
        with _one_line(f"`format` {request.format}: what was written does not run"):
            compared = gate.compare(predictor, exported, shown)
        report = {"file": file.name, "checkpoint": Path(source).name, "format": request.format, **compared.to_json()}
        report["passed"] = compared.passed
        if request.precision != "float32":
            report |= measure(predictor, exported, given, request)
        report |= {"seconds": round(seconds, 1), "bytes": sum(p.stat().st_size for p in Path(folder).iterdir())}
        report |= {"torch": torch.__version__, "metadata": about}
        if report["passed"]:
            write_json(report_file(temporary), report)
            for each in request.files(file):
                (Path(folder) / each.name).replace(each)
    return report


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turns an error of a converter or an engine, of whatever kind, into a ValueError."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{what} ({' '.join(str(error).split())[:300]})") from error


def describe(predictor: Predictor, request: Request) -> dict[str, Any]:
    """The metadata of the file: what is needed to use it, and for a Predictor."""
    settings = predictor.settings
    return {
        "version": 1,
        "model": settings["model"],
        "precision": request.precision,
        "raw": request.raw,
        "outputs": output_names(raw=request.raw),
        "colours": "RGB",
        "mean": IMAGENET_MEAN,  # of colours from 0 to 1
        "std": IMAGENET_STD,
        "size": request.size,  # height, width; null: any
        "least_side": least_side(predictor.model),  # type: ignore[arg-type]
        "short_side": settings["eval_size"],
        "max_size": settings["max_size"],
        "top_k": network_settings(settings)[1].top_k,
        "categories": predictor.categories.to_list() if predictor.has_names else None,
        "settings": {name: value for name, value in settings.items() if value is not None},
    }


def prepare(image: Image.Image, predictor: Predictor, size: tuple[int, int] | None) -> Tensor:
    """An image as the file takes it, (1, 3, H, W)."""
    (batch,) = gate.batches_of([[predictor.prepare(image)]], size)
    return batch.images


def measure(
    predictor: Predictor, exported: Predictor, given: Sequence[Source], request: Request
) -> dict[str, float | str | bool]:
    """AP of both on the same images, and whether the difference is small enough. Raises ValueError."""
    images: list[Any] = list(given) or gate.pictures()
    ids = list(range(len(images)))
    categories = predictor.categories
    if request.annotations:
        images, ids, truth = annotated(given, request.annotations, categories)
        metric, by = "AP", f"{len(images)} annotated images"
    else:
        found = predictor.predict(images, threshold=gate.THRESHOLD)
        if not any(map(len, found)):
            where = "the images" if given else "the drawn pictures"
            raise ValueError(
                f"`{request.precision}` cannot be judged, nothing above {gate.THRESHOLD} is detected in {where}; pass "
                "`images` that hold objects, or their `annotations`, too"
            )
        truth = as_truth(found, categories)
        metric, by = "AP50", f"the network's own detections above {gate.THRESHOLD} in {len(images)} images"
    before, after = (
        average_precision(side.predict(images, threshold=0), ids, truth, categories)[metric]
        for side in (predictor, exported)
    )
    return {
        "judged_by": f"{metric} by {by}",
        f"{metric}_network": before,
        f"{metric}_exported": after,
        "drop": before - after,
        "most_drop": request.most_drop,
        "passed": before - after <= request.most_drop,
    }


def annotated(
    given: Sequence[Source], file: str, categories: Categories
) -> tuple[list[Source], list[int], GroundTruth]:
    """Those of the images that an annotation file knows, their ids, and its objects. Raises ValueError."""
    annotations = Annotations.read(Path(file))
    annotations.require_valid()
    used = set(annotations.category_ids.tolist())
    categories.check_covers(Categories.from_annotations(annotations.categories, file=file), used=used, file=file)
    id_of = {Path(entry["file_name"]).name: entry["id"] for entry in annotations.images}
    images = [source for source in given if source.name in id_of]
    if not images or not used:
        raise ValueError(f"`annotations` {file} has no object, or none of the images; pass the file of these images")
    return images, [id_of[source.name] for source in images], GroundTruth.from_annotations(annotations)
