"""The golden run: what a few short trainings give, in float64, from the command line to the files that they write.

    python tests/golden.py            show what differs from tests/golden.json
    python tests/golden.py --write    the same, then replace tests/golden.json

It uses main.py's flags and output files only, so it survives changes to everything behind them. Each run makes 12 steps
in 2 epochs, with warm-up, --accumulate 2, gradients clipped in some steps, --ema and an evaluation after each epoch.
Without dropout, --eval follows. With dropout come crops, and a second run resumes in the middle of the second epoch.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torchvision.transforms import v2

REPOSITORY = Path(__file__).parents[1]
FILE = Path(__file__).with_suffix(".json")

# No width is its default, so that a value that is fixed somewhere shows.
SMALL = (
    "--backbone resnet18 --backbone_norm learned --backbone_weights none --hidden_dim 32 --nheads 4 "
    "--dim_feedforward 64 --enc_layers 1 --dec_layers 3 --num_queries 16"
)
NETWORKS = {
    "sam_detr": f"{SMALL} --multiscale --dec_layers 5 --smca --clip_max_norm 30",
    "deformable_detr": f"{SMALL} --model deformable_detr --backbone_level 4 --with_box_refine --two_stage "
    "--num_feature_levels 3 --clip_max_norm 40",
    "sap_detr": f"{SMALL} --model sap_detr --backbone_level 4 --meshgrid_refpoints_xy --newconvinit --sdg "
    "--bbox_embed_diff_each_layer --clip_max_norm 15",
}
# Without crops and resizing, whose pixels depend on torchvision's version; with both and dropout, which is PyTorch's.
SAME_EVERYWHERE = "--no_crop --train_sizes 64 --eval_size 64 --dropout 0"
VERSION_DEPENDENT = "--train_sizes 40 48 --eval_size 48 --max_size 64 --dropout 0.1"
ROWS = {
    **{f"{name}, dropout 0": f"{flags} {SAME_EVERYWHERE}" for name, flags in NETWORKS.items()},
    **{f"{name}, dropout 0.1": f"{flags} {VERSION_DEPENDENT}" for name, flags in NETWORKS.items()},
}
# 24 images in steps of 2 x 2: 6 steps an epoch.
DATA = "--batch_size 2 --num_workers 0 --device cpu"
TRAINING = "--epochs 2 --lr_drop 1 --lr 1e-3 --lr_backbone 1e-4 --warmup_iters 3 --accumulate 2 --ema 0.99 --seed 7"
MIDDLE, SAVE_MIDDLE = "checkpoint0001_000003.pth", "--save_every_iterations 3 --keep 9"
DETECTIONS = 12  # that are recorded, those of the highest scores


def measure() -> dict[str, Any]:
    """Every row, in another process: the default dtype and the hooks would stay."""
    with tempfile.TemporaryDirectory() as folder:
        launchers = ("SLURM_", "TORCHELASTIC_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_")
        environ = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
        environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(
            [sys.executable, __file__, "--inside", folder], env=environ, cwd=folder, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"the golden run failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return json.loads((Path(folder) / "golden.json").read_text())


def measure_inside(folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    widen_inputs()
    round_logarithms()
    norms: list[float] = []
    record_gradients(norms)
    draw = [sys.executable, "-m", "samdetr.datasets.shapes", "--output", str(folder / "shapes")]
    subprocess.run([*draw, *shlex.split("--num_train 24 --num_val 7 --size 64")], cwd=REPOSITORY, check=True)
    rows = {}
    for number, (name, flags) in enumerate(ROWS.items()):
        norms.clear()
        output = folder / str(number)
        plain = name.endswith("dropout 0")
        call_main(folder, f"{flags} {TRAINING} {'' if plain else SAVE_MIDDLE} --output_dir {output}")
        rows[name] = {"gradients": list(norms), **summary(output)}
        if plain:
            rows[name] |= detections(folder, output)
        else:
            rows[name]["resumed differs in"] = resume(folder, output, flags)
        shutil.rmtree(output)
    return {"sine": checksum(sines()), "draws": checksum(draws()), "rows": rows}


def detections(folder: Path, output: Path) -> dict[str, Any]:
    """What --eval writes for the newest checkpoint."""
    call_main(folder, f"--eval --resume {output}/checkpoint.pth --output_dir {output}/eval")
    found = json.loads((output / "eval" / "detections.json").read_text())
    return {
        "eval": json.loads((output / "eval" / "eval.json").read_text())["coco_eval_bbox"],
        "detections": sorted(found, key=lambda one: -one["score"])[:DETECTIONS],
    }


def resume(folder: Path, output: Path, flags: str) -> list[str]:
    """Continue from the checkpoint in the middle; what differs then from the uninterrupted run."""
    resumed = output / "resumed"
    resumed.mkdir()
    shutil.copy(output / MIDDLE, resumed)
    first = (output / "log.txt").read_text().splitlines(keepends=True)[0]
    (resumed / "log.txt").write_text(first)
    call_main(folder, f"{flags} {TRAINING} --resume auto --output_dir {resumed}")
    return unlike(output, resumed)


def call_main(folder: Path, flags: str) -> None:
    """Run main.py as `python main.py` does."""
    sys.argv = ["main.py", "--coco_path", str(folder / "shapes"), *shlex.split(f"{DATA} {flags}")]
    try:
        runpy.run_path(str(REPOSITORY / "main.py"), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"main.py ended with status {end.code}: {flags}") from None


def round_logarithms() -> None:
    """The first boxes of two stages are float32, as published; the last place of their logarithms is not the same on
    every processor, so they are computed in float64 here and rounded."""
    log = Tensor.log
    Tensor.log = lambda values: log(values.double()).to(values.dtype)


def widen_inputs() -> None:
    """Let what comes into the outermost modules, images and targets, be float64; the loader gives float32."""
    depth = 0

    def before(module: nn.Module, args: tuple) -> tuple:
        nonlocal depth
        depth += 1
        # Transforms are modules, too; images and boxes leave them as plain tensors.
        return widened(args) if depth == 1 and not isinstance(module, (v2.Transform, v2.Compose)) else args

    def after(*_: Any) -> None:
        nonlocal depth
        depth -= 1

    nn.modules.module.register_module_forward_pre_hook(before)
    nn.modules.module.register_module_forward_hook(after, always_call=True)


def widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if type(value) is Tensor and value.dtype == torch.float32 else value
    if isinstance(value, (list, tuple)):
        return type(value)(map(widened, value))
    if isinstance(value, dict):
        return {name: widened(part) for name, part in value.items()}
    if dataclasses.is_dataclass(value):
        value = copy.copy(value)
        for name, part in list(vars(value).items()):
            object.__setattr__(value, name, widened(part))
    return value


def record_gradients(norms: list[float]) -> None:
    """Append the norm of all gradients before each step of an optimiser, clipped."""

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        assert all(gradient.dtype == torch.float64 for gradient in gradients)
        norms.append(nn.utils.get_total_norm(gradients).item())

    register_optimizer_step_pre_hook(before)


def summary(output: Path) -> dict[str, Any]:
    """The log, and sums and norms of what the newest checkpoint holds."""
    checkpoint = torch.load(output / "checkpoint.pth", map_location="cpu", weights_only=True)
    moments = checkpoint["optimizer"]["state"]
    return {
        "log": [json.loads(line) for line in (output / "log.txt").read_text().splitlines()],
        "model": {name: sums([tensor]) for name, tensor in checkpoint["model"].items()},
        "ema": sums(list(checkpoint["ema"]["model"].values())),
        "exp_avg": sums([state["exp_avg"] for state in moments.values()]),
        "exp_avg_sq": {str(index): state["exp_avg_sq"].sqrt().norm().item() for index, state in moments.items()},
    }


def sums(tensors: list[Tensor]) -> list[float]:
    """Sum and norm."""
    values = torch.cat([tensor.double().flatten() for tensor in tensors])
    return [values.sum().item(), values.norm().item()]


def unlike(straight: Path, resumed: Path) -> list[str]:
    """What of a run's last checkpoint and log a resumed one has not to the bit."""
    one, other = (dict(flat(load(folder))) for folder in (straight, resumed))
    names = [name for name in sorted(one.keys() | other.keys()) if not same(one.get(name), other.get(name))]
    logs = [(folder / "log.txt").read_text() for folder in (straight, resumed)]
    return names + (["log.txt"] if logs[0] != logs[1] else [])


