"""Weights and what goes with them in one safetensors file, as `samdetr slim` writes it.

Plain values stand as JSON under `samdetr` in the file's metadata. Tensors that are the same one under several names are
stored once; `shared` in the JSON gives the other names.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from samdetr.util.files import whole_file
from samdetr.util.schema import each, record, text

KEY = "samdetr"
VALUES = ("schema_version", "settings", "categories")  # beside the weights, in the order of the checksum
LARGEST_HEADER = 100_000_000  # bytes, as of the package
RULE = record({"shared": each(text)})


def header(path: Path) -> dict[str, Any] | None:
    """The header of a safetensors file of whatever program; None if it is no such file. Raises OSError."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
        if not 2 <= length <= min(size - 8, LARGEST_HEADER) or file.read(1) != b"{":
            return None
        try:
            found = json.loads(b"{" + file.read(length - 1))
        except ValueError:  # not JSON, or not in UTF-8
            return None
    return found if isinstance(found, dict) else None


def is_slim(path: Path) -> bool:
    """Whether it is a safetensors file of ours. Raises OSError."""
    metadata = (header(path) or {}).get("__metadata__")
    return isinstance(metadata, dict) and KEY in metadata


def write_slim(content: dict[str, Any], path: Path, *, checksum: Callable[[Any], str]) -> None:
    """Write `model`, a dict of tensors, and VALUES, whole or not at all. Raises ImportError, OSError."""
    names: dict[tuple[Any, ...], str] = {}
    shared: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    content = _ordered(content, content["model"])
    for name, value in content["model"].items():
        first = names.setdefault(
            (value.data_ptr(), value.dtype, value.shape, value.stride(), value.numel() or name), name
        )
        if first == name:
            tensors[name] = value.detach().cpu().contiguous().clone()  # no views, which the package refuses
        else:
            shared[name] = first
    values = {name: value for name, value in content.items() if name != "model"}
    text = json.dumps({**values, "shared": shared, "checksum": checksum(content)})
    with whole_file(path) as temporary:
        # Not by save_file, whose files others may not read.
        temporary.write_bytes(_library().save(tensors, metadata={KEY: text}))


def read_slim(path: Path) -> dict[str, Any]:
    """What `write_slim` wrote, and its `checksum`. Raises ImportError without the package safetensors, and several
    kinds for a damaged file."""
    values = json.loads((header(path) or {})["__metadata__"][KEY])
    RULE(values, "")
    tensors = _library().load_file(path)
    model = {**tensors, **{name: tensors[first] for name, first in values["shared"].items()}}
    return {**_ordered(values, model), "checksum": values.get("checksum", "")}


def _ordered(values: dict[str, Any], model: dict[str, Tensor]) -> dict[str, Any]:
    """One order for files and checksums: the package sorts tensors by its own."""
    return {**{name: values[name] for name in VALUES if name in values}, "model": dict(sorted(model.items()))}


def _library() -> Any:
    try:
        return import_module("safetensors.torch")
    except ImportError:
        raise ImportError("this needs the package safetensors: pip install safetensors") from None
