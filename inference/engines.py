"""Exported files in their engines: onnxruntime, OpenVINO, torch.export."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samdetr.datasets.categories import Categories
from samdetr.datasets.transforms import FitInto
from samdetr.models.postprocess import in_pixels, postprocess
from samdetr.util.padded_images import PaddedImages

ABOUT = "samdetr"  # the key of our metadata in a file
Run = Callable[[Tensor], Sequence[Any]]  # images -> the outputs, in the order of about["outputs"]


class ExportedNetwork(nn.Module):
    """An exported file in place of a `Detector`: PaddedImages in, a dict out, which `postprocess` understands.

    Attributes:
        about: the metadata of the file; see `inference.export.command.describe`.
    """

    def __init__(self, run: Run, about: dict[str, Any], *, device: torch.device) -> None:
        super().__init__()
        self._run, self.about, self.device = run, about, device

    def forward(self, batch: PaddedImages) -> dict[str, Tensor]:
        """Images smaller than what the file takes are padded with zeros, which it knows as padding."""
        height, width = batch.images.shape[2:]
        least = self.about["least_side"]
        wanted = self.about["size"] or (max(height, least), max(width, least))
        if height > wanted[0] or width > wanted[1]:
            raise ValueError(
                f"an image of {height} x {width} is larger than the exported size, {wanted[0]} x {wanted[1]}"
            )
        images = F.pad(batch.images, (0, wanted[1] - width, 0, wanted[0] - height))
        found = self._run(images.contiguous())
        return {name: torch.as_tensor(value) for name, value in zip(self.about["outputs"], found)}

    def postprocess(self, outputs: dict[str, Tensor], orig_sizes: Tensor) -> list[dict[str, Tensor]]:
        """As `models.postprocess.postprocess`, which the graph holds already unless it was exported raw."""
        if self.about["raw"]:
            return postprocess(outputs, orig_sizes, top_k=self.about["top_k"])
        return in_pixels(outputs, orig_sizes)

    @property
    def categories(self) -> Categories | None:
        """Its classes, if the checkpoint had any."""
        rows = self.about["categories"]
        return Categories.from_list(rows, num_classes=self.about["settings"]["num_classes"]) if rows else None

    @property
    def transforms(self) -> FitInto | None:
        """How images are resized for a file of one size; None: as for the checkpoint."""
        return FitInto(*self.about["size"]) if self.about["size"] else None


def need(*packages: str, what: str) -> Any:
    """The first of these packages. Raises ValueError, with the command that installs them, if one is missing."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ValueError(f"{what} needs {', '.join(missing)}: pip install {' '.join(missing)}")
    return importlib.import_module(packages[0])


def open_onnx(file: Path, device: str) -> tuple[Run, dict[str, str], torch.device]:
    ort = need("onnxruntime", what=f"`source` {file}")
    known = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
    here = [kind for kind, provider in known.items() if provider in ort.get_available_providers()]
    kind = _choose(device, here, file, engine="onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(file), options, providers=[known[kind]])

    def run(images: Tensor) -> Sequence[Any]:
        return session.run(None, {"images": images.numpy()})

    return run, session.get_modelmeta().custom_metadata_map, torch.device("cpu")


def open_openvino(file: Path, device: str) -> tuple[Run, dict[str, str], torch.device]:
    openvino = need("openvino", what=f"`source` {file}")
    _choose(device, ["cpu"], file, engine="OpenVINO")
    core = openvino.Core()
    model = core.read_model(file)
    saved = model.get_rt_info([ABOUT]).astype(str) if model.has_rt_info([ABOUT]) else ""
    reduced = saved and json.loads(saved)["precision"] != "float32"
    options: dict[str, Any] = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    # OpenVINO would take bfloat16 unasked on processors that have it.
    wide = "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") or not reduced
    options["INFERENCE_PRECISION_HINT"] = "f32" if wide else "bf16"
    compiled = core.compile_model(model, "CPU", options)

    def run(images: Tensor) -> Sequence[Any]:
        found = compiled({"images": images.numpy()})
        return [found[output].copy() for output in compiled.outputs]

    return run, {ABOUT: saved}, torch.device("cpu")


def open_torch(file: Path, device: str) -> tuple[Run, dict[str, str], torch.device]:
    extra = {f"{ABOUT}.json": ""}
    program = torch.export.load(file, extra_files=extra)
    here = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    chosen = torch.device(_choose(device, here, file, engine="torch.export"))
    if chosen.type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, chosen)
    module = program.module()
    return (lambda images: module(images)), {ABOUT: extra[f"{ABOUT}.json"]}, chosen


def _choose(device: str, here: Sequence[str], file: Path, *, engine: str) -> str:
    """The kind of device to run on; "auto" is the last that is `here`. Raises ValueError."""
    kind = here[-1] if device == "auto" else device.split(":")[0]
    if kind not in here:
        raise ValueError(f"`device` {device}: {engine} runs {file.name} on {' or '.join(here)} here")
    return kind


# Engines by the ending of a file.
ENGINES: dict[str, Callable[[Path, str], tuple[Run, dict[str, str], torch.device]]] = {
    ".onnx": open_onnx,
    ".xml": open_openvino,
    ".pt2": open_torch,
}


def is_exported(source: str) -> bool:
    """Whether a file is one of an engine, by its ending."""
    return Path(source).suffix.lower() in ENGINES


def open_exported(source: str, *, device: str = "auto") -> ExportedNetwork:
    """The network of a file that export.py wrote, in its engine.

    Raises:
        ValueError: no such file, none of ours, one that its engine does not read, a missing package, or another device.
    """
    if "://" in source:
        raise ValueError(f"`source` {source}: exported files are read from a disk; download it first")
    file = Path(source)
    if not file.is_file():
        raise ValueError(f"`source` {source}: no such file; export.py writes one from a checkpoint")
    if file.suffix.lower() == ".xml" and not file.with_suffix(".bin").is_file():
        raise ValueError(
            f"`source` {source}: its weights, {file.with_suffix('.bin').name}, are missing; copy them, too"
        )
    try:
        run, saved, where = ENGINES[file.suffix.lower()](file, device)
    except (ValueError, MemoryError):
        raise
    except Exception as error:  # each engine has its own kinds
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"`source` {source} cannot be read ({reason}); export it again") from error
    try:
        about = json.loads(saved.get(ABOUT) or "")
    except ValueError:
        raise ValueError(f"`source` {source} was not written by export.py: it does not say what it detects") from None
    return ExportedNetwork(run, about, device=where)
