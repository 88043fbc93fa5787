"""What several test files share."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

import torch
from official import sam_detr as to_official
from torch import multiprocessing

from benchmarks import soak
from samdetr.cli import parse, with_flags
from samdetr.datasets.build import build_dataset
from samdetr.datasets.coco import CocoDetection
from samdetr.models.build import Postprocess, build_criterion, build_model
from samdetr.models.criterion import SetCriterion
from samdetr.models.detector import Detector
from samdetr.models.ops import kernels
from samdetr.training.settings import RunSettings

REPOSITORY = Path(__file__).parents[1]

# No width is its default, so that a value that is fixed somewhere shows.
TINY = shlex.split(
    "--backbone resnet18 --backbone_level 4 --backbone_norm learned --backbone_weights none --hidden_dim 32 --nheads 4 "
    "--dim_feedforward 64 --enc_layers 1 --dec_layers 2 --num_queries 10 --smca"
)
# Five layers, so that every level is attended.
MULTISCALE = [*TINY, *shlex.split("--multiscale --backbone_level 5 --dec_layers 5")]
TINY_DEFORMABLE = shlex.split(
    "--model deformable_detr --backbone resnet18 --backbone_level 4 --backbone_norm learned --backbone_weights none "
    "--hidden_dim 32 --nheads 4 --dim_feedforward 64 --enc_layers 1 --dec_layers 2 --num_queries 10 "
    "--num_feature_levels 3 --enc_n_points 2 --dec_n_points 3"
)
TINY_SAP = shlex.split(
    "-m sap_detr --backbone resnet18 --backbone_level 4 --backbone_norm learned --backbone_weights none "
    "--hidden_dim 32 --nheads 4 --dim_feedforward 64 --enc_layers 1 --dec_layers 3 --num_queries 16 --warmup_iters 0 "
    "--meshgrid_refpoints_xy --newconvinit --sdg --bbox_embed_diff_each_layer"
)
TINY_DATA = shlex.split("--train_sizes 64 --eval_size 64 --no_crop --batch_size 4 --num_workers 0 --device cpu")


def settings(flags: str | list[str] = "") -> RunSettings:
    """What the program makes of these flags."""
    return parse(shlex.split(flags) if isinstance(flags, str) else flags).settings


def data_set(split: str, found: RunSettings) -> CocoDetection:
    """The split as main.py builds it."""
    return build_dataset(split, found.data, seed=found.run.seed)


def from_flags(flags: str | list[str] = "") -> tuple[Detector, SetCriterion, Postprocess]:
    """Network, criterion and post-processing of these flags. Raises ValueError with flags in its text, as programs
    print it."""
    found = settings(flags).with_resolved_norm()
    try:
        detector, criterion, postprocess = build_model(found.trunk, found.family, found.loss)
    except ValueError as error:
        raise ValueError(with_flags(str(error))) from None
    if not found.optimisation.lr_backbone:
        detector.backbone.requires_grad_(False)
    return detector, criterion, postprocess


def criterion_of(flags: str | list[str] = "") -> SetCriterion:
    """Of these flags, without building the network."""
    found = settings(flags)
    return build_criterion(found.trunk, found.family, found.loss)


def call_main(data: Path, *flags: str, network: list[str] = TINY) -> int:
    """Run main.py in this process; its exit status."""
    return call_program("--coco_path", str(data), *TINY_DATA, *network, *flags)


def call_program(*words: str) -> int:
    """Run main.py with these words alone in this process, on one thread; its exit status."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as `run_process`: the same operations in the same order
    try:
        return import_module("samdetr.main").main(words)
    finally:
        torch.set_num_threads(threads)


def run_main(data: Path, *flags: str, network: list[str] = TINY) -> None:
    assert call_main(data, *flags, network=network) == 0


def evaluate(data: Path, checkpoint: Path | str, output: Path, *flags: str) -> tuple[list[float], list[dict]]:
    """Run `main.py --eval` without a word about the network: the twelve figures and the detections."""
    run_main(data, "--eval", "--resume", str(checkpoint), "--output_dir", str(output), *flags, network=[])
    return read_json(output / "eval.json")["coco_eval_bbox"], read_json(output / "detections.json")


def command(data: Path, *flags: str, network: list[str] = TINY) -> list[str]:
    """main.py and its flags, for another process."""
    return [str(REPOSITORY / "main.py"), "--coco_path", str(data), *TINY_DATA, *network, *flags]


