"""The formats: how a traced graph becomes a file."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from samdetr.inference.engines import ABOUT, need
from samdetr.inference.export import reduced
from samdetr.inference.export.reduced import Calibration


@dataclass(frozen=True)
class Format:
    """Attributes:
    suffix: of the file; its engine is found by it.
    packages: that writing and checking need.
    write: program, file and metadata, whose precision counts; images for int8, else None. Its folder is temporary.
    parts: further suffixes of files that belong to it.
    reduced: whether it may have fewer bits.
    """

    suffix: str
    packages: tuple[str, ...]
    write: Callable[[ExportedProgram, Path, dict[str, Any], Calibration | None], None]
    parts: tuple[str, ...] = ()
    reduced: bool = True


def write_onnx(program: ExportedProgram, file: Path, about: dict[str, Any], images: Calibration | None) -> None:
    _convert(program, about).save(file)
    if about["precision"] == "half":
        reduced.halve(file)
    elif images is not None:
        reduced.quantise(file, images)
    onnx = need("onnx", what="`format` onnx")
    model = onnx.load(file)
    onnx.helper.set_model_props(model, {ABOUT: json.dumps(about), **_readable(about)})
    onnx.save(model, file)


def write_openvino(program: ExportedProgram, file: Path, about: dict[str, Any], images: Calibration | None) -> None:
    """By way of ONNX, whose int8 OpenVINO reads, too."""
    openvino = need("openvino", what="`format` openvino")
    between = file.with_suffix(".onnx")
    _convert(program, about).save(between)
    if images is not None:
        reduced.quantise(between, images)
    model = openvino.Core().read_model(between)
    model.set_rt_info(json.dumps(about), [ABOUT])
    openvino.save_model(model, file, compress_to_fp16=about["precision"] == "half")
    between.unlink()


def write_torch(program: ExportedProgram, file: Path, about: dict[str, Any], images: Calibration | None) -> None:
    torch.export.save(program, file, extra_files={f"{ABOUT}.json": json.dumps(about)})


FORMATS = {
    "onnx": Format(".onnx", ("onnxruntime", "onnx", "onnxscript"), write_onnx),
    "openvino": Format(".xml", ("openvino", "onnx", "onnxscript"), write_openvino, parts=(".bin",)),
    "torch_export": Format(".pt2", (), write_torch, reduced=False),
}


def _convert(program: ExportedProgram, about: dict[str, Any]) -> Any:
    """The graph in ONNX, with names for its input, outputs and dynamic sizes."""
    names = {0: "batch"} if about["size"] else {0: "batch", 2: "height", 3: "width"}
    example = tuple(program.example_inputs[0])
    with _quiet():
        return torch.onnx.export(
            program,
            example,
            dynamo=True,
            input_names=["images"],
            output_names=list(about["outputs"]),
            dynamic_shapes=(names,),
            verbose=False,
        )


def _readable(about: dict[str, Any]) -> dict[str, str]:
    """What other programs need, an entry each: names of labels, normalisation, sizes."""
    numbers = range(about["settings"]["num_classes"])
    rows = about["categories"] or [{"label": label, "id": label, "name": str(label)} for label in numbers]
    return {
        "names": json.dumps({row["label"]: row["name"] for row in rows}),
        "category_ids": json.dumps({row["label"]: row["id"] for row in rows}),
        **{key: json.dumps(about[key]) for key in ("mean", "std", "size", "short_side", "max_size", "outputs")},
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Converters report their progress and internal notes; errors are raised."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
