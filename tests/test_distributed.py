"""Launchers' variables -> ranks, and two real processes (gloo) that SLURM's variables bring together."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import call_program

from samdetr.util.distributed import (
    Ranks,
    all_gather_object,
    barrier,
    first_host,
    get_world_size,
    init_distributed,
    is_main,
    main_process_first,
    read_ranks,
    reduce_mean,
    slurm_url,
)

REPOSITORY = Path(__file__).parents[1]
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
STEP = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}


def without(variables: dict, *names: str) -> dict:
    return {name: value for name, value in variables.items() if name not in names}


@pytest.mark.parametrize(
    ("variables", "world_size", "expected"),
    [
        ({}, 1, Ranks(0, 1, 0)),
        (TORCHRUN, 1, Ranks(5, 8, 1)),
        (TORCHRUN, 8, Ranks(5, 8, 1)),
        (STEP, 1, Ranks(3, 4, 1)),
        (TORCHRUN | STEP, 1, Ranks(5, 8, 1)),  # torchrun inside a SLURM step
        (without(TORCHRUN, "WORLD_SIZE"), 6, Ranks(5, 6, 1)),  # started by hand with --world_size
        (STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1"}, 1, Ranks(0, 1, 0)),
        (without(STEP, "SLURM_PROCID", "SLURM_STEP_ID"), 1, Ranks(0, 1, 0)),  # a shell of salloc
        (without(STEP, "SLURM_STEP_ID"), 1, Ranks(0, 1, 0)),  # the script of sbatch
        # a shell that is itself a step of one task, in a job of four
        (STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"}, 1, Ranks(0, 1, 0)),
    ],
)
def test_ranks_from_the_launcher(variables, world_size, expected):
    assert read_ranks(variables, world_size=world_size) == expected


@pytest.mark.parametrize(
    ("variables", "world_size", "message"),
    [
        (TORCHRUN | {"RANK": "8"}, 1, "RANK=8 is outside 0 to 7"),
        (TORCHRUN | {"LOCAL_RANK": "-1"}, 1, "LOCAL_RANK=-1"),
        (TORCHRUN | {"WORLD_SIZE": "eight"}, 1, "WORLD_SIZE='eight' is not an integer"),
        (without(TORCHRUN, "LOCAL_RANK"), 1, "LOCAL_RANK is not"),
        (TORCHRUN, 4, "`world_size` 4 contradicts WORLD_SIZE=8"),
        (STEP | {"SLURM_PROCID": "4"}, 1, "SLURM_PROCID=4 is outside 0 to 3"),
        (without(STEP, "SLURM_LOCALID"), 1, "SLURM_LOCALID is not set"),
        ({}, 4, "`world_size` 4, but no launcher"),
    ],
)
def test_contradictions_name_the_variable(variables, world_size, message):
    with pytest.raises(ValueError, match=message):
        read_ranks(variables, world_size=world_size)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node7", "node7"),
        ("node[03-05,09],gpu1", "node03"),
        ("gpu1,node[03-05]", "gpu1"),
        ("rack[2,4]-n[007-011].site.org,x", "rack2-n007.site.org"),
    ],
)
def test_first_host_of_a_node_list(nodelist, host):
    assert first_host(nodelist) == host


def test_meeting_point_of_a_slurm_step():
    variables = {"SLURM_JOB_NODELIST": "node[03-05]", "SLURM_JOB_ID": "123456"}
    assert slurm_url(variables) == "tcp://node03:13456"  # 10000 + 123456 mod 20000
    assert slurm_url(variables | {"SLURM_STEP_NODELIST": "node05"}) == "tcp://node05:13456"
    assert slurm_url(variables | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "99"}) == "tcp://10.0.0.1:99"
    with pytest.raises(ValueError, match=r"SLURM_JOB_NODELIST: 'node\[03'"):
        slurm_url(variables | {"SLURM_JOB_NODELIST": "node[03"})


def test_a_single_process_needs_no_group(monkeypatch):
    for name in [*TORCHRUN, "SLURM_STEP_NUM_TASKS"]:
        monkeypatch.delenv(name, raising=False)
    for name, value in (STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1"}).items():
        monkeypatch.setenv(name, value)
    assert init_distributed(device="cpu") == Ranks(0, 1, 0)
    assert not torch.distributed.is_initialized()
    barrier()
    with main_process_first():
        assert (is_main(), get_world_size(), all_gather_object("x")) == (True, 1, ["x"])
    assert reduce_mean({"a": torch.tensor(2.5)}) == {"a": torch.tensor(2.5)}


TWO_PROCESSES = """
import json, sys, time
from pathlib import Path
import torch
from samdetr.util.distributed import (all_gather_object, barrier, get_rank, init_distributed, main_process_first,
                                      reduce_mean, shutdown)
from samdetr.util.logger import MetricAverager, log, progress
torch.set_num_threads(1)
fetched, answer = Path(sys.argv[1]) / "fetched", Path(sys.argv[1])
rank = init_distributed(device="cpu").rank

values = {"loss": torch.tensor(1.0 + 2 * rank), "boxes": torch.tensor(10.0 * rank)}
means = reduce_mean(values if rank == 0 else dict(reversed(values.items())))

averager = MetricAverager()
for value in ([4.0], [1.0, 2.0, 3.0])[rank]:
    averager.update({"loss": torch.tensor(value)} | ({"rare": torch.tensor(7.0)} if value == 3.0 else {}))

with main_process_first():
    found = fetched.exists()
    if rank == 0:
        time.sleep(0.3)
        fetched.touch()
try:
    with main_process_first():
        if rank == 0:
            raise OSError("no network")
except OSError:
    pass

log("spoken once")
for _ in progress(range(2), description="steps", every=1):
    pass
result = {"rank": get_rank(), "means": {k: float(v) for k, v in means.items()}, "averages": averager.averages(),
          "gathered": all_gather_object({"rank": rank}), "found": found}
(answer / f"{rank}.json").write_text(json.dumps(result))
shutdown()
"""


def test_two_processes_under_slurm_variables(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in (0, 1):
        variables = without(dict(os.environ), *TORCHRUN, "SLURM_STEP_NUM_TASKS") | {
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURM_NTASKS": "2",
            "SLURM_STEP_ID": "0",
            "SLURM_JOB_NODELIST": "127.0.0.1",
            "MASTER_PORT": str(port),
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
        }
        variables.pop("MASTER_ADDR", None)
        command = [sys.executable, "-c", TWO_PROCESSES, str(tmp_path)]
        processes.append(
            subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    try:
        outputs = [process.communicate(timeout=90) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs

    for rank in (0, 1):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        assert result == {
            "rank": rank,
            "means": {"boxes": 5.0, "loss": 2.0},
            "averages": {"loss": 2.5, "rare": 7.0},  # (4 + 1 + 2 + 3) / 4 steps, not the mean of two means (3)
            "gathered": [{"rank": 0}, {"rank": 1}],
            "found": rank == 1,  # what the first process fetched
        }
    assert outputs[0][0].count("spoken once") == 1
    assert "steps: 2/2" in outputs[0][0]
    assert outputs[1][0] == ""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_processes_that_do_not_come(rank, monkeypatch, capsys):
    """One of two is there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    meeting = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in meeting.items():
        monkeypatch.setenv(name, value)
    assert call_program("--device", "cpu", "--timeout", "1") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("main.py: error: not all of the 2 processes met within 1 s at env://: ")
