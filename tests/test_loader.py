"""What data loading workers see and how much memory they take, with the loaders of main.py."""

import gc
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from helpers import data_set, settings
from PIL import Image

from samdetr.datasets.coco import CocoDetection
from samdetr.training.run import build_loaders
from samdetr.util import loader
from samdetr.util.loader import Loader, guard_worker, seconds_waited, shared_memory_warning

# More workers than cores are no fault here.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def loaders(data: Path, *flags: str):
    """The training set, and what main.py makes of it and of the validation set."""
    found = settings(["--coco_path", str(data), "--train_sizes", "48", "64", "72", *flags])
    train_set = data_set("train", found)
    return train_set, *build_loaders(found, train_set, data_set("val", found))


def epochs(data: Path, workers: int, which: list[int], *flags: str) -> list[list]:
    """For each epoch its batches as (images, padding, *targets)."""
    train_set, loader, _ = loaders(data, "--batch_size", "4", "--num_workers", str(workers), *flags)
    seen = []
    for epoch in which:
        loader.sampler.set_epoch(epoch)
        train_set.set_epoch(epoch)
        batches = [
            [images.images, images.padding, *(target[name] for target in targets.unpack() for name in sorted(target))]
            for images, targets in loader
        ]
        seen.append(batches)
    return seen


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_goes_through_the_images_by_id(processes, own_shapes):
    """As the official loaders, whatever the order in the file: with it batches change, and padding, and AP."""
    file = own_shapes / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    wanted = sorted(image["id"] for image in content["images"])
    content["images"].sort(key=lambda image: (image["id"] * 7) % 5)
    assert wanted != [image["id"] for image in content["images"]]
    file.write_text(json.dumps(content))
    found = settings(["--coco_path", str(own_shapes), "--batch_size", "2", "--num_workers", "0"])
    _, loader = build_loaders(found, None, data_set("val", found), evaluating_processes=processes)
    seen = [[int(target["image_id"]) for target in targets.unpack()] for _, targets in loader]
    orders = [wanted[first::processes] for first in range(processes)]
    pairs = [order[start : start + 2] for start in range(0, len(wanted), 2) for order in orders]
    assert seen == [pair for pair in pairs if pair]


def test_an_epoch_is_the_same_whoever_loads_it_and_wherever_a_run_begins(shapes):
    """Images, boxes and order, to the bit; and the network's random numbers stay as they are."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second = epochs(shapes, 0, [0, 1])
    for workers in (1, 3):
        torch.testing.assert_close(epochs(shapes, workers, [0, 1]), [first, second], rtol=0, atol=0)
    for workers in (0, 3):
        torch.testing.assert_close(epochs(shapes, workers, [1]), [second], rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tuple(batch[0].shape) for batch in (*first, *second)}) > 2, "the test tells nothing"


def test_random_numbers_differ_by_epoch_index_and_seed(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    images = [{"id": i, "file_name": f"{name}.png"} for i, name in enumerate("ab")]
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "x"}]}
    (tmp_path / "ann.json").write_text(json.dumps(content))

    def draw(seed: int, epoch: int, index: int) -> float:
        dataset = CocoDetection(
            image_folder=tmp_path,
            annotation_file=tmp_path / "ann.json",
            transforms=lambda image, target: (torch.rand(3, 4, 4), target),
            train=True,
            seed=seed,
        )
        dataset.set_epoch(epoch)
        return dataset[index][0][0, 0, 0].item()

    keys = [(seed, epoch, index) for seed in (0, 1) for epoch in (0, 1) for index in (0, 1)]
    drawn = [draw(*key) for key in keys]
    assert len(set(drawn)) == len(keys)
    assert drawn == [draw(*key) for key in keys]


def test_workers_stay_and_learn_of_the_epoch(shapes):
    train_set, train_loader, val_loader = loaders(shapes, "--num_workers", "2")
    workers = [worker.pid for worker in iter(train_loader)._workers]
    assert [worker.pid for worker in iter(train_loader)._workers] == workers
    assert val_loader.persistent_workers
    assert not loaders(shapes, "--num_workers", "0")[1].persistent_workers
    # Started anew instead of copied, workers map the same memory as we do.
    assert not train_set._boxes.is_shared()
    spawned = torch.utils.data.DataLoader(train_set, num_workers=1, multiprocessing_context="spawn")
    next(iter(spawned))
    assert train_set._boxes.is_shared()


def private_memory(process: int) -> int:
    """Bytes that only this process has, copies of shared pages to which it wrote included."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def growth_of_workers(folder: Path) -> list[float]:
    """MiB, for each of four workers, over three epochs of a data set with long names."""
    count, step, name = 40_000, 40, f"{'long' * 50}.png"
    (folder / "images").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "images" / name)
    annotation = {"category_id": 1, "bbox": [1, 1, 4, 4]}
    content = {
        "images": [{"id": i, "file_name": name, "width": 8, "height": 8} for i in range(count)],
        "annotations": [{"id": 2 * i + k, "image_id": i, **annotation} for i in range(count) for k in (0, 1)],
        "categories": [{"id": 1, "name": "x"}],
    }
    (folder / "ann.json").write_text(json.dumps(content))
    del content
    dataset = CocoDetection(
        image_folder=folder / "images",
        annotation_file=folder / "ann.json",
        transforms=lambda image, target: (torch.zeros(3, 8, 8), target),
        train=False,
    )
    # A few images over and over for the workers' own memory; then every 40th, others in each epoch.
    order = [[0] * 400, *(range(first, count, step) for first in (10, 20, 30))]
    sampler = type("Order", (), {"__iter__": lambda self: iter(order.pop(0))})()
    loader = torch.utils.data.DataLoader(
        dataset, 20, sampler=sampler, num_workers=4, persistent_workers=True, collate_fn=len
    )
    used = []
    gc.collect()
    gc.freeze()  # a collection in a worker writes to every object that this process hands down
    while order:
        iterator = iter(loader)
        assert sum(iterator) >= 400
        used.append([private_memory(worker.pid) for worker in iterator._workers])
    return [(last - first) / 2**20 for first, last in zip(used[0], used[-1])]


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="the system does not tell a process's memory")
def test_workers_do_not_grow(tmp_path):
    """Three epochs over annotations that take 30 MB as Python objects: 5 MB for each worker when they were a list.

    In a separate process, because workers also write to what the tests before this one have left in memory.
    """
    root = Path(__file__).parents[1]
    code = f"import test_loader, pathlib; print(test_loader.growth_of_workers(pathlib.Path({str(tmp_path)!r})))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    growth = json.loads(done.stdout.splitlines()[-1])
    assert statistics.median(growth) < 2, f"each worker's growth in MiB: {growth}"


