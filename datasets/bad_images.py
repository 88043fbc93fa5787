"""Training images that cannot be read: replaced by others, counted, listed, and a reason to stop if there are many."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from samdetr.datasets.coco import CocoDetection
from samdetr.util.distributed import all_gather_object, get_world_size, is_main
from samdetr.util.logger import log, whole_file

LIST = "bad_images.txt"


class BadImages:
    """The images of a training set that could not be read in this run, in all its processes.

    Whether an image is bad shows where it is read: at the start by a look at the ends of its file, later in a data
    loading worker, whose batch tells (`TargetBatch.unreadable`). `watch` collects that. Processes exchange what they
    found every so many batches and at the end of an epoch, and so stop together. The main process keeps the list, a
    line for each file: name, tab, reason. A run that finds a list there, because it goes on from a checkpoint, tries
    those files again.
    """

    def __init__(self, dataset: CocoDetection, *, largest_share: float, folder: Path | None, every: int = 50) -> None:
        """`folder` is where the list goes, None for no list; `every` the number of batches between exchanges.

        Raises ValueError if too many are known to be bad already.
        """
        self._dataset, self._largest_share, self._every = dataset, largest_share, every
        self._list = folder / LIST if folder else None
        self.reasons: dict[int, str] = {}  # by the index of the image, the same in all processes after an exchange
        found = {index: state.reason for index, state in dataset.known_faults.items()}
        listed = self._listed() if is_main() else None
        for index in listed or ():
            if index not in found and (reason := dataset.fault(index)):
                found[index] = reason
        if listed is not None and not found:
            self._list.unlink()
        self.exchange(found)

    def watch(self, loader: Iterable) -> _Watched:
        """The same batches; what they tell about unreadable images is taken down. Iterating raises ValueError once
        there are too many. All processes have to iterate over equally many batches."""
        return _Watched(loader, self)

    def exchange(self, found: dict[int, str]) -> None:
        """Take down what this process and the others found, all of which have to come here. Raises ValueError."""
        together = {index: reason for part in all_gather_object(found) for index, reason in part.items()}
        new = {index: reason for index, reason in sorted(together.items()) if index not in self.reasons}
        if not new:
            return
        self.reasons |= new
        if self._list and is_main():
            self._write()
        bad, total = len(self.reasons), len(self._dataset)
        first = self._dataset.unreadable(*next(iter(new.items())))
        where = f"{self._list} lists them" if self._list else "--output_dir gets a list of them"
        share = f"{bad} of {total} training images ({bad / total:.2%}) cannot be used"
        if bad > self._largest_share * total:
            raise ValueError(f"{share}, more than --max_bad_images {self._largest_share:g} allows; {where}; {first}")
        log(f"{share}, others take their place; {where}; {first}")

    def _write(self) -> None:
        lines = []
        for index, reason in sorted(self.reasons.items()):
            name = self._dataset.images[index].file_name.encode("utf-8", "backslashreplace").decode()
            lines.append(f"{name}\t{reason}\n")
        try:
            self._list.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self._list) as temporary:
                temporary.write_text("".join(lines), encoding="utf-8")
        except OSError as error:
            raise ValueError(f"{self._list} cannot be written: {error}; check --output_dir") from error

    def _listed(self) -> set[int] | None:
        """Indices of the images in the list that is there, if there is one."""
        if not (self._list and self._list.is_file()):
            return None
        names = {line.split("\t")[0] for line in self._list.read_text(encoding="utf-8").splitlines()}
        return {index for index, record in enumerate(self._dataset.images) if record.file_name in names}


class _Watched:
    def __init__(self, loader: Iterable, bad_images: BadImages) -> None:
        self._loader, self._bad_images = loader, bad_images

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple]:
        found: dict[int, str] = {}
        alone = get_world_size() == 1
        for number, (images, targets) in enumerate(self._loader, start=1):
            found |= targets.unreadable
            # Before the last batch is handed on, after whose step the epoch is saved.
            together = number % self._bad_images._every == 0 or number == len(self)
            if found if alone else together:
                self._bad_images.exchange(found)
                found = {}
            yield images, targets
