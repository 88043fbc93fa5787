"""Runs training under faults drawn at random from a seed, and checks the outcome of each.

    python benchmarks/soak.py --faults 50 --seed 0

A small run, in one process or two (gloo), is disturbed again and again and restarted with --resume auto. Each fault
must have the outcome in the table KINDS: an exit status, and a line that names what and where. When a run is complete,
its weights, optimiser and log must equal those of the undisturbed run, to the bit; then the next run starts. Ends with
status 1 if an outcome differs.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # started by its path: find the packages from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.report import positive, surroundings, write
from samdetr.datasets.shapes import write_dataset
from samdetr.util.checkpoint import checksum, read_file

NETWORK = (
    "--backbone resnet18 --backbone_level 3 --backbone_norm learned --backbone_weights none --hidden_dim 32 --nheads 4 "
    "--dim_feedforward 64 --enc_layers 1 --dec_layers 2 --num_queries 10 --smca"
)
RUN = (
    "--train_sizes 64 --eval_size 64 --no_crop --num_workers 1 --device cpu --epochs 3 --lr_drop 2 --lr 1e-3 "
    "--save_every_iterations 2 --keep -1 --timeout 20 --ema 0.9 --max_bad_steps 1 --resume auto"
)
STEPS = 12  # 3 epochs of 4
SIGKILL, PREEMPTED, INTERRUPTED = -9, 75, 130


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A fault, and its outcome.

    Args:
        at: the place in the program (benchmarks/faults.py); None: the files, between two runs.
        do: what happens there.
        often: how many times a run passes the place.
        status: exit status of the process that it strikes.
        others: exit status of the other one.
        says: pattern of a line on stderr, or on stdout if the run continues.
    """

    at: str | None
    do: str
    often: int = STEPS
    status: int
    others: int
    says: str


_NAMED = r"error: rank \d "
_STOPPED = "stopped after step"
KINDS = {
    "kill a process": Kind(at="step", do="SIGKILL", status=SIGKILL, others=1, says=_NAMED),
    "kill in a save": Kind(at="save", do="SIGKILL", often=6, status=SIGKILL, others=1, says=_NAMED),
    "kill in evaluation": Kind(at="evaluation", do="SIGKILL", often=6, status=SIGKILL, others=1, says=_NAMED),
    "SIGTERM": Kind(at="step", do="SIGTERM", status=PREEMPTED, others=PREEMPTED, says=_STOPPED),
    "Ctrl-C": Kind(at="step", do="SIGINT", status=INTERRUPTED, others=INTERRUPTED, says=_STOPPED),
    "SIGTERM to workers too": Kind(at="step", do="SIGTERM to all", status=PREEMPTED, others=PREEMPTED, says=_STOPPED),
    "full disk": Kind(at="step", do="fill the disk", status=2, others=2, says="cannot write to --output_dir .*large"),
    "newest checkpoint cut": Kind(
        at=None, do="cut checkpoint", status=0, others=0, says="warning: .*checkpoint.pth.* instead"
    ),
    "image cut": Kind(at=None, do="cut image", status=2, others=2, says="training images .* cannot be used, more than"),
    "worker killed": Kind(at="step", do="kill a worker", status=1, others=1, says=r"error: .*worker \(pid.* killed"),
    "loss not finite": Kind(at="loss", do="nan", status=2, others=2, says=r"error: .*not finite in epoch \d, iter"),
}


class Forks:
    """Runs main.py in forks of one process, which saves the time of imports: see benchmarks/faults.py."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("faults.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def run(self, argv: Sequence[str], folder: Path, *, ranks: int, faults: Sequence[dict]) -> list[int]:
        """Exit statuses by rank; `folder`, emptied before, gets what the processes print: 0.out, 0.err, ..."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        job = {"argv": argv, "ranks": ranks, "port": free_port(), "faults": faults, "folder": str(folder)}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)


