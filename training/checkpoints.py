"""The checkpoints of one run: how they are named, which stay, and which is the newest good one.

    checkpoint0003.pth           after epoch 3, as the official code names it
    checkpoint0004_000250.pth    in between: 250 steps into epoch 4
    checkpoint.pth               the newest of them, under a second name
    checkpoint_best.pth          the one of the highest AP, likewise

A second name is a hard link, which takes no space and cannot dangle; where a file system has none, it is a copy.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from samdetr.util.checkpoint import save_file
from samdetr.util.logger import append_json_line, flush_folder, log, read_json_lines, whole_file

NEWEST, BEST = "checkpoint.pth", "checkpoint_best.pth"
_NAME = re.compile(r"checkpoint(\d{4,})(?:_(\d{6,}))?\.pth")
# What a run that was killed while it wrote has left behind: see util.logger.whole_file.
_LEFTOVER = re.compile(r"\.\d+\.(checkpoint\w*\.pth|replay\.pth|settings\.json|log\.txt|curves\.png)")


class CheckpointFolder:
    """Writes and finds checkpoints. Only the main process may write.

    Args:
        path: the folder, made by the first write; one that is lost later is an error, not made anew.
        keep: older checkpoints that stay beside the newest; None: all of whole epochs, and of the others one.

    Every method that writes raises ValueError, in one line, when the disk is full or the folder is gone.
    """

    def __init__(self, path: str | os.PathLike, *, keep: int | None = None) -> None:
        self.path, self.keep = Path(path), keep
        self._made = False

    def save(self, content: dict[str, Any], *, epoch: int, iteration: int | None) -> Path:
        """Write a checkpoint, let `checkpoint.pth` be it, and remove those that need not stay.

        `iteration` is None for the checkpoint that is named by its epoch alone.
        """
        name = f"checkpoint{epoch:04}.pth" if iteration is None else f"checkpoint{epoch:04}_{iteration:06}.pth"
        with self.writing() as folder:
            save_file(content, folder / name)
            _also_name(folder / name, folder / NEWEST)
            self._prune(folder / name)
        return folder / name

    def keep_best(self) -> None:
        """Let `checkpoint_best.pth` be the newest one, whatever becomes of its other names."""
        with self.writing() as folder:
            _also_name(folder / NEWEST, folder / BEST)

    def append_log(self, line: dict[str, Any]) -> None:
        with self.writing() as folder:
            append_json_line(folder / "log.txt", line)

    @contextlib.contextmanager
    def writing(self) -> Iterator[Path]:
        """The folder, for a body that writes into it."""
        try:
            if not self._made:
                self.path.mkdir(parents=True, exist_ok=True)
                self._made = True
            yield self.path
        except OSError as error:
            lost = "" if self.path.is_dir() else "the folder is gone; "
            raise ValueError(
                f"cannot write to --output_dir {self.path}: {lost}{error.strerror or error}; the last good checkpoint "
                "is as it was: see to the disk, then go on with --resume auto"
            ) from None

    def clean(self) -> None:
        """Remove what a killed run left half written."""
        if self.path.is_dir():
            for path in self.path.iterdir():
                if _LEFTOVER.fullmatch(path.name):
                    with contextlib.suppress(OSError):
                        path.unlink()

    def newest_good(self, read: Callable[[str], dict[str, Any]]) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that `read` (which raises ValueError) can read, and what is in it; None if none is.

        Warns of newer ones that are damaged.
        """
        damaged = []
        # checkpoint.pth first: a run that went back to an earlier file has left files of higher numbers behind.
        for path in [self.path / NEWEST, *self._named()]:
            if not path.is_file():
                continue
            try:
                content = read(str(path))
            except ValueError as error:
                damaged.append(error)
                continue
            for error in damaged:
                log(f"warning: {error}; going on from {path} instead")
            return path, content
        for error in damaged:
            log(f"warning: {error}; no other checkpoint is left")
        return None

    def forget_log(self, epoch: int) -> None:
        """Drop the lines of `epoch` and later ones, which will be written again, and what a killed run left torn."""
        file = self.path / "log.txt"
        if file.is_file():
            lines = file.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and _epoch_of(line) < epoch]
            if kept != lines:
                with self.writing(), whole_file(file) as temporary:
                    temporary.write_text("".join(kept))

    def logged(self) -> list[dict[str, Any]]:
        """The lines of log.txt, of each epoch the last, in the order of epochs."""
        file = self.path / "log.txt"
        lines = {line["epoch"]: line for line in read_json_lines(file)} if file.is_file() else {}
        return [lines[epoch] for epoch in sorted(lines)]

    def has_logged(self, epoch: int) -> bool:
        return any(line["epoch"] == epoch for line in self.logged())

    def _named(self) -> list[Path]:
        """Checkpoints under their own names, the newest first."""
        if not self.path.is_dir():
            return []
        return sorted((p for p in self.path.iterdir() if _NAME.fullmatch(p.name)), key=_position, reverse=True)

    def _prune(self, newest: Path) -> None:
        older = [path for path in self._named() if _position(path) < _position(newest)]
        if self.keep is None:
            older = [path for i, path in enumerate(older) if i > 0 and "_" in path.name]
        else:
            older = older[self.keep :]
        for path in older:
            path.unlink(missing_ok=True)


def _position(path: Path) -> tuple[int, float]:
    """Epoch, and steps of it that are done: all, where the name tells none."""
    epoch, iteration = _NAME.fullmatch(path.name).groups()
    return int(epoch), int(iteration) if iteration else float("inf")


def _epoch_of(line: str) -> float:
    """Infinity for a line that is no record of an epoch."""
    try:
        return json.loads(line)["epoch"]
    except (ValueError, TypeError, KeyError):
        return float("inf")


def _also_name(path: Path, name: Path) -> None:
    """Let `name` be the same file as `path`, in one step."""
    temporary = name.with_name(f".{os.getpid()}.{name.name}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # no hard links here
        with whole_file(name) as temporary:
            shutil.copyfile(path, temporary)
        return
    try:
        os.replace(temporary, name)
        flush_folder(name.parent)
    finally:
        temporary.unlink(missing_ok=True)
