"""What the programs that measure say about the machine, and how they write it."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path


def surroundings(*, packages: Sequence[str], device: str, threads: int) -> dict:
    """Versions, device, threads, and how busy the machine is; prints them."""
    about = {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "device": device,
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 2),
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    return about


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def write(path: Path | None, report: dict) -> None:
    """`report` as JSON, whole or not at all, with how busy the machine is at the end; nothing without a path."""
    if path is None:
        return
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        temporary.write_text(json.dumps({**report, "load_after": round(os.getloadavg()[0], 2)}, indent=1) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)
