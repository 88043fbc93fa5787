"""Names of checkpoints, which stay, which is the newest good one; checksums; the order of samples."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DistributedSampler

from samdetr.datasets.sampler import TrainSampler
from samdetr.training import checkpoints
from samdetr.training.checkpoints import CheckpointFolder
from samdetr.util import files
from samdetr.util.checkpoint import checksum, read_file, save_file
from samdetr.util.files import append_json_line


def read(path: str) -> dict:
    return read_file(path, name="resume")


def content(epoch: int, iteration: int) -> dict:
    return {"schema_version": 1, "epoch": epoch, "iteration": iteration, "model": {"w": torch.arange(9.0) + epoch}}


def write(folder: CheckpointFolder, *places: tuple[int, int | None]) -> None:
    for epoch, iteration in places:
        folder.save(content(epoch, iteration or 10), epoch=epoch, iteration=iteration)


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (None, ["0000", "0001", "0002_000005"]),
        (0, ["0002_000005"]),
        (2, ["0001", "0001_000005", "0002_000005"]),
    ],
)
def test_which_files_stay(keep, left, tmp_path):
    folder = CheckpointFolder(tmp_path, keep=keep)
    write(folder, (0, 5), (0, None), (1, 5), (1, None), (2, 5))
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.pth", *(f"checkpoint{name}.pth" for name in left)]
    assert (tmp_path / "checkpoint.pth").samefile(tmp_path / "checkpoint0002_000005.pth")


@pytest.mark.parametrize("links", [True, False])
def test_newest_is_a_file_of_its_own(links, tmp_path, monkeypatch):
    """Where a file system has no links, it is a copy; either way it stays when the other name goes."""

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(checkpoints.os, "link", refuse)
    folder = CheckpointFolder(tmp_path)
    write(folder, (0, None), (1, None))
    assert not (tmp_path / "checkpoint.pth").is_symlink()
    (tmp_path / "checkpoint0001.pth").unlink()
    path, found = folder.newest_good(read)
    assert (path.name, found["epoch"]) == ("checkpoint.pth", 1)
    assert len(os.listdir(tmp_path)) == 2


def test_newest_good_file(tmp_path, capsys):
    folder = CheckpointFolder(tmp_path)
    assert folder.newest_good(read) is None
    write(folder, (0, None), (1, 3), (1, None))
    (tmp_path / "checkpoint.pth").write_bytes(b"")
    assert folder.newest_good(read)[1]["iteration"] == 3  # both names were of one file
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("warning: ")
    assert str(tmp_path / "checkpoint.pth") in first
    assert str(tmp_path / "checkpoint0001.pth") in second
    assert second.endswith(f"resuming from {tmp_path / 'checkpoint0001_000003.pth'} instead")


def test_log_of_epochs_that_come_again_is_dropped(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for epoch in range(3):
        append_json_line(tmp_path / "log.txt", {"epoch": epoch})
    with open(tmp_path / "log.txt", "a") as file:
        file.write('{"epoch": 3')
    assert [folder.has_logged(epoch) for epoch in (2, 3)] == [True, False]
    folder.forget_log(2)
    assert (tmp_path / "log.txt").read_text() == '{"epoch": 0}\n{"epoch": 1}\n'


def test_leftovers_are_removed(tmp_path):
    """Of processes that have ended, on this host or others; not of one that lives and may be writing."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = socket.gethostname().replace(".", "_")
    gone = [f".{dead.pid}.checkpoint0003_000050.pth", f".{dead.pid}@{here}.log.txt", ".1@another_host.checkpoint.pth"]
    stay = [f".{os.getppid()}@{here}.checkpoint.pth", ".mine", "checkpoint0003.pth", f".{dead.pid}.mine.pth"]
    for name in gone + stay:
        (tmp_path / name).touch()
    CheckpointFolder(tmp_path).clean()
    assert sorted(os.listdir(tmp_path)) == sorted(stay)


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """And the name, after that: a loss of power leaves the old file or the new one, never an empty one."""
    done: list[tuple[str, str]] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        done.append(("fsync", os.path.realpath(f"/proc/self/fd/{descriptor}")))
        real_fsync(descriptor)

    def replace(source, target) -> None:
        done.append(("replace", os.path.realpath(source)))
        real_replace(source, target)

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.os, "replace", replace)
    writers = [
        lambda path: save_file({"a": torch.zeros(3)}, path),
        lambda path: files.write_json(path, {"a": 1}),
    ]
    for number, write in enumerate(writers):
        done.clear()
        write(tmp_path / str(number))
        place = [kind for kind, _ in done].index("replace")
        assert ("fsync", done[place][1]) in done[:place], done
        assert ("fsync", str(tmp_path.resolve())) in done[place:], done
    done.clear()
    append_json_line(tmp_path / "log.txt", {"epoch": 1})
    assert done == [("fsync", str(tmp_path.resolve() / "log.txt"))]


def test_checksum_sees_every_value(tmp_path):
    base = {"a": [1, (2.0, None)], "w": torch.tensor([[1.0, 2.0]]), "n": {"x": True, "y": "é"}}
    base["long"] = torch.zeros(3000)
    others = [
        base | {"a": [1, (2.0, 0)]},
        base | {"a": [1, 2.0, None]},
        base | {"w": torch.tensor([[1.0], [2.0]])},
        base | {"w": torch.tensor([[1.0, 2.0000002]])},
        base | {"w": base["w"].double()},
        base | {"n": {"x": True, "z": "é"}},
        base | {"long": torch.zeros(3000).index_fill(0, torch.tensor([2999]), 1)},
    ]
    sums = {checksum(value) for value in (base, *others)}
    assert len(sums) == 8
    assert checksum(base | {"w": base["w"].to(memory_format=torch.preserve_format)}) == checksum(base)

    save_file(base, tmp_path / "x.pth")
    loaded = read(str(tmp_path / "x.pth"))
    assert loaded.keys() == base.keys()
    raw = torch.load(tmp_path / "x.pth", weights_only=True)
    for change, said in [
        ({"a": [1, (2.0, 0)]}, "damaged"),
        ({"schema_version": 1, "checksum": None}, "damaged"),
        ({"schema_version": 99, "checksum": checksum(base | {"schema_version": 99})}, "schema version 99"),
    ]:
        torch.save(raw | change, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=said):
            read(str(tmp_path / "x.pth"))
    del raw["checksum"]  # as official files are
    torch.save(raw, tmp_path / "x.pth")
    assert read(str(tmp_path / "x.pth")).keys() == base.keys()


def test_order_of_samples():
    """torch's shuffle; the same images in every step for any number of processes, from any step on."""

    def steps(world_size: int, done: int = 0) -> list[set[int]]:
        samplers = [
            TrainSampler(length=30, batch=8, rank=rank, world_size=world_size, seed=5) for rank in range(world_size)
        ]
        for sampler in samplers:
            sampler.set_epoch(3, done)
        each = 8 // world_size
        orders = [list(sampler) for sampler in samplers]
        assert {len(order) for order in orders} == {len(samplers[0])}
        return [
            {i for order in orders for i in order[k * each : (k + 1) * each]} for k in range(len(orders[0]) // each)
        ]

    order = DistributedSampler(range(30), num_replicas=1, rank=0, seed=5)
    order.set_epoch(3)
    whole = list(order)
    wanted = [set(whole[k : k + 8]) for k in (0, 8, 16)]
    assert steps(1) == steps(2) == steps(4) == wanted
    assert steps(2, done=1) == wanted[1:]
    assert steps(4, done=3) == []
