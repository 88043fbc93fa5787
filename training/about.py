"""What a run was made with, for settings.json."""

from __future__ import annotations

import hashlib
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from samdetr.datasets.settings import Data
from samdetr.datasets.sources import find_split
from samdetr.training.state import versions

_PROJECT = Path(__file__).resolve().parents[1]


def about(*, device: torch.device, data: Data) -> dict[str, Any]:
    """Command line, commit, versions, device, and hashes of the annotation files of `data`."""
    commit = _git("rev-parse", "HEAD")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    sources = [source for split in ("train", "val") if (source := find_split(split, data))]
    files = [source.file for source in sources if source.file.is_file()]
    return {
        "command": f"{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}",  # "samdetr train" is one word there
        "commit": commit,
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")) if commit else None,
        "versions": versions(),
        "device": f"{device.type}, {name}",
        "annotations_sha256": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
    }


def _git(*words: str) -> str | None:
    """Output of git in the project's checkout; None if this is none."""
    if not (_PROJECT / ".git").exists():
        return None
    try:
        run = subprocess.run(["git", "-C", str(_PROJECT), *words], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None
