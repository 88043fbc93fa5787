"""Runs that are killed, asked to stop, or lose a process or the disk: they go on to the bit, or say what is wrong."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import REPOSITORY, TINY, Forks, command, environment, read_json, read_log, run_process

from samdetr.util.checkpoint import checksum

SMALLER = [*TINY, "--backbone_level", "3"]  # a third of the time goes into its checkpoints otherwise
FLAGS = shlex.split("--epochs 2 --lr_drop 1 --lr 1e-3 --save_every_iterations 3 --keep -1 --resume auto --ema 0.9")
MAY_DIFFER = {"settings", "versions", "checksum"}  # settings tell what a run was resumed from


class TinyForks:
    """Runs of tiny networks on the drawn data."""

    def __init__(self, forks: Forks, data: Path) -> None:
        self.forks, self.data = forks, data

    def run(self, output: Path, *flags: str, faults=(), ranks: int = 1, network=SMALLER) -> list[int]:
        """Exit statuses by rank. `faults`: (where, which time, what) or (where, which time, what, rank)."""
        names = ("at", "number", "do", "rank")
        size = ["--batch_size", str(4 // ranks)]
        argv = command(self.data, *size, *FLAGS, "--output_dir", str(output), *flags, network=network)[1:]
        struck = [dict(zip(names, (*fault, 0))) for fault in faults]
        return self.forks.main(argv, output.with_name(f"{output.name}.printed"), ranks=ranks, faults=struck)

    def out(self, rank: int = 0) -> str:
        return self.forks.out(rank)

    def err(self, rank: int = 0) -> str:
        return self.forks.err(rank)

    def errors(self, rank: int = 0) -> list[str]:
        """Lines of ours on stderr."""
        return re.findall(r"^main\.py: .*$", self.err(rank), re.MULTILINE)


@pytest.fixture(scope="module")
def tiny(forks, shapes) -> TinyForks:
    return TinyForks(forks, shapes)


def straight(tiny, tmp_path_factory, *flags: str, ranks: int = 1, network=SMALLER) -> Path:
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp("straight") / "output"
    assert tiny.run(output, *flags, ranks=ranks, network=network) == [0] * ranks, tiny.errors()
    return output


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory) -> Path:
    return straight(tiny, tmp_path_factory)


@pytest.fixture(scope="module")
def pair(tiny, tmp_path_factory) -> Path:
    return straight(tiny, tmp_path_factory, ranks=2)


def assert_same(one: Path, other: Path) -> None:
    """Files, log, and all that checkpoints hold."""
    assert sorted(os.listdir(one)) == sorted(os.listdir(other))
    assert (one / "log.txt").read_bytes() == (other / "log.txt").read_bytes()
    for name in ("checkpoint.pth", "checkpoint0000.pth"):
        first, second = (torch.load(folder / name, weights_only=True) for folder in (one, other))
        assert first.keys() == second.keys()
        assert [key for key in first.keys() - MAY_DIFFER if checksum(first[key]) != checksum(second[key])] == []


# Steps 1 to 4 are epoch 0, 5 to 8 epoch 1; saves 1 and 3 come after step 3 of each, 2 and 4 at the ends.
KILLS = {
    "before anything is saved": [("step", 2)],
    "in the middle": [("step", 6)],
    "at an epoch's edge": [("step", 4)],
    "in the first save": [("save", 1)],
    "in a later save": [("save", 4)],
    "before checkpoint.pth is the new file": [("rename", 3)],
    "in evaluation": [("evaluation", 2)],
    "while the log is written": [("log", 1)],
    "after the last line": [("curves", 2)],
    "three times": [("step", 4), ("save", 1), ("evaluation", 1)],
}


@pytest.mark.parametrize("kills", KILLS.values(), ids=KILLS)
def test_killed_run_ends_as_if_nothing_had_happened(kills, tiny, alone, tmp_path):
    output = tmp_path / "output"
    for at, number in kills:
        assert tiny.run(output, faults=[(at, number, "SIGKILL")]) == [-9]
    assert tiny.run(output) == [0]
    assert_same(output, alone)


def test_with_workers_accumulation_and_gradients_that_stay(tiny, tmp_path_factory, tmp_path):
    """Steps of 2 x 4 images, whose gradients add up."""
    flags = [
        "--num_workers",
        "2",
        "--accumulate",
        "2",
        "--epochs",
        "3",
        "--save_every_iterations",
        "1",
        "--legacy_no_zero_grad",
    ]
    wanted, output = straight(tiny, tmp_path_factory, *flags), tmp_path / "output"
    assert tiny.run(output, *flags, faults=[("step", 4, "SIGKILL")]) == [-9]
    assert (output / "checkpoint0001_000001.pth").exists()
    assert tiny.run(output, *flags) == [0]
    assert_same(output, wanted)
    assert torch.load(output / "checkpoint.pth")["gradients"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_killed_run_on_a_gpu(tiny, tmp_path_factory, tmp_path):
    flags = ["--device", "cuda", "--deterministic"]
    wanted, output = straight(tiny, tmp_path_factory, *flags), tmp_path / "output"
    for at, number in [("step", 2), ("step", 6), ("save", 1), ("evaluation", 1)]:
        assert tiny.run(output, *flags, faults=[(at, number, "SIGKILL")]) == [-9]
    assert tiny.run(output, *flags) == [0]
    assert_same(output, wanted)


@pytest.mark.parametrize(
    ("killed", "faults"),
    [
        pytest.param([0], [("step", 2)], id="first"),
        pytest.param([1], [("step", 6)], id="second"),
        pytest.param(
            [0, 1, 0], [("save", 2), ("evaluation", 1), ("step", 2)], id="three times", marks=pytest.mark.slow
        ),
    ],
)
def test_two_processes_of_which_one_is_killed(killed, faults, tiny, pair, tmp_path):
    output = tmp_path / "output"
    for rank, (at, number) in zip(killed, faults):
        statuses = tiny.run(output, "--timeout", "10", faults=[(at, number, "SIGKILL", rank)], ranks=2)
        assert statuses[rank] == -9
        assert statuses[1 - rank] == 1
        (line,) = tiny.errors(1 - rank)
        assert f"error: rank {rank} " in line
    assert tiny.run(output, ranks=2) == [0, 0]
    assert_same(output, pair)


@pytest.mark.slow  # ten seconds on two cores
def test_four_processes_that_are_stopped(tiny, tmp_path, tmp_path_factory):
    """More than two may sum in more than one order; batches of like images, too, and parameters without gradient."""
    flags = shlex.split("--size_buckets 3 --no_aux_loss")
    output, wanted = tmp_path / "output", straight(tiny, tmp_path_factory, *flags, ranks=4)
    assert tiny.run(output, *flags, faults=[("step", 6, "SIGTERM")], ranks=4) == [75] * 4
    assert tiny.run(output, *flags, ranks=4) == [0] * 4
    assert_same(output, wanted)


@pytest.mark.parametrize(("before", "after"), [(1, 2), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_another_number_of_processes(before, after, tiny, tmp_path, tmp_path_factory):
    """Without dropout, which each process draws for itself, and with norms that know nothing of the batch."""
    flags = shlex.split("--dropout 0 --backbone_norm frozen")
    output, wanted = tmp_path / "output", straight(tiny, tmp_path_factory, *flags, ranks=before)
    assert tiny.run(output, *flags, faults=[("step", 6, "SIGTERM")], ranks=before) == [75] * before
    assert tiny.run(output, *flags, ranks=after) == [0] * after
    for line, other in zip(read_log(output), read_log(wanted), strict=True):
        # That of the evaluation is an average over batches, which are others.
        assert line["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
    seen = [torch.load(folder / "checkpoint.pth")["samples_seen"] for folder in (output, wanted)]
    assert seen == [32, 32]
    assert tiny.run(output, *flags, "--epochs", "3", faults=[("step", 2, "SIGTERM")]) == [75]
    assert tiny.run(output, *flags, "--epochs", "3", "--batch_size", "2") == [2]
    assert "middle of epoch 2 of a run with images per step" in tiny.errors()[0]


@pytest.mark.parametrize(
    ("name", "faults", "epoch", "step"),
    [
        ("SIGTERM", [("step", 6)], 1, 2),
        ("SIGUSR1", [("rename", 1)], 0, 3),
        ("SIGTERM", [("evaluation", 2)], 0, 4),
        ("SIGINT", [("step", 6)], 1, 2),
        ("SIGINT", [("evaluation", 2)], 0, 4),
    ],
    ids=["in a step", "in a save", "in evaluation", "Ctrl-C in a step", "Ctrl-C in evaluation"],
)
def test_signal_to_make_room(name, faults, epoch, step, tiny, alone, tmp_path):
    output = tmp_path / "output"
    assert tiny.run(output, faults=[(*faults[0], name)]) == [130 if name == "SIGINT" else 75]
    assert "Traceback" not in tiny.out() + tiny.err()
    assert tiny.out().count("--resume auto resumes") == (name == "SIGINT" or faults != [("evaluation", 2)])
    saved = torch.load(output / "checkpoint.pth")
    assert (saved["epoch"], saved["iteration"]) == (epoch, step)
    assert tiny.run(output) == [0]
    assert (output / "log.txt").read_bytes() == (alone / "log.txt").read_bytes()


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 128 + 15), ("SIGINT", 128 + 2)])
def test_second_signal_ends_at_once(name, status, tiny, tmp_path):
    assert tiny.run(tmp_path / "output", faults=[("step", 2, f"{name}, {name}")]) == [status]
    assert set(os.listdir(tmp_path / "output")) <= {".lock"}  # which says who held it, and holds no lock any more


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 75), ("SIGINT", 130)])
def test_signal_to_workers_too(name, status, tiny, alone, tmp_path):
    """As clusters and terminals send it; the workers still bring the data of the last step, and end with the run."""
    output = tmp_path / "output"
    assert tiny.run(output, "--num_workers", "2", faults=[("step", 5, f"{name} to all")]) == [status]
    assert "Traceback" not in tiny.out() + tiny.err()
    assert torch.load(output / "checkpoint.pth")["iteration"] == 1
    assert tiny.run(output, "--num_workers", "1") == [0]
    assert (output / "log.txt").read_bytes() == (alone / "log.txt").read_bytes()


def test_killed_worker(tiny, tmp_path):
    assert tiny.run(tmp_path / "output", "--num_workers", "1", faults=[("step", 2, "kill a worker")]) == [1]
    assert re.search(r"error: DataLoader worker \(pid.* killed.*--num_workers", tiny.errors()[0])


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("SIGUSR1", ("step", 6)),
        ("SIGINT", ("evaluation", 2)),
        pytest.param("SIGUSR1", ("evaluation", 2), marks=pytest.mark.slow),
        pytest.param("SIGINT", ("step", 6), marks=pytest.mark.slow),
    ],
)
def test_signal_to_one_of_two_processes(name, fault, tiny, pair, tmp_path):
    """They agree on the step; slurm's signals do not arrive everywhere at once."""
    output, status = tmp_path / "output", 130 if name == "SIGINT" else 75
    assert tiny.run(output, faults=[(*fault, name, 1)], ranks=2) == [status, status]
    assert "Traceback" not in "".join(tiny.out(rank) + tiny.err(rank) for rank in (0, 1))
    assert tiny.run(output, ranks=2) == [0, 0]
    assert (output / "log.txt").read_bytes() == (pair / "log.txt").read_bytes()
    assert checksum(torch.load(output / "checkpoint.pth")["model"]) == checksum(
        torch.load(pair / "checkpoint.pth")["model"]
    )


