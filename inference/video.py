"""Videos and cameras, frame by frame, and videos that are written: by PyAV or OpenCV, whichever is installed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from samdetr.inference.sources import name_of
from samdetr.util.download import fetch
from samdetr.util.files import whole_file
from samdetr.util.regular_files import NotRegular, open_regular

RATE = 25.0  # frames a second where a file or camera does not say it


class VideoFault(ValueError):
    """A video, or the rest of it, cannot be read."""


@dataclass(frozen=True)
class Frames:
    """An open video. `total`: number of frames, as far as it is known. `images`: (seconds, picture in RGB) in turn; may
    raise VideoFault."""

    rate: float
    total: int | None
    images: Iterator[tuple[float, Image.Image]]


@dataclass(frozen=True)
class Video:
    """A video file, URL or camera. `open()` raises VideoFault."""

    name: str
    open: Callable[[], AbstractContextManager[Frames]]
    live: bool = False


def video_of(source: Path | str | int, *, allow_http: bool = False) -> Video:
    """The video in a file, at a URL (a str), or of a camera (its number). Raises ValueError: no package reads it."""
    if isinstance(source, int):
        if not find_spec("cv2"):
            raise ValueError(f"`images` {source}: a camera needs OpenCV: pip install opencv-python-headless")
        return Video(f"camera{source}.mp4", lambda: _open_camera(source), live=True)
    if not (find_spec("av") or find_spec("cv2")):
        raise ValueError(f"`images` {source}: a video needs PyAV or OpenCV: pip install av")
    if isinstance(source, Path):
        return Video(source.name, lambda: _open_file(source))
    name = name_of(source)
    return Video(name, lambda: _open_url(source, name, allow_http))


@contextmanager
def _open_url(url: str, name: str, allow_http: bool) -> Iterator[Frames]:
    with TemporaryDirectory() as folder:
        try:
            file = fetch(url, Path(folder) / f"video{Path(name).suffix}", allow_http=allow_http)
        except ValueError as error:
            raise VideoFault(f"`images` {error}") from None
        with _open_file(file) as frames:
            yield frames


@contextmanager
def _open_file(path: Path) -> Iterator[Frames]:
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open_regular(path))
            head = file.read(4096)
            file.seek(0)
        except (OSError, NotRegular) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise VideoFault(f"{path} cannot be read: {reason}") from None
        if b"\0" not in head:  # texts such as play lists name other files and hosts to open
            raise VideoFault(f"{path} is no video, but {'a text' if head else 'empty'}")
        yield stack.enter_context(_open_with_av(path, file) if find_spec("av") else _open_with_cv2(path))


@contextmanager
def _open_with_av(path: Path, file: Any) -> Iterator[Frames]:
    av = import_module("av")
    with _faults(path):
        container = av.open(file)
    with container:
        if not container.streams.video:
            raise VideoFault(f"{path} has no video in it")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        rate = _rate(stream.average_rate)
        seconds = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6

        def images() -> Iterator[tuple[float, Image.Image]]:
            decoded, number = container.decode(stream), 0
            while True:
                with _faults(path, number):
                    frame = next(decoded, None)
                if frame is None:
                    return
                image = frame.to_image()
                if turn := getattr(frame, "rotation", 0):  # of telephones that were held upright
                    image = image.rotate(turn, expand=True)
                yield (number / rate if frame.time is None else float(frame.time)), image
                number += 1

        yield Frames(rate, stream.frames or round(seconds * rate) or None, images())


@contextmanager
def _open_with_cv2(path: Path) -> Iterator[Frames]:
    cv2 = import_module("cv2")
    # An absolute path is neither a URL nor a camera; FFmpeg reads no patterns of image names here.
    capture = cv2.VideoCapture(str(path.absolute()), cv2.CAP_FFMPEG)
    with _releasing(capture):
        if not capture.isOpened():
            raise VideoFault(f"{path} cannot be read as a video")
        rate, total = _rate(capture.get(cv2.CAP_PROP_FPS)), int(capture.get(cv2.CAP_PROP_FRAME_COUNT))

        def images() -> Iterator[tuple[float, Image.Image]]:
            for number, image in enumerate(_captured(capture)):
                yield number / rate, image

        yield Frames(rate, total if total > 0 else None, images())


@contextmanager
def _open_camera(number: int) -> Iterator[Frames]:
    cv2 = import_module("cv2")
    capture = cv2.VideoCapture(number)
    with _releasing(capture):
        if not capture.isOpened():
            raise VideoFault(f"`images` {number}: no such camera, or it is in use")

        def images() -> Iterator[tuple[float, Image.Image]]:
            start = time.monotonic()
            for image in _captured(capture):
                yield time.monotonic() - start, image

        yield Frames(_rate(capture.get(cv2.CAP_PROP_FPS)), None, images())


def _captured(capture: Any) -> Iterator[Image.Image]:
    while True:
        there, frame = capture.read()
        if not there:
            return
        yield Image.fromarray(np.ascontiguousarray(frame[:, :, ::-1]))


@contextmanager
def _releasing(capture: Any) -> Iterator[None]:
    try:
        yield
    finally:
        capture.release()


@contextmanager
def _faults(path: Path, number: int = 0) -> Iterator[None]:
    """Turn what PyAV raises for a damaged file into a VideoFault."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        after = f" after frame {number}" if number else ""
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise VideoFault(f"{path} cannot be read{after}: {reason}") from None


def _rate(said: Any) -> float:
    """Frames a second, as a file or camera says it if that can be."""
    with suppress(TypeError, ValueError, OverflowError):
        if 0 < float(said) <= 1000:
            return float(said)
    return RATE


class VideoWriter:
    """Writes pictures as a video, whole or not at all; without a picture there is no file.

    with VideoWriter(path, rate=25.0) as video:
        video.add(picture)

    Pictures that are larger or smaller than the first are resized. Raises OSError.
    """

    def __init__(self, path: Path, *, rate: float) -> None:
        self.path, self.rate, self.frames = path, rate, 0
        self._size = (0, 0)
        self._write: Callable[[Image.Image], None] | None = None
        self._stack = ExitStack()

    def add(self, picture: Image.Image) -> None:
        if self._write is None:
            self._size = (picture.width + picture.width % 2, picture.height + picture.height % 2)  # codecs halve them
            path = self._stack.enter_context(whole_file(self.path))
            self._write, close = (_av_writer if find_spec("av") else _cv2_writer)(path, self.rate, self._size)
            self._stack.callback(close)
        self._write(picture if picture.size == self._size else picture.resize(self._size))
        self.frames += 1

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


def _av_writer(
    path: Path, rate: float, size: tuple[int, int]
) -> tuple[Callable[[Image.Image], None], Callable[[], None]]:
    av = import_module("av")
    container = av.open(str(path), "w", format="mp4")
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    stream = container.add_stream(codec, rate=Fraction(rate).limit_denominator(1001))
    stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"

    def write(picture: Image.Image) -> None:
        container.mux(stream.encode(av.VideoFrame.from_image(picture)))

    def close() -> None:
        container.mux(stream.encode())
        container.close()

    return write, close


def _cv2_writer(
    path: Path, rate: float, size: tuple[int, int]
) -> tuple[Callable[[Image.Image], None], Callable[[], None]]:
    cv2 = import_module("cv2")
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
    if not writer.isOpened():
        raise OSError(f"{path} cannot be written as a video by this OpenCV")
    return lambda picture: writer.write(np.ascontiguousarray(np.asarray(picture)[:, :, ::-1])), writer.release