class Soak:
    def __init__(self, folder: Path, *, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.data = folder / "data"
        write_dataset(self.data, num_train=16, num_val=7, size=64, seed=0)
        self.forks = Forks()
        self.ends: list[bool] = []  # whether each run ended as the undisturbed one
        self.wanted: dict[int, Path] = {}

    def run(self, output: Path, ranks: int, faults: Sequence[dict] = ()) -> tuple[list[int], str]:
        """Exit statuses, and all that the processes print."""
        printed = self.folder / "printed"
        flags = f"{RUN} {NETWORK} --batch_size {4 // ranks} --coco_path {self.data} --output_dir {output}"
        statuses = self.forks.run(flags.split(), printed, ranks=ranks, faults=faults)
        return statuses, "".join(file.read_text() for file in sorted(printed.iterdir()))

    def undisturbed(self, ranks: int) -> Path:
        if ranks not in self.wanted:
            self.wanted[ranks] = self.folder / f"undisturbed{ranks}"
            statuses, text = self.run(self.wanted[ranks], ranks)
            assert statuses == [0] * ranks, text
        return self.wanted[ranks]

    def soak(self, number: int) -> list[dict]:
        """Strike `number` faults, each kind once before any is repeated; a row for each. Sets `ends`."""
        rows, kinds = [], []
        while len(rows) < number:
            output, ranks = self.folder / f"run{len(self.ends)}", self.random.choice((1, 2))
            through = False
            while not through:
                kinds = kinds or self.random.sample(sorted(KINDS), len(KINDS))
                name = kinds.pop() if len(rows) < number else None
                row = self.one(name, output, ranks)
                if row["struck"]:
                    rows.append(row)
                elif name:
                    kinds.append(name)  # the run was complete before
                through = row["through"]
            self.ends.append(same(output, self.undisturbed(ranks)))
            shutil.rmtree(output)
        return rows

    def one(self, name: str | None, output: Path, ranks: int) -> dict:
        """Continue a run, with a fault or to its end."""
        kind = KINDS.get(name)
        faults, rank = [], 0
        if kind and kind.at:
            rank = 0 if kind.at == "save" else self.random.randrange(ranks)
            left = max(1, kind.often - progress(output, kind.often))
            faults = [{"at": kind.at, "number": self.random.randint(1, left), "do": kind.do, "rank": rank}]
        elif kind and kind.do == "cut checkpoint":
            if not (output / "checkpoint0000.pth").exists():  # one to cut, and one before it
                self.run(output, ranks, [{"at": "step", "number": 7, "do": "SIGTERM", "rank": 0}])
            with open(output / "checkpoint.pth", "r+b") as file:
                file.truncate(self.random.randrange(file.seek(0, 2)))
        image = self.random.choice(sorted((self.data / "train2017").iterdir()))
        whole = image.read_bytes()
        if kind and kind.do == "cut image":
            image.write_bytes(whole[: len(whole) // 2])
        before = set(output.glob(".*"))  # of a run that was killed
        start = time.monotonic()
        statuses, text = self.run(output, ranks, faults)
        image.write_bytes(whole)
        through = statuses == [0] * ranks
        struck = bool(kind) and (kind.at is None or not through)
        why = []
        if struck:
            wanted = [kind.status if r == rank else kind.others for r in range(ranks)]
            alone = ranks == 1 and kind.status == SIGKILL  # nobody is left to report it
            if statuses != wanted:
                why.append(f"statuses {statuses}, not {wanted}")
            if not alone and not re.search(kind.says, text):
                why.append(f"nothing says {kind.says!r}")
            if kind.status == 2 and set(output.glob(".*")) - before:
                why.append("leaves temporary files")
        elif not through:
            why.append(f"statuses {statuses} without a fault")
        return {
            "fault": name, "processes": ranks, "rank": rank, "statuses": statuses, "struck": struck or bool(why),
            "through": through, "good": not why, "why": "; ".join(why), "seconds": round(time.monotonic() - start, 2),
            "text": text[-3000:] if why else "",
        }  # fmt: skip


def progress(output: Path, often: int) -> int:
    """About how often a run that is resumed has already passed a place."""
    if not (output / "checkpoint.pth").exists():
        return 0
    try:
        saved = read_file(str(output / "checkpoint.pth"), name="soak")
    except ValueError:
        return 0
    return often * (4 * saved["epoch"] + saved["iteration"]) // STEPS


def same(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same weights, optimiser, random numbers and log."""
    first, second = (read_file(str(folder / "checkpoint.pth"), name="soak") for folder in (one, other))
    keys = first.keys() - {"settings", "versions"}
    logs = [(folder / "log.txt").read_bytes() for folder in (one, other)]
    return logs[0] == logs[1] and all(checksum(first[key]) == checksum(second[key]) for key in keys)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", default=50, type=positive)
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args(argv)
    about = surroundings(packages=["torch"], device="cpu", threads=1)
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), seed=args.seed)
        rows = soak.soak(args.faults)
        soak.forks.close()
    for row in rows:
        if not row["good"]:
            print(f"{row['fault']} in rank {row['rank']} of {row['processes']}: {row['why']}\n{row['text']}")
    faults, good = Counter(r["fault"] for r in rows), Counter(r["fault"] for r in rows if r["good"])
    print("| fault | struck | right outcome |\n| --- | --- | --- |")
    for name in sorted(faults):
        print(f"| {name} | {faults[name]} | {good[name]} |")
    print(f"| all | {len(rows)} | {good.total()} |")
    print(f"{sum(soak.ends)} of {len(soak.ends)} runs ended with the bits of the undisturbed one")
    write(args.json, {"about": about, "rows": rows, "ends": soak.ends})
    return 0 if good.total() == len(rows) and all(soak.ends) else 1


if __name__ == "__main__":
    sys.exit(main())