@pytest.mark.parametrize(
    ("fault", "said"),
    [(("step", 2, "SIGSTOP", 1), "gave no sign of life"), (("image", 5, "hang", 1), "hangs")],
    ids=["stopped", "hangs"],
)
def test_hanging_process_is_named(fault, said, tiny, tmp_path):
    start = time.monotonic()
    first, second = tiny.run(tmp_path / "output", "--timeout", "5", faults=[fault], ranks=2)
    assert first == 1
    assert second in (1, -9)  # the one at fault notices, too, if it can
    assert time.monotonic() - start < 60  # and not half an hour
    (line,) = tiny.errors()
    assert re.search(rf"error: rank 1 \(\d+ on .*\) {said}.*; rank 0 stops", line)


def test_error_of_another_process_reaches_the_log(tiny, tmp_path):
    assert tiny.run(tmp_path / "output", faults=[("step", 2, "raise", 1)], ranks=2) == [2, 2]
    assert tiny.errors(1) == ["main.py: error: rank 1: made up"]
    assert tiny.errors(0) == ["main.py: error: rank 1: made up; rank 0 stops"]


def test_full_disk(tiny, alone, tmp_path):
    output = tmp_path / "output"
    assert tiny.run(output, faults=[("step", 5, "fill the disk")]) == [2]
    (line,) = tiny.errors()
    assert f"cannot write to --output_dir {output}: File too large" in line
    files = [
        "checkpoint.pth",
        "checkpoint0000.pth",
        "checkpoint0000_000003.pth",
        "checkpoint_best.pth",
        "curves.png",
        "log.txt",
        "settings.json",
        "times.txt",
    ]
    assert sorted(os.listdir(output)) == files
    assert tiny.run(output) == [0]
    assert_same(output, alone)


