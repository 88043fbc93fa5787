"""The checkpoints of one run: their names, which are kept, and which is the newest good one.

    checkpoint0003.pth           after epoch 3, as the official code names it
    checkpoint0004_000250.pth    inside an epoch: 250 steps into epoch 4
    checkpoint.pth               the newest of them, under a second name
    checkpoint_best.pth          the one with the highest AP, likewise

A second name is a hard link, which takes no space and cannot dangle. On a file system without hard links it is a copy.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from samdetr.util.checkpoint import save_file
from samdetr.util.files import append_json_line, read_json_lines, remove_leftovers, whole_file
from samdetr.util.logger import log

NEWEST, BEST = "checkpoint.pth", "checkpoint_best.pth"
REPLAY = "replay.pth"
TIMES = "times.txt"
TRACKED = "track"  # folder of `track`
_NAME = re.compile(r"checkpoint(\d{4,})(?:_(\d{6,}))?\.pth")
_ANY = re.compile(r"checkpoint\w*\.pth")
_OTHERS = {"log.txt", TIMES, "curves.png", "settings.json", "bad_images.txt", REPLAY}
# Temporary files of util.files.whole_file, which a run leaves if it is killed while it writes.
_LEFTOVER = re.compile(r"checkpoint\w*\.pth|replay\.pth|settings\.json|log\.txt|curves\.png")


class CheckpointFolder:
    """Writes and finds checkpoints. Only the main process may write.

    The first write makes the folder `path`. `keep` is the number of older checkpoints kept beside the newest; None: all
    of whole epochs and one other. Every method that writes raises ValueError if the disk is full or the folder has
    disappeared.
    """

    def __init__(self, path: str | os.PathLike, *, keep: int | None = None) -> None:
        self.path, self.keep = Path(path), keep
        self._made = False

    def holds_run(self) -> list[str]:
        """Names of checkpoints and log of a run that has written into the folder."""
        names = sorted(path.name for path in self.path.iterdir()) if self.path.is_dir() else []
        return [name for name in names if name == "log.txt" or _ANY.fullmatch(name)]

    def set_aside(self) -> Path:
        """Move the files of the run in the folder into a new subfolder, named by the time. Returns the subfolder."""
        with self.writing() as folder:
            aside = folder / f"replaced-{time.strftime('%Y%m%d-%H%M%S')}"
            while aside.exists():
                aside = aside.with_name(f"{aside.name}+")
            aside.mkdir()
            for path in list(folder.iterdir()):
                ours = path.is_file() and (path.name in _OTHERS or _ANY.fullmatch(path.name))
                if ours or (path.is_dir() and path.name == TRACKED):
                    path.rename(aside / path.name)
        return aside

    def save(self, content: dict[str, Any], *, epoch: int, iteration: int | None) -> Path:
        """Write a checkpoint, give it the second name `checkpoint.pth`, and remove those that are not kept.

        `iteration` is None for a checkpoint that is named by its epoch alone.
        """
        name = f"checkpoint{epoch:04}.pth" if iteration is None else f"checkpoint{epoch:04}_{iteration:06}.pth"
        with self.writing() as folder:
            save_file(content, folder / name)
            _also_name(folder / name, folder / NEWEST)
            self._prune(folder / name)
        return folder / name

    def keep_best(self) -> None:
        """Give the newest checkpoint the name `checkpoint_best.pth`; it stays if its other names go."""
        with self.writing() as folder:
            _also_name(folder / NEWEST, folder / BEST)

    def append_log(self, line: dict[str, Any], *, name: str = "log.txt") -> None:
        with self.writing() as folder:
            append_json_line(folder / name, line)

    @contextlib.contextmanager
    def writing(self) -> Iterator[Path]:
        """The folder, for a body that writes into it. Raises ValueError if that fails."""
        try:
            if not self._made:
                self.path.mkdir(parents=True, exist_ok=True)
                self._made = True
            yield self.path
        except OSError as error:
            lost = "" if self.path.is_dir() else "the folder is gone; "
            raise ValueError(
                f"cannot write to `output_dir` {self.path}: {lost}{error.strerror or error}; the last good checkpoint "
                "is intact: repair the disk, then pass `resume` auto"
            ) from None

    def clean(self) -> None:
        """Remove files that a killed run left half written. The caller holds the lock on the folder: only the run that
        holds it writes such files."""
        if self.path.is_dir():
            remove_leftovers(self.path, _LEFTOVER, of_other_hosts=True)

    def newest_good(self, read: Callable[[str], dict[str, Any]]) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that `read` can read, and its content; None if there is none.

        `read` raises ValueError for a damaged file. Warns of damaged ones that are newer.
        """
        damaged: list[ValueError] = []
        found, instead = None, "there is no other checkpoint"
        # checkpoint.pth first: a run that resumed from an earlier file has left files of higher numbers.
        for path in [self.path / NEWEST, *self._named()]:
            if path.is_file():
                try:
                    found, instead = (path, read(str(path))), f"resuming from {path} instead"
                    break
                except ValueError as error:
                    damaged.append(error)
        for reason in damaged:
            log(f"warning: {reason}; {instead}")
        return found

    def forget_log(self, epoch: int) -> None:
        """Remove the lines of `epoch` and later ones, which will be written again, and an incomplete last line."""
        kept = "".join(f"{json.dumps(line)}\n" for line in self._log() if line["epoch"] < epoch)
        file = self.path / "log.txt"
        if file.is_file() and kept != file.read_text():
            with self.writing(), whole_file(file) as temporary:
                temporary.write_text(kept)

    def logged(self) -> list[dict[str, Any]]:
        """The lines of log.txt in the order of epochs; of each epoch the last."""
        lines = {line["epoch"]: line for line in self._log()}
        return [lines[epoch] for epoch in sorted(lines)]

    def has_logged(self, epoch: int) -> bool:
        return any(line["epoch"] == epoch for line in self.logged())

    def _log(self) -> list[dict[str, Any]]:
        file = self.path / "log.txt"
        lines = read_json_lines(file) if file.is_file() else []
        return [line for line in lines if isinstance(line, dict) and "epoch" in line]

    def _named(self) -> list[Path]:
        """Checkpoints under their first names, the newest first."""
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
    """Epoch, and steps of it that are done: infinity for a whole epoch."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    epoch, iteration = match.groups()
    return int(epoch), int(iteration) if iteration else float("inf")


def _also_name(path: Path, name: Path) -> None:
    """Make `name` a second name of the file `path`, atomically."""
    with whole_file(name) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:  # no hard links here
            shutil.copyfile(path, temporary)
