"""What a file is that is no checkpoint, by its first bytes, and what to do with it."""

from __future__ import annotations

import zipfile
from pathlib import Path

from samdetr.util.slim_file import header, is_slim

_BEGINNINGS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`",
    b"\x1f\x8b": "compressed by gzip; unpack it",
    b"BZh": "compressed by bzip2; unpack it",
    b"\xfd7zXZ\x00": "compressed by xz; unpack it",
    b"7z\xbc\xaf'\x1c": "a 7z archive; unpack it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file, such as of Keras, which holds no weights of PyTorch",
    b"\x93NUMPY": "a NumPy array, not a checkpoint of PyTorch",
    b"GGUF": "a GGUF file, not a checkpoint of PyTorch",
    b"\xff\xd8\xff": "a JPEG picture",
    b"\x89PNG": "a PNG picture",
    b"%PDF": "a PDF document",
    b"\x7fELF": "a program or library",
}


def foreign(path: Path) -> str | None:
    """What the file is and the way out, if it is recognised as no checkpoint. Raises OSError."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(1024)
    for beginning, what in _BEGINNINGS.items():
        if head.startswith(beginning):
            return what
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a page of a web site (HTML), such as a request to log in or to wait; fetch the file itself"
    if head[8:9] == b"{" and not is_slim(path) and header(path) is not None:
        return (
            'a safetensors file; convert it: python -c "import torch; from safetensors.torch import load_file; '
            f"torch.save({{'model': load_file('{path.name}')}}, 'weights.pth')\""
        )
    if start.startswith((b"{", b"[")):
        return "JSON, not a checkpoint"
    if head.startswith(b"PK"):
        return _foreign_archive(path, size)
    return None


def _foreign_archive(path: Path, size: int) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except Exception:  # cut or damaged, in one of many ways; reading it says so
        return None
    names = {record.filename.partition("/")[2] for record in records}
    if any(name.startswith("code/") for name in names):
        return "a TorchScript program; pass the checkpoint that it was made from"
    if "data.pkl" not in names:
        arrays = any(record.filename.endswith(".npy") for record in records)
        return "a file of NumPy arrays" if arrays else "a zip archive without weights of PyTorch; unpack it"
    claimed = sum(record.file_size for record in records)
    if claimed > 4 * size + 2**20:
        return f"of {size / 1e6:.1f} MB and would take {claimed / 1e9:.1f} GB when read; get it from another place"
    return None


def damaged_record(path: Path) -> str | None:
    """The name of the first record of a zip file whose content differs from its checksum (CRC-32)."""
    with zipfile.ZipFile(path) as archive:
        if not any(record.CRC for record in archive.infolist()):
            return None  # written without
        try:
            return archive.testzip()
        except Exception:  # zlib.error and others
            return "its directory"


def kept_elsewhere(content: dict) -> str | None:
    """Where the weights of other programs' checkpoints are, and what they are called."""
    if "pytorch-lightning_version" in content:
        return "a PyTorch Lightning checkpoint, with weights under 'state_dict'"
    names = {
        "ema": ("ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema", "shadow_params"),
        "other": ("state_dict", "model_state_dict", "net", "network", "module", "weights", "params"),
    }
    for kind, keys in names.items():
        for key in keys:
            if isinstance(content.get(key), dict) and content[key]:
                what = "averaged weights (EMA)" if kind == "ema" else "weights"
                return f"a checkpoint of another program, with {what} under {key!r}"
    return None