def test_lost_folder(tiny, tmp_path):
    output = tmp_path / "output"
    assert tiny.run(output, faults=[("step", 5, "lose the folder")]) == [2]
    (line,) = tiny.errors()
    assert f"cannot write to --output_dir {output}: the folder is gone" in line
    assert not output.exists()


def cut(file: Path) -> None:
    with open(file, "r+b") as opened:
        opened.truncate(file.stat().st_size // 2)


def flip(file: Path) -> None:
    """One bit of a weight, which torch.load does not notice."""
    content = bytearray(file.read_bytes())
    weight = torch.load(file)["model"]["decoder.reference_boxes"].numpy().tobytes()
    content[content.index(weight) + 1] ^= 1
    file.write_bytes(content)
    assert not torch.equal(torch.load(file)["model"]["decoder.reference_boxes"].flatten()[0], torch.tensor(0.0))


@pytest.mark.parametrize(("spoil", "resume"), [(cut, "checkpoint.pth"), (flip, "auto")])
def test_damaged_newest_file(spoil, resume, tiny, alone, tmp_path):
    output = tmp_path / "output"
    assert tiny.run(output, faults=[("step", 7, "SIGTERM")]) == [75]
    newest, before = output / "checkpoint0001_000003.pth", output / "checkpoint0000.pth"
    assert newest.samefile(output / "checkpoint.pth")
    spoil(newest)
    assert tiny.run(output, "--resume", resume if resume == "auto" else str(output / resume)) == [0]
    warnings = [line for line in tiny.out().splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2  # the file has two names
    assert all(f"resuming from {before} instead" in line for line in warnings)
    assert str(newest) in warnings[1]
    assert_same(output, alone)


@pytest.mark.slow  # twenty seconds; the tests above resume killed runs without torchrun
def test_torchrun_restarts_from_the_last_checkpoint(pair, shapes, tmp_path):
    """After the second process was killed, in step 7, once."""
    program = tmp_path / "killed_once.py"
    program.write_text(
        "import os, runpy, signal\nfrom pathlib import Path\nfrom samdetr.training.loop import Trainer\n"
        f"marker, real = Path({str(tmp_path / 'marker')!r}), Trainer._after_step\n"
        "def step(self):\n"
        "    place = self.state.epoch, self.state.iteration\n"
        "    if os.environ['RANK'] == '1' and place == (1, 2) and not marker.exists():\n"
        "        marker.touch()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    real(self)\n"
        "Trainer._after_step = step\n"
        f"runpy.run_path({str(REPOSITORY / 'main.py')!r}, run_name='__main__')\n"
    )
    output = tmp_path / "output"
    flags = command(shapes, *FLAGS, "--batch_size", "2", "--output_dir", str(output), network=SMALLER)[1:]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3"]
    run = subprocess.run(
        [*launch, str(program), *flags], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert "resuming from" in run.stdout
    assert_same(output, pair)


@pytest.mark.slow  # the tests above have each fault alone
def test_short_soak(tmp_path):
    """Every kind of fault once, at random places."""
    program = str(REPOSITORY / "benchmarks" / "soak.py")
    run = run_process([program, "--faults", "11", "--seed", "3", "--json", str(tmp_path / "soak.json")], seconds=280)
    assert run.returncode == 0, run.stdout
    content = read_json(tmp_path / "soak.json")
    assert len({row["fault"] for row in content["rows"]}) == len(content["rows"]) == 11
    assert all(content["ends"])