def load(folder: Path) -> dict[str, Any]:
    content = torch.load(folder / "checkpoint.pth", map_location="cpu", weights_only=True)
    return {name: content[name] for name in ("model", "ema", "optimizer", "epoch", "iteration", "samples_seen")}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves by the way to them; a list of numbers is one."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from flat(part, f"{name}/{key}")
    elif isinstance(value, list) and not is_numbers(value):
        for key, part in enumerate(value):
            yield from flat(part, f"{name}/{key}")
    else:
        yield name, value


def is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(part) in (int, float) for part in value)


def differences(old: dict[str, Any], new: dict[str, Any], *, tolerance: float) -> list[str]:
    """One line for each value that is new, gone, or further away than that from the old one, relative to it; in a list
    of numbers, relative to the largest, and to SMALLEST at least."""
    one, other = dict(flat(old)), dict(flat(new))
    lines = [f"{name}: gone (was {one[name]})" for name in one if name not in other]
    for name, value in other.items():
        if name not in one:
            lines.append(f"{name}: new, {value}")
        elif (distance := relative(one[name], value)) > tolerance:
            lines.append(f"{name}: {one[name]} -> {value} ({distance:.1e})")
    return lines


# Gradients that are 0 except for rounding, as of biases before a norm, move weights by 1e-11 in other directions in
# each version of PyTorch; below this, differences are not relative.
SMALLEST = 0.1