class Slow(torch.utils.data.Dataset):
    """Batches of which the third does not come: it hangs, is stopped, or cannot be sent."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int):
        if index == 2 and self.fault == "hangs":
            time.sleep(1000)
        if index == 2 and self.fault == "stops":
            os.kill(os.getpid(), signal.SIGSTOP)
        return Unsendable() if index == 2 and self.fault == "full" else index


class Unsendable:
    def __reduce__(self):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("hangs", "no batch came .* for 2 s (`timeout`)"),
        ("stops", "no batch came"),
        ("full", "no space left in shared memory (/dev/shm: .* MB are free): make it larger"),
    ],
)
def test_waits_for_data_end(fault, said):
    """With one line that names cause and remedy; no process is left."""
    batches = Loader(
        Slow(fault), timeout=2, num_workers=1, batch_size=1, collate_fn=list, worker_init_fn=lambda _: guard_worker()
    )
    start, found = time.monotonic(), []
    with pytest.raises(ValueError, match=said.replace("(", r"\(").replace(")", r"\)")):
        found += batches
    assert time.monotonic() - start < 8
    for worker in multiprocessing.active_children():
        worker.join(5)
    assert not multiprocessing.active_children()
    assert seconds_waited() == 0


LEAVES = """
import os, sys, time
from samdetr.util.loader import Loader, guard_worker

def begin(_):
    time.sleep(0.5)
    guard_worker()

batches = iter(Loader(range(8), timeout=9, num_workers=1, batch_size=1, worker_init_fn=begin, collate_fn=list))
if sys.argv[1] == "later":
    next(batches)
os._exit(0)
"""


@pytest.mark.parametrize("when", ["before the worker has begun", "later"])
def test_a_worker_ends_with_its_parent(when):
    """Otherwise it lives on, and with it the pipes that the parent wrote into: whoever reads them waits for ever."""
    run = subprocess.run([sys.executable, "-c", LEAVES, when], capture_output=True, text=True, timeout=30)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_shared_memory_is_estimated(monkeypatch):
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=64e6, total=64e6))
    assert shared_memory_warning(num_workers=4, batch_bytes=8_000_000) is None
    line = shared_memory_warning(num_workers=4, batch_bytes=8_100_000)
    assert "need 65 MB (4 `num_workers` x 2 batches of 8.1 MB), and /dev/shm has 64 MB free" in line
