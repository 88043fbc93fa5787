"""Whole models, the plain path beside the fast one: `python benchmarks/model.py --config R50_SMCA`.

Prints a table of parameters, GFLOPs, evaluation (latency, images a second), a training step (forward, losses,
backward, clipping, AdamW) and peak memory, and writes them as JSON with --json. inference/plain.py describes the plain
path; both have the same weights, images and objects (7 an image, without padding), and float32.

Times are medians over rounds in which the paths take turns in one process, so that a busy machine slows both alike;
"cpu" is what all threads together worked. Memory is the largest that a separate process ever holds, less what it held
before there was a network.

inference/counting.py says how FLOPs are counted. Those published, 100 for R50, 210 for DC5 and 203 for three levels,
are of the plain path and of COCO's images, to which 800 x 1120 comes near.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # started by its path: find the packages from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torchvision
from torch import nn

from benchmarks import report
from samdetr.cli import parse
from samdetr.engine import predict
from samdetr.inference.counting import count
from samdetr.inference.plain import plain
from samdetr.models.build import build_model
from samdetr.training.optim import parameter_groups
from samdetr.util.device import place
from samdetr.util.padded_images import PaddedImages

_SAP = "--model sap_detr --newconvinit --sdg --bbox_embed_diff_each_layer"
CONFIGS = {
    "R50": "",
    "R50_SMCA": "--smca",
    "R50_DC5": "--dilation",
    "R50_DC5_SMCA": "--dilation --smca",
    "R50_MS": "--multiscale",
    "R50_MS_SMCA": "--multiscale --smca",
    "DEFORMABLE_R50": "--model deformable_detr",
    "DEFORMABLE_R50_REFINE": "--model deformable_detr --with_box_refine",
    "DEFORMABLE_R50_REFINE_TWO_STAGE": "--model deformable_detr --with_box_refine --two_stage",
    "DEFORMABLE_R50_SINGLE_SCALE": "--model deformable_detr --num_feature_levels 1",
    "DEFORMABLE_R50_SINGLE_SCALE_DC5": "--model deformable_detr --num_feature_levels 1 --dilation",
    "SAP_R50": _SAP,
    "SAP_R50_DC5": f"{_SAP} --dilation",
}
PATHS = ("plain", "fast")
# Format and precision, of what --engines measures beside them.
ENGINES = {
    "onnxruntime": ("onnx", "float32"),
    "onnxruntime_int8": ("onnx", "int8"),
    "openvino": ("openvino", "float32"),
    "openvino_half": ("openvino", "half"),
    "openvino_int8": ("openvino", "int8"),
}
OBJECTS = 7  # of an image; COCO has 7.3


class Bench:
    """A network on one path, its criterion and optimiser, and random images; `evaluate` and `step` are the work."""

    def __init__(
        self,
        config: str,
        *,
        path: str,
        device: str,
        size: tuple[int, int],
        batch: int,
        amp: torch.dtype | None = None,
    ):
        settings = parse(shlex.split(CONFIGS[config])).settings.with_resolved_norm()
        self.amp = amp
        args = settings.optimisation
        torch.manual_seed(0)
        network, criterion, _ = build_model(settings.trunk, settings.family, settings.loss)
        self.clip = args.clip_max_norm
        if path == "plain":
            network, criterion = plain(network), plain(criterion)
        self.network, self.criterion = network, criterion
        fast = path == "fast"
        place(network, torch.device(device), channels_last=None if fast else False)
        rates = ("lr", "lr_backbone", "lr_linear_proj_names", "lr_linear_proj_mult")
        groups = parameter_groups(self.network, **{name: getattr(args, name) for name in rates})
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay, fused=fast)
        images = torch.randn(batch, 3, *size, device=device)
        self.batch = PaddedImages(images, torch.zeros(batch, *size, dtype=torch.bool, device=device))
        centres, sizes = 0.2 + 0.6 * torch.rand(batch, OBJECTS, 2), 0.05 + 0.35 * torch.rand(batch, OBJECTS, 2)
        boxes, labels = torch.cat([centres, sizes], -1), torch.randint(1, 91, (batch, OBJECTS))
        self.targets = [{"labels": one.to(device), "boxes": box.to(device)} for one, box in zip(labels, boxes)]

    def evaluate(self) -> None:
        self.network.eval()
        with torch.no_grad():
            predict(self.network, self.batch, self.amp)

    def step(self, mark: Callable[[str], None] = lambda name: None) -> None:
        """`mark` is called with the name of each part that has ended."""
        self.network.train()
        self.criterion.train()
        outputs = predict(self.network, self.batch, self.amp)
        mark("forward")
        loss = sum(self.criterion.weighted(self.criterion(outputs, self.targets)).values())
        assert torch.isfinite(loss), f"the loss is {loss.item()}"
        mark("losses")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        mark("backward")
        nn.utils.clip_grad_norm_(self.network.parameters(), self.clip)
        self.optimizer.step()
        mark("update")


class Exported:
    """The network of a `Bench` as a file of one size in its engine, post-processing included; it only evaluates."""

    def __init__(self, config: str, *, path: str, device: str, size: tuple[int, int], batch: int):
        from samdetr.inference.engines import open_exported
        from samdetr.inference.export.command import Request, describe
        from samdetr.inference.export.formats import FORMATS
        from samdetr.inference.export.graph import trace
        from samdetr.inference.predictor import Predictor

        bench = Bench(config, path="fast", device="cpu", size=size, batch=batch)
        settings = parse(shlex.split(CONFIGS[config])).settings.with_resolved_norm()
        predictor = Predictor(
            bench.network,
            postprocess=lambda *_: [],
            categories=None,
            settings=settings.flat(),
            device=torch.device("cpu"),
        )
        name, precision = ENGINES[path]
        about = describe(predictor, Request(format=name, size=tuple(size))) | {"precision": precision}
        program = trace(bench.network, top_k=about["top_k"], raw=False, size=tuple(size))
        self.batch = bench.batch
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"network{FORMATS[name].suffix}"
            calibration = [bench.batch.images[:1]] if precision == "int8" else None
            FORMATS[name].write(program, file, about, calibration)
            self.network = open_exported(str(file), device="cpu")

    def evaluate(self) -> None:
        self.network(self.batch)


def seconds(work: Callable[[], object], device: str) -> tuple[float, float]:
    """By the clock, and of all threads of this process."""
    begin, begin_cpu = time.perf_counter(), time.process_time()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, time.process_time() - begin_cpu


def measure_times(config: str, *, paths: list[str], task: str, rounds: int, device: str, **inputs) -> dict:
    """`seconds` of every round, by path; one round before them warms up."""
    kinds = {path: Exported if path in ENGINES else Bench for path in paths}
    work = {path: getattr(kinds[path](config, path=path, device=device, **inputs), task) for path in paths}
    times: dict[str, list] = {path: [] for path in paths}
    for _ in range(rounds + 1):
        for path in paths:
            times[path].append(seconds(work[path], device))
    return {path: values[1:] for path, values in times.items()}


def held(field: str) -> float:
    """MiB of this process: "VmRSS" now, "VmHWM" at most so far; where the system does not tell, at most so far."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**10
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "darwin" else 10)