def relative(one: Any, other: Any) -> float:
    ones, others = (value if isinstance(value, list) else [value] for value in (one, other))
    if not (is_numbers(ones) and is_numbers(others) and len(ones) == len(others)):
        return 0 if one == other else float("inf")
    scale = max(map(abs, [*ones, *others, SMALLEST]))
    distance = max((abs(a - b) for a, b in zip(ones, others)), default=0)
    return distance / scale


# What PyTorch does otherwise on some processors and in some versions.


def sines() -> Tensor:
    """The position encoding is float32, as published; the last place of a sine is not the same everywhere."""
    angles = torch.arange(100_000, dtype=torch.float32) / 2**14
    return torch.cat([angles.sin(), angles.cos()])


def draws() -> Tensor:
    """What dropout drops, how images are cropped, and how they are resized."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
        crops = [v2.RandomCrop(40)(image), v2.functional.resize(image, [41, 41], antialias=True)]
        parts = [F.dropout(torch.ones(10_000, dtype=torch.float64), 0.1), *crops, torch.rand(9), torch.randperm(9)]
    return torch.cat([part.double().flatten() for part in parts])


def checksum(values: Tensor) -> int:
    return zlib.crc32(values.numpy().tobytes())


def rounded(value: Any) -> Any:
    """Floats to 12 digits."""
    if isinstance(value, float):
        return float(f"{value:.12g}")
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value


def as_text(content: dict[str, Any]) -> str:
    """JSON, a line for each part of a row."""
    rows = (
        f"{json.dumps(name)}: {{\n"
        + ",\n".join(f"{json.dumps(part)}: {json.dumps(value)}" for part, value in row.items())
        + "\n}"
        for name, row in content["rows"].items()
    )
    head = "".join(f'"{name}": {content[name]},\n' for name in ("sine", "draws"))
    return f'{{\n{head}"rows": {{\n' + ",\n".join(rows) + "\n}\n}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace tests/golden.json")
    parser.add_argument("--tolerance", type=float, default=1e-9, help="relative; what differs by more is shown")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        (args.inside / "golden.json").write_text(json.dumps(measure_inside(args.inside)))
        return 0
    new = rounded(measure())
    old = json.loads(FILE.read_text()) if FILE.exists() else {"rows": {}}
    lines = differences(old, new, tolerance=args.tolerance)
    print(*lines, f"{len(lines)} differences above {args.tolerance:g}", sep="\n")
    if args.write:
        FILE.write_text(as_text(new))
    return 1 if lines and not args.write else 0


if __name__ == "__main__":
    sys.exit(main())
