"""Files of weights: written whole or not at all, read without running code from them."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import warnings
import zipfile
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from samdetr.util.device import memory
from samdetr.util.download import fetch
from samdetr.util.files import whole_file
from samdetr.util.foreign import damaged_record, foreign
from samdetr.util.schema import brief, tensor
from samdetr.util.slim_file import is_slim, read_slim, write_slim

SCHEMA_VERSION = 1  # of training checkpoints: raised when an older version of this project could not read them
LARGEST_FILE = 1_000_000  # values in a file, nested ones counted; those of a tensor are one
TENSOR = tensor()


def save_file(content: dict[str, Any], path: str | os.PathLike) -> None:
    """Write a plain dict that `torch.load(weights_only=True)` reads, with a `checksum` of all else in it.

    The file appears whole or not at all, and is on the disk when this returns. Raises OSError.
    """
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save({**content, "checksum": checksum(content)}, file)
        except RuntimeError as error:  # torch's writer hides the reason behind its own error
            reason = error.__context__
            if not isinstance(reason, OSError):
                raise
            raise reason from None


def save_slim(content: dict[str, Any], path: Path) -> None:
    """Write weights with settings and categories as a safetensors file that `read_file` reads, whole or not at all.

    Raises ImportError without the package safetensors, OSError.
    """
    write_slim(content, path, checksum=checksum)


def checksum(content: Any) -> str:
    """SHA-256 of the tensors and plain values in (nested) dicts and lists, in hexadecimal."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
            sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, (dict, list, tuple)):
            sha.update(f"{'dict' if isinstance(value, dict) else 'list'}{len(value)}".encode())
            for item in chain.from_iterable(value.items()) if isinstance(value, dict) else value:
                add(item)
        else:
            sha.update(f"{value!r};".encode())

    add(content)
    return sha.hexdigest()


def read_file(source: str, *, name: str, allow_http: bool = False) -> dict[str, Any]:
    """Read a dict from a file or an http(s) URL, onto the CPU.

    Besides tensors and plain values only argparse.Namespace may occur in it (official checkpoints keep their flags in
    one); anything else is refused, since unpickling it would run code. What a URL sends is kept in PyTorch's cache once
    it is complete and can be read; `allow_http` as of `fetch`.

    Raises:
        ValueError: names the argument `name`, the source and the reason.
    """
    path, where = Path(source), f"`{name}` {source}"
    if fetched := source.startswith(("http://", "https://")):
        # A folder for each URL, because many files are called checkpoint.pth.
        folder = Path(torch.hub.get_dir()) / "checkpoints" / hashlib.sha256(source.encode()).hexdigest()[:16]
        path = folder / (source.split("?")[0].rstrip("/").rsplit("/", 1)[-1] or "checkpoint.pth")
        try:
            fetch(source, path, check=partial(_read, where="it"), allow_http=allow_http)
        except ValueError as error:
            raise ValueError(f"`{name}` {error}") from None
        where += f" (kept as {path})"
    try:
        return _read(path, where)
    except ValueError:
        if fetched:
            path.unlink(missing_ok=True)  # to be fetched again the next time
        raise
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply to be read; get it again") from None
    except MemoryError:
        raise ValueError(f"{where} needs more memory than there is") from None


def _read(path: Path, where: str) -> dict[str, Any]:
    if not path.is_file():  # a device or a pipe, which may never end, is none
        raise ValueError(f"{where}: {'not a regular file; pass a file' if path.exists() else 'no such file'}")
    if path.stat().st_size > memory():
        raise ValueError(f"{where} has {path.stat().st_size / 1e9:.1f} GB, more than this machine's memory")
    try:
        what = foreign(path)
        content = None if what else _load_slim(path) if is_slim(path) else _load(path)
    except PermissionError:
        raise ValueError(f"{where} may not be read; check its permissions") from None
    except _Refused as error:
        raise ValueError(f"{where} {error}") from None
    if what:
        raise ValueError(f"{where} is {what}")
    if not isinstance(content, dict):
        raise ValueError(f"{where} holds a {type(content).__name__}, not a dict of weights")
    _measure(content, where)
    version, saved = content.get("schema_version"), content.pop("checksum", None)  # official files have neither
    if (saved is not None or version is not None) and saved != checksum(content):
        raise ValueError(f"{where} is damaged: its content does not match its checksum; get it again")
    if saved is None and zipfile.is_zipfile(path) and (record := damaged_record(path)):
        raise ValueError(f"{where} is damaged: {record} does not match its checksum; get it again")
    if version is not None and (not isinstance(version, int) or version > SCHEMA_VERSION):
        raise ValueError(
            f"{where} has schema version {brief(version)}, this version of the project reads {SCHEMA_VERSION}"
        )
    return content


class _Refused(Exception):
    """What is wrong with a file, to follow its name."""


