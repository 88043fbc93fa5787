"""Detectors to pass on: one file of weights with settings and classes, and folders and repositories of such files."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from samdetr.inference.predictor import Predictor, load
from samdetr.util.checkpoint import SCHEMA_VERSION, save_slim

WEIGHTS, CARD = "model.safetensors", "README.md"  # names in a folder or repository


def slim(
    source: str | Path | Predictor,
    path: str | Path,
    *,
    raw: bool = False,
    half: bool = False,
    overwrite: bool = False,
    allow_http: bool = False,
) -> Path:
    """Write a detector into one safetensors file, which `load`, --resume and --pretrained read. Returns its path.

    Args:
        source: a checkpoint, as of `load`, or a predictor.
        raw: whether to take the trained weights of a file that also has averaged ones.
        half: whether matrices and kernels are stored in 16 bits, half the size; networks compute as before.
        overwrite: whether a file that is there is replaced.
        allow_http: whether a URL may be http to another machine.

    Raises:
        ValueError: as of `load`; or the file is there, or cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} must end in .safetensors")
    if (path.exists() or path.is_symlink()) and not overwrite:
        raise ValueError(f"{path} is there already; pass `overwrite` to replace it, or another name")
    predictor = source
    if not isinstance(predictor, Predictor):
        predictor = load(str(source), device="cpu", raw=raw, allow_http=allow_http)
    content = {
        "schema_version": SCHEMA_VERSION,
        "settings": {**predictor.run_settings, **predictor.settings},
        "model": _halved(predictor.model.state_dict()) if half else predictor.model.state_dict(),
    }
    if predictor.has_names:
        content["categories"] = predictor.categories.to_list()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_slim(content, path)
    except (ImportError, OSError) as error:
        raise ValueError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from None
    return path


def _halved(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Vectors stay as they are: they are small, and variances may leave the range of 16 bits."""
    return {
        name: value.half() if value.dtype == torch.float32 and value.ndim > 1 else value
        for name, value in weights.items()
    }


def save_pretrained(source: str | Path | Predictor, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write a detector as `model.safetensors` into a folder, with a README.md if there is none. Returns the folder.

    Raises ValueError, as `slim`.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    predictor = source if isinstance(source, Predictor) else load(str(source), device="cpu")
    slim(predictor, folder / WEIGHTS, overwrite=overwrite)
    if not (folder / CARD).exists():
        (folder / CARD).write_text(_card(predictor), encoding="utf-8")
    return folder


def from_pretrained(
    source: str | Path, *, device: str = "auto", revision: str | None = None, token: str | None = None
) -> Predictor:
    """A predictor from a folder of `save_pretrained`, or from a repository OWNER/NAME of `push_to_hub`.

    A folder of that name goes first. `revision`: branch, tag or commit. `token`: for what is not public.

    Raises:
        ValueError: as of `load`; or there is neither.
    """
    path = Path(source)
    if path.is_dir():
        if not (path / WEIGHTS).is_file():
            raise ValueError(f"{path} has no {WEIGHTS}; `samdetr.save_pretrained` writes one")
        return load(str(path / WEIGHTS), device=device)
    if path.exists() or len(path.parts) != 2 or path.is_absolute():
        raise ValueError(f"{source} is neither a folder nor OWNER/NAME; pass a file to `samdetr.load`")
    try:
        file = _hub().hf_hub_download(str(source), WEIGHTS, revision=revision, token=token)
    except ImportError as error:
        raise ValueError(f"{source} is no folder, and {error}") from None
    except Exception as error:  # of the package, of the network and of the repository, a dozen kinds
        raise ValueError(f"{source} is no folder, and cannot be fetched: {_brief(error)}") from error
    return load(str(file), device=device)


def push_to_hub(
    source: str | Path | Predictor,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    message: str = "Upload a detector",
) -> str:
    """Upload what `save_pretrained` writes into the repository OWNER/NAME, made if it is not there. Returns what the
    package says about the upload, a URL.

    A README.md that the repository has stays. `private`: whether a new one is; None: as the owner's account is set.

    Raises:
        ValueError: as of `load`; the package is not installed, or refuses.
    """
    try:
        hub = _hub()
        with TemporaryDirectory() as folder:
            save_pretrained(source, folder)
            api = hub.HfApi(token=token)
            api.create_repo(repo_id, private=private, exist_ok=True)
            kept = [CARD] if api.file_exists(repo_id, CARD) else []
            done = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, ignore_patterns=kept)
    except ImportError as error:
        raise ValueError(str(error)) from None
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{repo_id} cannot be uploaded: {_brief(error)}") from error
    return str(done)


def _hub() -> Any:
    try:
        return import_module("huggingface_hub")
    except ImportError:
        raise ImportError("repositories need the package huggingface_hub: pip install huggingface_hub") from None


def _brief(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:300]


def _card(predictor: Predictor) -> str:
    names = ", ".join(predictor.categories.names.values()) if predictor.has_names else "without names"
    settings = predictor.settings
    return f"""---
library_name: samdetr
pipeline_tag: object-detection
---

A {settings["model"]} detector, backbone {settings["backbone"]}. Classes: {names}.

```python
from samdetr import from_pretrained

detections = from_pretrained("FOLDER_OR_REPOSITORY").predict("photo.jpg")
```
"""
