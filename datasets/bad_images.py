"""Training images that cannot be read: they are replaced, counted and listed, and too many stop the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from samdetr.datasets.coco import CocoDetection
from samdetr.datasets.values import shown
from samdetr.util.distributed import all_gather_object, get_world_size, is_main
from samdetr.util.files import whole_file
from samdetr.util.logger import log

LIST = "bad_images.txt"


class BadImages:
    """The images of a training set that no process of this run could read.

    Faults are found at the start by `CocoDetection.check_files`, or later by a data loading worker, whose batch reports
    them as `TargetBatch.unreadable`. The main process keeps a list with a line per file: name, tab, reason. If a list
    of an earlier run exists, its files are tried again at the start.

    Every process passes what each batch reports to `note`, before the batch's step, because an epoch is saved after its
    last step. A single process counts faults at once. Several exchange them every `every` batches and at the last batch
    of an epoch, so all stop at the same batch; they must have equally many batches.
    """

    def __init__(self, dataset: CocoDetection, *, largest_share: float, folder: Path | None, every: int = 50) -> None:
        """Take over the faults that the start has found. Every process must call this.

        Args:
            largest_share: of the images that may be unreadable.
            folder: where the list is kept; None for no list.
            every: number of batches between exchanges.

        Raises ValueError if too many images are known to be unreadable.
        """
        self._dataset, self._largest_share, self._every = dataset, largest_share, every
        self._list = folder / LIST if folder else None
        self._batches, self._found = 0, dict[int, str]()  # since the last exchange
        self.reasons: dict[int, str] = {}  # by index of the image; after an exchange the same in all processes
        found = {index: fault.reason for index, fault in dataset.known_faults.items()}
        if self._list and is_main() and self._list.is_file():
            for index in self._listed(self._list):
                if index not in found and (fault := dataset.fault(index)):
                    found[index] = fault.reason
            if not found:
                self._list.unlink()
        self._exchange(found)

    def note(self, unreadable: Mapping[int, str], *, last: bool) -> None:
        """Record the faults of the next batch: reasons by index of the image. `last` ends an epoch.

        Raises ValueError, in all processes, once too many images are unreadable.
        """
        self._found |= unreadable
        self._batches += 1
        if self._found if get_world_size() == 1 else last or self._batches == self._every:
            found, self._found = self._found, {}
            self._exchange(found)
        if last or self._batches == self._every:
            self._batches = 0

    def _exchange(self, found: dict[int, str]) -> None:
        """Merge the faults that each process has found; all must call this."""
        together = {index: reason for part in all_gather_object(found) for index, reason in part.items()}
        new = {index: reason for index, reason in sorted(together.items()) if index not in self.reasons}
        if not new:
            return
        self.reasons |= new
        if self._list and is_main():
            self._write(self._list)
        bad, total = len(self.reasons), len(self._dataset)
        first = self._dataset.unreadable(*next(iter(new.items())))
        where = f"{self._list} lists them" if self._list else "with an output folder they are listed there"
        share = f"{bad} of {total} training images ({bad / total:.2%}) cannot be used"
        if bad > self._largest_share * total:
            raise ValueError(f"{share}, more than `max_bad_images` {self._largest_share:g} allows; {where}; {first}")
        log(f"{share} and are replaced by others; {where}; {first}")

    def _write(self, file: Path) -> None:
        lines = []
        for index, reason in sorted(self.reasons.items()):
            lines.append(f"{shown(self._dataset.images[index].file_name)}\t{reason}\n")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(file) as temporary:
                temporary.write_text("".join(lines), encoding="utf-8")
        except OSError as error:
            raise ValueError(f"{file} cannot be written: {error}; check `output_dir`") from error

    def _listed(self, file: Path) -> list[int]:
        names = {line.split("\t")[0] for line in file.read_text(encoding="utf-8").splitlines()}
        return [index for index, record in enumerate(self._dataset.images) if shown(record.file_name) in names]
