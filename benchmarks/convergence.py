"""Does semantic-aligned matching make training converge faster, and is it alignment? docs/convergence.md answers.

    python benchmarks/convergence.py --output output/convergence
    python benchmarks/convergence.py --output output/convergence --rows off aligner --seeds 4 5 --size 160
    python benchmarks/convergence.py --output output/convergence --report

Trains small networks that differ in one thing, ROWS, on equal data with an equal schedule, as main.py trains them, and
measures each after every epoch (benchmarks/study/measures.py). A finished run is a file in OUTPUT/results, which is
never computed again; Ctrl-C or SIGTERM interrupts, the same command continues. Started once more beside itself, the
program shares the queue: one process a core. Flags that are not listed below go to every run. Tables and figures are
made of the result files alone.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

if __name__ == "__main__":  # started by its path: find the packages from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.report import positive, processor
from benchmarks.study.measures import Measures, instability
from benchmarks.study.report import read_result, write_report
from samdetr.cli import parse
from samdetr.datasets import shapes
from samdetr.datasets.build import build_dataset
from samdetr.training import loop
from samdetr.training.cluster.folder_lock import FolderLock
from samdetr.training.cluster.preemption import INTERRUPTED, PREEMPTED
from samdetr.util.command_line import run_command
from samdetr.util.files import append_json_line, read_json_lines, write_json

# Small enough for a few minutes on one core. 16 queries, because SAP-DETR needs a square number.
COMMON = shlex.split(
    "--backbone resnet18 --backbone_level 3 --backbone_norm learned --backbone_weights none --hidden_dim 128 "
    "--nheads 4 --dim_feedforward 256 --enc_layers 1 --dec_layers 3 --num_queries 16 --dropout 0 --no_crop "
    "--batch_size 16 --lr 6e-4 --lr_backbone 6e-4 --lr_schedule onecycle --num_workers 0 --device cpu --keep 0 "
    "--print_every 1000"
)
SAP = "--model sap_detr --newconvinit --sdg --bbox_embed_diff_each_layer --warmup_iters 0"
SLOW = "--lr_linear_proj_names point_head --lr_linear_proj_mult 0.1"
DEFORMABLE = "--model deformable_detr --num_feature_levels 1 --with_box_refine"
# What is compared: names, and flags of main.py. A row whose flags main.py does not have is skipped.
ROWS = {
    "off": "--sam_resample off",
    "aligner": "",
    "smca": "--smca",
    "average": "--sam_resample average",
    "maximum": "--sam_resample maximum",
    "point": "--sam_points 1",
    "ungated": "--no_sam_reweight",
    "image": "--sam_range image",
    "deformable": DEFORMABLE,
    "deformable-aligner": f"{DEFORMABLE} --aligner",
    "sap": SAP,
    "multiscale": "--multiscale --backbone_level 5",
    "aligner-slow": SLOW,
    "smca-slow": f"--smca {SLOW}",
    "off-dropout": "--sam_resample off --dropout 0.1",
    "aligner-dropout": "--dropout 0.1",
    "smca-dropout": "--smca --dropout 0.1",
    "off-denoising": "--sam_resample off --denoising 5",
    "aligner-denoising": "--denoising 5",
    "smca-denoising": "--smca --denoising 5",
    "aligner-box_noise": "--denoising 5 --denoising_label_noise 0",
    "aligner-label_noise": "--denoising 5 --denoising_box_noise 0",
    "smca-ia_bce": "--smca --class_loss ia_bce",
    "smca-mal": "--smca --class_loss mal",
    "smca-position": "--smca --class_cost position",
    "smca-relation": "--smca --relation",
}
HEADLINE = ("off", "aligner", "smca")
FIRST_SEEDS = 3  # of the headline rows come before all other rows


@dataclass(frozen=True)
class Job:
    """One run of main.py. `name` is that of its result file; `command` has all flags except the folders."""

    row: str
    seed: int
    name: str
    data: Path
    command: list[str]
    facts: dict[str, Any]


def queue(rows: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
    """Rows and seeds, the most telling first: the headline's error bars, then the first seed of every row, ..."""
    order = [(row, seed) for seed in seeds[:FIRST_SEEDS] for row in rows if row in HEADLINE]
    return order + [(row, seed) for seed in seeds for row in rows if (row, seed) not in order]


