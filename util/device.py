"""The device to compute on, and how it rounds."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from pathlib import Path

import torch
from torch import nn


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is a GPU if there is one.

    Initialises no GPU: each process of a run must choose its GPU first.

    Raises:
        ValueError: there is no such device here.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise ValueError(f"`device` {name} is no device; leave it out, or pass cpu or cuda") from None
    here = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= here.get(device.type, 0):
        raise ValueError(f"`device` {name} is not here ({torch.cuda.device_count()} GPUs); leave it out or pass cpu")
    return device


def place(network: nn.Module, device: torch.device, *, channels_last: bool | None = None) -> None:
    """Move a network to its device and memory format; `channels_last` None: on a CPU only."""
    network.to(device)
    if channels_last or (channels_last is None and device.type == "cpu"):
        # Faster convolutions: 15 % of a step of the quick start. The types of PyTorch 2.6 lack the argument.
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def set_arithmetic(*, tf32: bool, deterministic: bool) -> None:
    """Set rounding and determinism for the whole process.

    PyTorch's default lets convolutions use TF32, and matrix products not.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it
    torch.use_deterministic_algorithms(deterministic)


def memory() -> int:
    """Bytes of memory that this process may use: the machine's, or less in a container."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no container, or "max"
            found.append(int(Path(file).read_text()))
    return min(found)


def peak_memory(device: torch.device) -> int:
    """Most MiB of tensors on a GPU so far; on another device, of all memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2 ** (20 if sys.platform == "darwin" else 10)