def environment(**variables: str) -> dict[str, str]:
    """For other processes: nothing of a launcher that may surround the tests, and one thread."""
    launchers = ("SLURM_", "TORCHELASTIC_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    return inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)} | variables


def run_process(arguments: list[str], *, seconds: int = 120, **variables: str) -> subprocess.CompletedProcess:
    """Run `python arguments` until it ends, whatever its status, but not longer than so many seconds."""
    return subprocess.run(
        [sys.executable, *arguments], env=environment(**variables), capture_output=True, text=True, timeout=seconds
    )


class Forks(soak.Forks):
    """Runs main.py in forks of a process that has imported it, and knows what the last of them printed."""

    def __init__(self) -> None:
        super().__init__(environment())

    def main(self, words: Sequence[str], printed: Path, *, ranks: int = 1, faults: Sequence[dict] = ()) -> list[int]:
        """Exit statuses by rank."""
        self.printed = printed
        return self.run(words, printed, ranks=ranks, faults=faults)

    def out(self, rank: int = 0) -> str:
        return (self.printed / f"{rank}.out").read_text()

    def err(self, rank: int = 0) -> str:
        return (self.printed / f"{rank}.err").read_text()


def in_processes(function: Callable[..., None], arguments: tuple, number: int) -> None:
    """Call `function(rank, *arguments)` in `number` new processes. They are forks of one server that has imported what
    is large, which saves that time.

    Environment and output are those that the server was started with: no `monkeypatch.setenv`, no `capfd`.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["pycocotools.cocoeval", "samdetr.training.loop", "scipy.optimize", "torchvision"]
    )
    with patch.dict(os.environ, environment()):  # where to find the package; the server is started once
        forkserver.ensure_running()
    multiprocessing.start_processes(function, arguments, nprocs=number, start_method="forkserver")


def error_line(stderr: str) -> str:
    """What a run says about its input on stderr, which must be one line."""
    assert stderr.startswith("main.py: error: ")
    assert stderr.count("\n") == 1
    assert stderr.endswith("\n")
    assert stderr[:-1].isprintable()
    assert "Traceback" not in stderr
    return stderr


def damage(image: Path) -> Path:
    """Spoil a JPEG so that only decoding it shows."""
    content = image.read_bytes()
    tables = content.index(b"\xff\xc4") + 4  # Huffman tables; PIL gives up where they make no sense
    image.write_bytes(content[:tables] + bytes(len(content) - tables - 2) + content[-2:])
    return image


def build_tiny(*flags: str, network: list[str] = TINY, num_classes: int = 6) -> tuple[Detector, dict]:
    """A network with random weights everywhere, and its settings. 6 classes: the largest id of the shapes is 5."""
    found = settings([*network, *flags]).replace(num_classes=num_classes).with_resolved_norm()
    torch.manual_seed(0)
    detector = build_model(found.trunk, found.family, found.loss)[0]
    with torch.no_grad():
        for parameter in detector.parameters():  # the last layers of the box heads are 0 otherwise
            parameter += 0.02 * torch.randn_like(parameter)
    return detector, found.flat()


# What an official file says about its network, and nothing more.
OFFICIAL_FLAGS = shlex.split(
    "lr lr_backbone batch_size epochs lr_drop multiscale backbone dilation position_embedding enc_layers dec_layers "
    "dim_feedforward hidden_dim dropout nheads num_queries smca aux_loss coco_path output_dir device seed"
)
# Flags without official counterparts keep their defaults here: C5, frozen norms.
OFFICIAL_TINY = shlex.split(
    "--backbone resnet18 --hidden_dim 32 --nheads 4 --dim_feedforward 64 --enc_layers 1 --dec_layers 2 "
    "--num_queries 100 --smca"
)
OFFICIAL_MULTISCALE = [*OFFICIAL_TINY, *shlex.split("--multiscale --dec_layers 5")]


def save(detector: Detector, values: dict, path: Path, *, official: bool = False, legacy: bool = False) -> None:
    """A file of weights and settings as we write it, or as the official code does after its first epoch."""
    state = detector.state_dict()
    content = {"model": state, "settings": values}
    if official:
        state = {to_official(name): weight for name, weight in state.items()}
        assert None not in state
        # The official decoder knows the box heads a second time.
        state |= {f"transformer.decoder.{k}": v for k, v in state.items() if k.startswith("bbox_embed.")}
        saved = argparse.Namespace(**{name: values[name] for name in OFFICIAL_FLAGS})
        content = {"model": state, "optimizer": {}, "lr_scheduler": {}, "epoch": 0, "args": saved}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)


def read_log(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "log.txt").read_text().splitlines()]


def read_json(path: Path):
    return json.loads(path.read_text())


def forget_kernels() -> None:
    """So that the next call builds or finds them anew."""
    for function in (kernels.load_cpu, kernels.load_cuda, kernels.why_not, kernels.available, kernels.correct):
        function.cache_clear()
