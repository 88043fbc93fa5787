"""Detection in many images and videos, past those that cannot be read."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

from PIL import Image
from torch import Tensor

from samdetr.inference.detections import Detections, save_picture
from samdetr.inference.explain import explain
from samdetr.inference.outputs import DETECTIONS, IMAGES, OutputFolder, image_ids
from samdetr.inference.predictor import Predictor
from samdetr.inference.sources import DRAWN, Source
from samdetr.inference.video import Frames, Video, VideoFault, VideoWriter
from samdetr.util.drawing import contact_sheet, draw_detections
from samdetr.util.logger import log, printable, progress

# By path: the image, boxes (n, 4) in pixels and labels (n,) of its objects, its id.
Truth = dict[Path, tuple[Source, Tensor, Tensor, int]]
Stopped = Callable[[], bool]  # whether to end after this image


class Work:
    """Detects in images and videos, writes what it finds, and collects what is said at the end.

    Attributes:
        faults: names and reasons of images and videos that could not be read, or not to their end.
    """

    def __init__(
        self, predictor: Predictor, folder: OutputFolder, *, threshold: float, truth: Truth, points: dict[str, Any]
    ) -> None:
        self._predictor, self._folder, self._threshold = predictor, folder, threshold
        self._truth, self._points = truth, points
        self.faults: list[tuple[str, str]] = []
        self._images: list[dict[str, Any]] = []
        self._results: list[dict[str, Any]] = []
        self._objects = self._frames = 0
        self._best = (0.0, "")  # of those below the threshold: score, and where and what
        self._categories = [{"id": row["id"], "name": row["name"]} for row in predictor.categories.to_list()]

    def images(self, sources: Sequence[Source], names: Sequence[str], stopped: Stopped) -> None:
        """Detect in each image, and draw it into the file of that name. Raises OSError."""
        counts = Counter(source.name for source in sources)
        todo = list(zip(sources, names, self._ids(sources)))
        for source, name, identity in progress(todo, description="images", every=50):
            if stopped():
                break
            shown = source.name if counts[source.name] == 1 else str(source.path)
            source, *expected = self._truth.get(source.path, (source,))
            try:
                source = source.held()
            except ValueError as error:
                self._fail(shown, error)
                continue
            found = self._draw(source, name, shown, expected)
            width, height = found.size
            self._images.append(
                {"id": identity, "file_name": shown, "width": width, "height": height, "drawn_as": name}
            )
            self._results += found.to_coco(identity)

    def _draw(self, source: Source, name: str, shown: str, expected: Sequence[Any]) -> Detections:
        """Detect in one image, say it in a line, and write the pictures."""
        pictures: dict[str, Image.Image] = {}
        if any(self._points.values()):
            found, pictures = explain(self._predictor, source, threshold=self._threshold, **self._points)
            everything = found if len(found) else self._predictor.predict(source, threshold=0)
        else:
            everything = self._predictor.predict(source, threshold=0)
            found = everything.above(self._threshold)
        self._objects += len(found)
        if len(found):
            line = found.summary()
        else:
            score, what = _best(everything)
            self._best = max(self._best, (score, f"{shown}: {what}"))
            line = f"nothing above {self._threshold:g}, the best score is {score:.2f} ({printable(what)})"
        log(f"{printable(shown)}: {line}")
        picture = found.draw()
        if expected:
            boxes, labels, _ = expected
            names = found.drawn_names
            right = draw_detections(found.image, boxes=boxes, labels=labels, scores=None, class_names=names)
            picture = contact_sheet([[picture, right]], [["detections", "ground truth"]])
        folder = self._folder.make()
        self._folder.wrote(save_picture(picture, folder / name))
        stem = PurePath(name).stem.removeprefix(DRAWN)
        for kind, picture in pictures.items():
            self._folder.wrote(save_picture(picture, folder / f"{DRAWN}{kind}_{stem}.png"))
        return found

    def video(self, video: Video, name: str, stopped: Stopped, *, limit: int | None) -> None:
        """Detect in each frame, draw all into a video of that name, and write the detections. Raises OSError."""
        frames: list[dict[str, Any]] = []
        facts: dict[str, Any] = {"file_name": video.name, "drawn_as": name}
        best, objects = (0.0, ""), 0
        try:
            with video.open() as opened:
                facts["fps"] = opened.rate
                with VideoWriter(self._folder.make() / name, rate=opened.rate) as writer:
                    for number, seconds, found, what in self._detect(video, opened, stopped, limit):
                        if not number:
                            facts["width"], facts["height"] = found.size
                        frames.append({"frame": number, "seconds": seconds, "detections": found.to_coco(number)})
                        objects += len(found)
                        best = max(best, (what[0], f"frame {number}: {what[1]}"))
                        picture = found.draw()
                        # A camera's frames come when the one before is done; repeated, they take as long as they took.
                        missing = int(seconds * opened.rate) + 1 - writer.frames if video.live else 1
                        for _ in range(min(max(missing, 1), 1000)):
                            writer.add(picture)
        except VideoFault as error:
            self._fail(video.name, error)
        if not frames:
            return
        self._folder.wrote(self._folder.path / name)
        content = {**facts, "categories": self._categories, "frames": frames}
        self._folder.write(PurePath(name).with_suffix(".json").name, content)
        self._frames += len(frames)
        self._objects += objects
        line = f"{objects} detections in {len(frames)} frames"
        if not objects:
            self._best = max(self._best, (best[0], f"{video.name}, {best[1]}"))
            line = f"nothing above {self._threshold:g} in {len(frames)} frames, the best score is {best[0]:.2f}"
            line += f" ({printable(best[1])})"
        log(f"{printable(video.name)}: {line}")

    def _detect(
        self, video: Video, opened: Frames, stopped: Stopped, limit: int | None
    ) -> Iterator[tuple[int, float, Detections, tuple[float, str]]]:
        """Of each frame: its number and time, its detections, and the best of all, whatever its score. A fault after
        the first frame ends them, so that what came before is kept."""
        totals = [number for number in (limit, opened.total) if number]
        steps = progress(
            islice(opened.images, limit), description=printable(video.name), total=min(totals, default=None), every=50
        )
        number = -1
        try:
            for number, (seconds, image) in enumerate(steps):
                everything = self._predictor.predict(image, threshold=0)
                yield number, seconds, everything.above(self._threshold), _best(everything)
                if stopped():
                    return
        except VideoFault as error:
            self._fail(video.name, error)
        else:
            if number < 0:
                self._fail(video.name, VideoFault("it has no frame that can be read"))
            elif opened.total and number + 1 < 0.9 * min(totals):  # the number may be an estimate
                self._fail(video.name, VideoFault(f"it ends after {number + 1} of {opened.total} frames"))

    def finish(self, **facts: Any) -> None:
        """Write the detections of the images, and the list of all files, with `facts`. Raises OSError."""
        if self._images:
            self._folder.write(DETECTIONS, self._results)
            content = {"images": self._images, "annotations": [], "categories": self._categories}
            self._folder.write(IMAGES, content, indent=2)
        if self._images or self._frames:
            unread = [{"file_name": name, "reason": reason} for name, reason in self.faults]
            self._folder.finish(**facts, unreadable=unread)
        self._folder.drop_if_empty()

    def report(self) -> None:
        """Say what was done, whether anything was found, and what could not be read."""
        done = [f"{len(self._images)} image(s)"] if self._images else []
        done += [f"{self._frames} frame(s) of videos"] if self._frames else []
        if done and not self._objects:
            score, where = self._best
            log(
                f"nothing is above `threshold` {self._threshold:g} in any image; the best score is {score:.2f} "
                f"({printable(where)})"
            )
        if done:
            log(f"{' and '.join(done)}, {self._objects} detection(s), in {self._folder.path}")
        for name, reason in self.faults:
            log(f"not read: {printable(name)}: {printable(reason)}")

    def _ids(self, sources: Sequence[Source]) -> list[int]:
        """Those of the annotation file, which may lack some, if there is one; otherwise as of `image_ids`."""
        if not self._truth:
            return image_ids([source.name for source in sources])
        known = {path: row[3] for path, row in self._truth.items()}
        further = iter(range(max(known.values()) + 1, 2**63))
        return [known[source.path] if source.path in known else next(further) for source in sources]

    def _fail(self, name: str, error: ValueError) -> None:
        self.faults.append((name, " ".join(str(error).split())))
        log(f"{printable(name)}: cannot be read")


def _best(found: Detections) -> tuple[float, str]:
    """Score and class of the best detection."""
    return (found.scores[0].item(), found.names[0]) if len(found) else (0.0, "nothing at all")


@contextmanager
def stoppable() -> Iterator[Stopped]:
    """Inside, the first Ctrl-C makes the function that it yields true, and does nothing else; the next raises
    KeyboardInterrupt, which ends a wait for a server, and is caught here."""
    asked = False
    before = signal.getsignal(signal.SIGINT)

    def ask(*_: Any) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    # Ignored: as of nohup. None: a handler that is not Python's. Only the main thread may set one.
    usable = before not in (signal.SIG_IGN, None) and threading.current_thread() is threading.main_thread()
    if usable:
        signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    except KeyboardInterrupt:
        if not asked:
            raise
    finally:
        if usable:
            signal.signal(signal.SIGINT, before)