def _load_slim(path: Path) -> dict[str, Any]:
    try:
        return read_slim(path)
    except (PermissionError, RecursionError, MemoryError):
        raise
    except ImportError as error:
        raise _Refused(f"is a safetensors file, and {error}") from None
    except Exception:  # the package, JSON and the rules raise several kinds
        raise _Refused("is cut or damaged; get it again") from None


def _load(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unusual pickles, for which an error follows
            return torch.load(path, map_location="cpu", weights_only=True)
    except (PermissionError, RecursionError, MemoryError):
        raise
    except Exception as error:  # a damaged file makes torch raise a dozen kinds, AssertionError and struct.error too
        # PyTorch's messages are paragraphs, and some recommend to load the file without this protection.
        code = re.search(r"GLOBAL ([\w.]+\w)", str(error))
        if code and code[1].startswith("numpy"):
            raise _Refused(
                f"holds values of NumPy ({code[1]}), which are not read; if you trust its author, load it with "
                "torch.load(FILE, weights_only=False), replace them (float(value), torch.from_numpy(array)), and save "
                "it again with torch.save"
            ) from None
        if code:
            raise _Refused(f"holds {code[1]}, which may run code when it is read, and is refused") from None
        raise _Refused("is cut, damaged or no file of plain weights; get it again") from None


def _measure(content: dict[str, Any], where: str) -> None:
    """Refuse tensors that are larger than what the file holds of them, and endless nesting, before any is copied.

    A view may repeat its numbers (`expand`); written out it may need any amount of memory.
    """
    waiting: list[Any] = [content]
    storages: dict[int, int] = {}
    views = seen = 0
    while waiting:
        value = waiting.pop()
        seen += 1
        if seen > LARGEST_FILE:
            raise ValueError(f"{where} holds more than {LARGEST_FILE} values; it is no checkpoint")
        if isinstance(value, dict):
            waiting += chain(value.keys(), value.values())
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif isinstance(value, argparse.Namespace):
            waiting.append(vars(value))
        elif isinstance(value, Tensor):
            TENSOR(value, f"{where}: a value")
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            if value.nbytes > storage.nbytes():
                views += value.nbytes
    if views > max(sum(storages.values()), 2**30):
        raise ValueError(
            f"{where} holds tensors of {views / 1e9:.1f} GB that repeat few numbers (views by `expand`); save them as "
            "contiguous()"
        )


# Parameters that a network has only while it trains with denoising. A file and a network fit with or without them.
TRAINING_ONLY = "decoder.denoising."


def load_weights(model: nn.Module, state: dict[str, Tensor], *, source: str) -> None:
    """Load weights that must fit entirely, except those of denoising.

    Raises:
        ValueError: lists the missing, the unexpected and the differently shaped names; nothing is loaded then.
    """
    check_weights(model, state, source=source)
    model.load_state_dict(state, strict=False)


def check_weights(model: nn.Module, state: dict[str, Tensor], *, source: str) -> None:
    """Require weights to fit a network, which may be one without memory (on the device "meta").

    Raises:
        ValueError: lists the missing, the unexpected and the differently shaped names.
    """
    own = model.state_dict()
    missing, unexpected = (
        sorted(name for name in names if not name.startswith(TRAINING_ONLY))
        for names in (own.keys() - state.keys(), state.keys() - own.keys())
    )
    shapes = [
        f"{name} {tuple(state[name].shape)} in the file, {tuple(own[name].shape)} here"
        for name in sorted(own.keys() & state.keys())
        if state[name].shape != own[name].shape
    ]
    if missing or unexpected or shapes:
        raise ValueError(
            f"{source} does not fit the network: missing {_listed(missing)}; unexpected {_listed(unexpected)}; "
            f"of another shape {_listed(shapes)}"
        )
    both = [name for name in own if name in state]
    kinds = [f"{n} {state[n].dtype}" for n in both if own[n].is_floating_point() > state[n].is_floating_point()]
    if kinds:
        raise ValueError(f"{source} does not fit the network: of another kind of numbers {_listed(kinds)}")


def require_finite(state: dict[str, Tensor], *, source: str, remedy: str = "") -> None:
    """Raises ValueError if a weight is not finite: names the first, and counts."""
    counts = {name: int((~value.isfinite()).sum()) for name, value in state.items() if value.is_floating_point()}
    bad = [name for name, count in counts.items() if count]
    if bad:
        raise ValueError(
            f"{source} holds weights that are not finite: {counts[bad[0]]} of {state[bad[0]].numel()} values of "
            f"{bad[0]}, {len(bad)} of {len(state)} tensors in all; use an earlier checkpoint{remedy}"
        )


def _listed(names: list[str], limit: int = 20) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    shown = (name if name.isprintable() else ascii(name) for name in names[:limit])
    return f"{len(names)} ({', '.join(shown)}{more})" if names else "0"
