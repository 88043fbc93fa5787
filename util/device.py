"""Which device a program computes on."""

from __future__ import annotations

import torch


def choose_device(name: str) -> torch.device:
    """The device of this name; "auto" is a GPU if there is one.

    Does not initialise CUDA, because each process of a distributed run must first choose its own GPU.

    Raises:
        ValueError: no such device on this machine.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise ValueError(f"`device` {name} is no device; leave it out, or pass cpu or cuda") from None
    available = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= available.get(device.type, 0):
        raise ValueError(f"`device` {name} is not here ({torch.cuda.device_count()} GPUs); leave it out or pass cpu")
    return device
