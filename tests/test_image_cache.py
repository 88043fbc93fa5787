"""Image files in memory: the right bytes, once a node, for every process of it."""

import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import data_set, environment, in_processes, read_log, run_main, settings
from torch.utils.data import DataLoader

from samdetr.datasets import image_cache
from samdetr.datasets.build import collate
from samdetr.util import distributed

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memory is shared by memfd on Linux only")


def write(folder: Path) -> list[Path]:
    contents = [b"one", b"", bytes(range(256)) * 300, b"last"]
    paths = [folder / str(index) for index in range(len(contents))]
    for path, content in zip(paths, contents):
        path.write_bytes(content)
    return paths


def test_contents(tmp_path):
    paths = write(tmp_path)
    cache = image_cache.share_files(paths)
    copy = pickle.loads(pickle.dumps(cache))
    contents = [path.read_bytes() for path in paths]
    for path in paths:
        path.unlink()
    assert [cache.read(index).read() for index in range(4)] == contents
    assert [copy.read(index).read() for index in range(4)] == contents


def in_rank(rank: int, port: int, paths: list[Path], output: Path) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    distributed.init_distributed(device="cpu")
    cache = image_cache.share_files(paths)
    (output / f"{rank}.pickle").write_bytes(pickle.dumps((cache.place, [cache.read(i).read() for i in range(4)])))
    try:
        image_cache.share_files([*paths, output / "absent"])
    except ValueError as error:
        (output / f"{rank}.txt").write_text(str(error))
    distributed.barrier()
    distributed.shutdown()


def test_two_processes_share_one_memory(tmp_path):
    paths = write(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    in_processes(in_rank, (port, paths, tmp_path), 2)
    (place, contents), other = (pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in range(2))
    assert other == (place, contents)
    assert contents == [path.read_bytes() for path in paths]
    for rank in range(2):  # both learn of what went wrong in the first
        assert "absent" in (tmp_path / f"{rank}.txt").read_text()


def test_too_large_for_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(image_cache, "_free_memory", lambda: 2**16)
    with pytest.raises(ValueError, match=r"`cache_mode`: the images in .* take 0.0 GiB, of 0.0 GiB .*leave it out"):
        image_cache.share_files(write(tmp_path))


@pytest.mark.parametrize(("start", "workers"), [("fork", 2), ("spawn", 1)])
def test_data_loading_workers(shapes, start, workers):
    flags = ["--coco_path", str(shapes), "--eval_size", "64"]
    held = data_set("val", settings([*flags, "--cache_mode"]))
    plain = data_set("val", settings(flags))
    held.image_folder = Path("gone")
    options = {"batch_size": 3, "collate_fn": collate}
    with_workers = DataLoader(held, num_workers=workers, multiprocessing_context=start, **options)
    for (images, targets), (wanted, wanted_targets) in zip(with_workers, DataLoader(plain, **options), strict=True):
        assert torch.equal(images.images, wanted.images)
        for target, other in zip(targets.unpack(), wanted_targets.unpack(), strict=True):
            assert torch.equal(target["boxes"], other["boxes"])


def test_training(shapes, tmp_path):
    run_main(shapes, "--epochs", "1", "--output_dir", str(tmp_path / "plain"))
    run_main(shapes, "--epochs", "1", "--output_dir", str(tmp_path / "held"), "--cache_mode")
    assert read_log(tmp_path / "held") == read_log(tmp_path / "plain")


def test_nothing_is_left_behind(tmp_path):
    """Not even by a process that is killed."""
    paths = write(tmp_path)
    code = (
        "import os, pathlib, signal, sys; from samdetr.datasets.image_cache import share_files;"
        "cache = share_files([pathlib.Path(p) for p in sys.argv[1:]]);"
        "print(os.stat(cache.place).st_nlink, cache.place, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, paths)], env=environment(), capture_output=True, text=True
    )
    links, place = result.stdout.split()
    assert links == "0"  # no name in any folder
    assert not os.path.exists(place)