@contextlib.contextmanager
def measured(keep: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Training inside calls `keep` after each evaluation, with what was measured while it ran."""

    class MeasuringTrainer(loop.Trainer):
        def __init__(self, *parts: Any) -> None:
            super().__init__(*parts)
            self.since = time.process_time()

        def _metrics(self) -> dict[str, Any]:
            with Measures(self.parts.network, self.parts.criterion) as measures:
                metrics = super()._metrics()
            now = time.process_time()
            keep({"epoch": self.state.epoch, "cpu_seconds": now - self.since, **measures.summary()})
            self.since = now
            return metrics

    with patch.object(loop, "Trainer", MeasuringTrainer):
        yield


def run(job: Job, output: Path, *, measure: bool = True) -> int:
    """Train, or go on training; the exit status of main.py. The result is written when the last epoch is done."""
    folder = output / "runs" / job.name
    words = [*job.command, "--coco_path", str(job.data), "--output_dir", str(folder), "--resume", "auto"]

    def keep(line: dict[str, Any]) -> None:
        append_json_line(folder / "measures.txt", line)

    with measured(keep) if measure else contextlib.nullcontext():
        status = import_module("samdetr.main").main(words)
    if status == 0:
        write_json(output / "results" / f"{job.name}.json", result(job, folder), indent=None)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    return status


def result(job: Job, folder: Path) -> dict[str, Any]:
    """All figures of a run that has ended in `folder`."""
    file = folder / "measures.txt"
    seen = {line["epoch"]: line for line in (read_json_lines(file) if file.is_file() else [])}  # the last of each epoch
    epochs, before = [], None
    for line in read_json_lines(folder / "log.txt"):
        found = {"ap": line["test_coco_eval_bbox"], "train_loss": line["train_loss"], "test_loss": line["test_loss"]}
        if measures := seen.get(line["epoch"]):
            matches = measures.pop("matches")
            found |= {**measures, "instability": instability(before, matches) if before else None}
            before = matches
        epochs.append(found)
    about = json.loads((folder / "settings.json").read_text())["about"]
    made_with = {name: about[name] for name in ("commit", "changed", "versions")}
    return {**job.facts, **made_with, "row": job.row, "seed": job.seed, "command": job.command, "epochs": epochs}


def jobs(options: argparse.Namespace, further: Sequence[str], *, data: Path, kind: str) -> list[Job]:
    """The runs in order. Raises ValueError."""
    images = "all" if options.coco_path else options.images
    facts = {
        "processor": processor(),
        "data": kind,
        "size": options.size,
        "images": images,
        "number_of_epochs": options.epochs,
    }
    sides = ["--train_sizes", str(options.size), "--eval_size", str(options.size), "--max_size", str(2 * options.size)]
    common = [*COMMON, *sides, "--epochs", str(options.epochs), *further]
    settings = parse([*common, "--coco_path", str(data)]).settings  # what is wrong here is wrong in every row
    for name, value in {"eval_every_epoch": 1, "patience": 0, "max_hours": 0, "overfit": 0, "eval": False}.items():
        if getattr(settings.run, name) != value:
            raise ValueError(f"`{name}`: every run needs all epochs and an AP after each; leave the flag out")
    for split in ("train", "val"):
        build_dataset(split, settings.data)
    known = []
    for row in options.rows:
        try:
            with contextlib.redirect_stderr(io.StringIO()) as errors:
                parse([*common, *ROWS[row].split()])
            known.append(row)
        except (SystemExit, ValueError) as error:
            print(f"{row}: left out, {errors.getvalue().strip() or error}", flush=True)
    return [
        Job(
            row,
            seed,
            f"{kind}-{options.size}px-{images}i-{options.epochs}e-{row}-s{seed}",
            data,
            [*common, *ROWS[row].split(), "--seed", str(seed)],
            facts,
        )
        for row, seed in queue(known, options.seeds)
    ]


def train_all(options: argparse.Namespace, further: Sequence[str]) -> int:
    """Work through the queue. Returns an exit status. Raises ValueError."""
    output: Path = options.output
    if options.coco_path:
        data, kind = options.coco_path, options.coco_path.resolve().name
    else:
        data, kind = output / "data" / f"shapes{options.size}-{options.images}", "shapes"
        drawn = {"size": options.size, "num_train": options.images, "num_val": options.val_images}
        with FolderLock(output / "data"):
            if status := shapes.main([f"--output={data}", *(f"--{name}={value}" for name, value in drawn.items())]):
                return status
    failed: list[str] = []
    deadline = time.monotonic() + 3600 * options.budget
    todo = jobs(options, further, data=data, kind=kind)
    (output / "results").mkdir(parents=True, exist_ok=True)
    for number, job in enumerate(todo, 1):
        if is_done(output, job):
            continue
        if time.monotonic() >= deadline:
            left = sum(not is_done(output, one) for one in todo[number - 1 :])
            print(f"--budget is used up; the same command goes on with the runs that are left: {left}", flush=True)
            break
        print(f"run {number} of {len(todo)}: {job.name}", flush=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(FolderLock(output / "locks" / job.name))
            except ValueError:
                print("another process is at it", flush=True)
                continue
            if is_done(output, job):  # meanwhile
                continue
            status = run(job, output, measure=not options.no_measures)
        if status in (PREEMPTED, INTERRUPTED):
            return status
        if status:
            failed.append(job.name)
    if failed:
        print(f"not finished: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def is_done(output: Path, job: Job) -> bool:
    """Whether there is a result. Raises ValueError: it is of other settings."""
    file = output / "results" / f"{job.name}.json"
    if not file.exists():
        return False
    old = read_result(file)["command"]
    if old != job.command:
        before, now = (parse(words).settings.flat() for words in (old, job.command))
        changes = [f"`{name}` {before.get(name)}, now {now[name]}" for name in now if now[name] != before.get(name)]
        raise ValueError(f"{file} was made with other settings ({'; '.join(changes)}); choose another `output`")
    return True


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks/convergence.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of data, runs, results, tables and figures")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--seeds", type=positive, nargs="+", default=[1, 2, 3])
    parser.add_argument("--size", type=positive, default=96, help="side of the images in pixels")
    parser.add_argument("--images", type=positive, default=1500, help="drawn to train on")
    parser.add_argument("--val_images", type=positive, default=150, help="drawn to evaluate and measure on")
    parser.add_argument("--coco_path", type=Path, help="a data set in COCO format instead of drawn shapes")
    parser.add_argument("--epochs", type=positive, default=8)
    parser.add_argument("--budget", type=float, default=1e6, metavar="HOURS", help="start no run after that")
    parser.add_argument("--no_measures", action="store_true", help="train and evaluate only")
    parser.add_argument("--report", action="store_true", help="train nothing; make tables and figures of the results")
    options, further = parser.parse_known_args(argv)

    def program() -> int:
        status = 0 if options.report else train_all(options, further)
        if options.report or (status not in (PREEMPTED, INTERRUPTED) and any(options.output.glob("results/*.json"))):
            write_report(options.output)
        return status

    return run_command("benchmarks/convergence.py", program)


if __name__ == "__main__":
    sys.exit(main())