def measure_memory(config: str, *, path: str, task: str, device: str, **inputs) -> float:
    """MiB, for a separate process. Two rounds: the second step has the optimiser's state, too."""
    before = held("VmRSS")
    bench = Bench(config, path=path, device=device, **inputs)
    for _ in range(2):
        getattr(bench, task)()
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return held("VmHWM") - before


def in_process(function: str, config: str, *, threads: int, **arguments) -> object:
    """Call a function of this file in a separate process; None where that fails, with the reason on stderr."""
    request = json.dumps([function, config, threads, arguments])
    done = subprocess.run([sys.executable, __file__, "--request", request], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"{function} {config} {arguments}: exit status {done.returncode}, {reason}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def answer(request: str) -> None:
    function, config, threads, arguments = json.loads(request)
    torch.set_num_threads(threads)
    print(json.dumps({"times": measure_times, "memory": measure_memory}[function](config, **arguments)))


def measure(config: str, args: argparse.Namespace) -> dict:
    """All about one configuration, by path; prints its rows."""
    small = {"device": "cpu", "size": (32, 32), "batch": 1}
    networks = {path: Bench(config, path=path, **small).network for path in args.paths}
    result: dict = {path: dataclasses.asdict(count(networks.pop(path), args.flops_size)) for path in args.paths}
    result |= {engine: {} for engine in args.engines}
    for path in args.paths:
        numbers = result[path]
        megas = f"{numbers['parameters'] / 1e6:.2f} M parameters, {numbers['trainable'] / 1e6:.2f} M trainable"
        print(f"{config:32} {path:6} {megas}, {numbers['flops'] / 1e9:.1f} GFLOPs", flush=True)
    tasks = [("evaluate", batch) for batch in args.batch] + [("step", args.batch[0])]
    common = {"device": args.device, "size": args.size, "threads": args.threads}
    for task, batch in tasks if args.rounds else []:
        chosen = {"task": task, "batch": batch, **common}
        paths = args.paths + (args.engines if task == "evaluate" else [])
        times = in_process("times", config, paths=paths, rounds=args.rounds, **chosen)
        # Not of engines, whose process has exported before.
        peaks = {path: path in args.paths and in_process("memory", config, path=path, **chosen) for path in paths}
        for path in paths:
            entry = {"peak_mib": peaks[path]}
            if times:
                clock, cpu = zip(*times[path])
                entry |= {
                    "seconds": clock,
                    "median_s": statistics.median(clock),
                    "median_cpu_s": statistics.median(cpu),
                }
            result[path][f"{task}_batch{batch}"] = entry
        print_rows(config, result, f"{task}_batch{batch}", batch, paths)
    return result


def print_rows(config: str, result: dict, name: str, batch: int, paths: list[str]) -> None:
    """What one path has in relation to the first stands behind its figure."""
    base = result[paths[0]][name]
    for path in paths:
        entry = result[path][name]
        cells = [f"{config:32} {path:16} {name:16}"]
        if "median_s" in entry:
            clock, cpu = entry["median_s"], entry["median_cpu_s"]
            cells += [f"{1e3 * clock:8.0f} ms {base['median_s'] / clock:5.2f}x {batch / clock:7.2f} images/s"]
            cells += [f"cpu {1e3 * cpu:8.0f} ms {base['median_cpu_s'] / cpu:5.2f}x"]
        if entry["peak_mib"] and base["peak_mib"]:
            cells += [f"{entry['peak_mib']:8.0f} MiB {entry['peak_mib'] / base['peak_mib']:5.2f}"]
        print(*cells, flush=True)


def whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["R50_SMCA", "R50_DC5_SMCA", "R50_MS_SMCA"]
    parser.add_argument(
        "--config", nargs="+", choices=CONFIGS, default=default, metavar="NAME", help=", ".join(CONFIGS)
    )
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS))
    parser.add_argument(
        "--engines", nargs="+", choices=ENGINES, default=[], help="exported networks beside them, on CPUs"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=report.positive, default=2, help="of the CPU")
    parser.add_argument("--size", type=report.positive, nargs=2, default=[640, 864], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument(
        "--batch", type=report.positive, nargs="+", default=[1, 4], help="for evaluation; training has the first"
    )
    parser.add_argument("--rounds", type=whole, default=3, help="to take medians of; 0: parameters and GFLOPs alone")
    parser.add_argument("--flops_size", type=report.positive, nargs=2, default=[800, 1120], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--request", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.request:
        return answer(args.request)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device here")

    about = {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "device": args.device,
        "name": torch.cuda.get_device_name() if args.device == "cuda" else report.processor(),
        "threads": args.threads,
        "size": args.size,
        "flops_size": args.flops_size,
        "load": os.getloadavg()[0],
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    results = {config: measure(config, args) for config in args.config}
    report.write(args.json, {**about, "configs": results})


if __name__ == "__main__":
    main()
