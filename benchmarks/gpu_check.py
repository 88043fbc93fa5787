"""Whether everything is right and fast on a GPU: `bash scripts/gpu_check.sh [OUT]`. Needs no data.

    ops      every check of models/ops/test.py, on every path; compute-sanitizer over them, where it is installed
    parity   the official figures of tests/parity, by dtype, compiled and not
    step     how often a training step waits for the GPU
    speed    deformable attention by path; training and evaluation of whole models by precision
    resume   a run with --deterministic that was killed ends with the same bits as one that was not
    ddp      the losses of all GPUs together, by NCCL, are those of one; on a CPU two processes by gloo

Each part is a process of its own with a time limit. Its result is OUT/parts/PART.json, written when it is done; a part
whose file is there, of this GPU, is not run again. report.json and report.md hold all that is done, and are written
after each part. Without a GPU the parts run small on the CPU, to show that they can run. Exit status 1: something
failed, or is not as it should be.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started by its path: find the packages from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks import gpu_report, model, ms_deform_attn, report
from samdetr.engine import predict
from samdetr.models.ops import kernels, test as checks
from samdetr.util.checkpoint import read_file
from samdetr.util.cuda_graphs import GraphedNetwork
from samdetr.util.device import set_arithmetic

ROOT = Path(__file__).resolve().parents[1]
# Seconds on a GPU: 25 minutes in all. "speed" ends by itself before its limit, and says what it left out.
LIMITS = {"ops": 180, "parity": 240, "step": 140, "speed": 650, "resume": 170, "ddp": 120}
IMAGES, EPOCHS = 118_287, (12, 50)  # COCO train2017
# Published models by family; the first of each also compiled.
PARITY = {
    "sam_detr": ("r50_smca_e12", "r50_ms_smca_e50"),
    "deformable_detr": ("multi_scale", "multi_scale_refine_two_stage"),
    "sap_detr": ("r50",),
}
# Largest differences. The figures' float64 holds a float32 encoding of positions, whose sines GPUs round otherwise:
# logits move by 1e-7, as on other processors (tests/parity/cases.py). 16 bits: of the summed losses, relative.
BOUNDS = {"float64": 1e-5, "float32": 1e-3, "bfloat16": 0.1, "float16": 0.03}
MODES = ("plain float32", "bf16 + compile", "float32", "bf16", "tf32", "bf16 deterministic")  # the first matter most
MODELS = {"R50_SMCA": 4, "R50_DC5_SMCA": 1, "R50_MS_SMCA": 2, "DEFORMABLE_R50": 4, "SAP_R50": 4}  # images of a step
TINY = (
    "--preset tiny --multiscale --backbone_level 5 --dec_layers 5 --num_queries 10 --hidden_dim 32 "
    "--dim_feedforward 64 --train_sizes 64 --eval_size 64 --batch_size 4 --num_workers 0 --deterministic --seed 3"
)


def attempt(check: Callable[[], str]) -> dict:
    """What a check says, and whether it holds; a failed one must not hide those after it."""
    try:
        return {"ok": True, "text": check()}
    except Exception as error:
        return {"ok": False, "text": " ".join(f"{type(error).__name__}: {error}".split())[:400]}


def require(condition: bool, text: str) -> str:
    if not condition:
        raise AssertionError(text)
    return text


def ops(device: str) -> dict:
    index = 0 if device == "cuda" else None
    reason, found = kernels.why_not(device, index), {}
    paths = {"plain": kernels.plain_path, **({} if reason else {"compiled": contextlib.nullcontext})}
    for path, setting in paths.items():
        for name, check in checks.checks(device):
            if device == "cpu" and "float32, odd" not in name:
                continue
            if (device, path, name) == ("cuda", "plain", "determinism"):
                continue  # grid_sample has no deterministic backward on CUDA
            with setting():
                found[f"{path}: {name}"] = attempt(check)
    if device == "cuda":
        found["the compiled path runs"] = {"ok": reason is None, "text": reason or "yes"}
        if sanitizer := shutil.which("compute-sanitizer"):
            found["compute-sanitizer memcheck"] = attempt(partial(sanitize, sanitizer))
    return {"checks": found}


def sanitize(program: str) -> str:
    words = [program, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "models/ops/test.py", "odd"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    return require(done.returncode == 0, (done.stdout.strip().splitlines() or ["no output"])[-1])


def of_tests(name: str) -> Any:
    if str(ROOT / "tests") not in sys.path:
        sys.path.insert(0, str(ROOT / "tests"))
    return import_module(name)


def parity(device: str) -> dict:
    found = {}
    for family, variants in PARITY.items() if device == "cuda" else [("sam_detr", ("r50_smca_e12",))]:
        for variant in variants:
            plans = [(dtype, False) for dtype in BOUNDS]
            if variant == variants[0]:
                plans += [("float32", True), ("float64", True)]
            for dtype, compiled in plans if device == "cuda" else [("float32", False), ("bfloat16", False)]:
                name = f"{family} {variant} {dtype}{' compiled' * compiled}"
                check = partial(official, family, variant, dtype=dtype, compiled=compiled, device=device)
                found[name] = attempt(check)
    return {"checks": found}


def official(family: str, variant: str, *, dtype: str, compiled: bool, device: str) -> str:
    """The official weights in, the summed losses out, and the last layer's boxes (these not in 16 bits)."""
    cases, helpers, fill = (of_tests(name) for name in ("parity.cases", "helpers", "reference_fill"))
    facts, figures = cases.read_figures(variant, family=family)
    names = facts.get("fill_names", {})
    state = {name: cases.weight(names.get(name, name), tuple(size)) for name, size in facts["state_dict"].items()}
    convert = import_module(f"samdetr.models.{family}.official_weights").convert_official
    narrow = dtype in ("bfloat16", "float16")
    wide = torch.float32 if narrow else getattr(torch, dtype)
    detector, criterion, _ = helpers.from_flags(["--model", family, *facts["args"]])
    detector.double().load_state_dict(convert(state), strict=True)
    detector.eval().to(device, wide)
    criterion.eval().to(device)
    if compiled:
        detector.compile(dynamic=True)
    batch = cases.pad_images([torch.from_numpy(image) for image in fill.images()]).to(wide).to(device)
    targets = [{name: torch.from_numpy(value).to(device) for name, value in one.items()} for one in fill.targets()]
    targets = [one | {"boxes": one["boxes"].to(wide)} for one in targets]
    with torch.no_grad():
        outputs = predict(detector, batch, getattr(torch, dtype) if narrow else None)
        total = sum(criterion.weighted(criterion(outputs, targets)).values()).item()
    loss = abs(total - facts["total_loss"]) / abs(facts["total_loss"])
    boxes, wanted = outputs["pred_boxes"].cpu().double().numpy(), figures["pred_boxes"][-1]
    boxes = boxes if boxes.shape == wanted.shape else boxes[:, figures["queries"]]
    moved = float(abs(boxes - wanted).max())
    holds = loss <= BOUNDS[dtype] and (narrow or moved <= BOUNDS[dtype])  # false for what is not a number
    return require(holds, f"loss {loss:.1e}, boxes {moved:.1e}, bound {BOUNDS[dtype]:.0e}")


def step(device: str) -> dict:
    families = of_tests("test_speed").FAMILY if device == "cuda" else ["sam"]
    found = {family: attempt(partial(waits, family, device)) for family in families}
    if device == "cuda":
        for name in of_tests("test_cuda_graphs").NETWORKS:
            found[f"evaluation as a CUDA graph: {name}"] = attempt(partial(graphs, name))
        found["evaluation as a CUDA graph: time"] = attempt(time_of_graphs)
    return {"checks": found}


def graphs(name: str) -> str:
    for amp in (None, torch.bfloat16):
        of_tests("test_cuda_graphs").test_replays_equal_the_network(name, amp)
    return "equal to the network"


@torch.no_grad()
def time_of_graphs() -> str:
    """One image, where the host has the least to do at once."""
    bench = model.Bench("R50_SMCA", path="fast", device="cuda", size=(800, 1066), batch=1, amp=torch.bfloat16)
    network = bench.network.eval()
    times = []
    for one in (network, GraphedNetwork(network)):
        times.append(timed(partial(predict, one, bench.batch, bench.amp), "cuda", seconds=2, least=5)[1])
    return "R50 + SMCA, one image, bf16: {:.1f} ms, as a graph {:.1f} ms".format(*(1e3 * t for t in times))


def waits(family: str, device: str) -> str:
    """Synchronisations of an epoch of six steps less those of two, over four, as CUDA counts them."""
    tests, counts = of_tests("test_speed"), []
    for number in (2, 6) if device == "cuda" else (1,):
        loader = tests.batches([2] * number, dtype=torch.float32)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            try:
                tests.train(tests.FAMILY[family], loader, dtype=torch.float32, device=device)
            finally:
                if device == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchronizing CUDA operation" in str(one.message) for one in caught))
    if device == "cpu":
        return "ran; only a GPU can be waited for"
    number = (counts[1] - counts[0]) / 4
    return require(number == 1, f"{number:g} waits a step")


def timed(work: Callable[[], object], device: str, *, seconds: float, least: int) -> tuple[float, float]:
    """Seconds of one call: of the device, by events around many calls without a wait between, and by the clock around
    the same calls and one wait. On a CPU both are of one call by the clock."""
    for _ in range(2 if device == "cuda" else 0):
        work()  # compiles, allocates
    wait(device)
    begin = time.perf_counter()
    work()
    wait(device)
    if device == "cpu":
        return 2 * (time.perf_counter() - begin,)
    number = max(least, min(50, int(seconds / max(1e-6, time.perf_counter() - begin))))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin = time.perf_counter()
    start.record()
    for _ in range(number):
        work()
    end.record()
    wait(device)
    return start.elapsed_time(end) / 1e3 / number, (time.perf_counter() - begin) / number


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def operator_rows(device: str) -> Iterator[dict]:
    shapes = ms_deform_attn.SHAPES if device == "cuda" else {"small": ([(5, 4), (2, 3)], None)}
    paths = [path for path in ms_deform_attn.paths_here(device) if device == "cuda" or path in ("compiled", "plain")]
    for name, (levels, queries) in shapes.items():
        for dtype in ("float32", "bfloat16", "float16") if device == "cuda" else ("float32",):
            inputs = ms_deform_attn.example(levels, queries, batch=2, device=device, dtype=getattr(torch, dtype))
            for path in paths:
                row: dict[str, Any] = {"shape": name, "dtype": dtype, "path": path}
                for kind, task in zip(("forward", "both"), ms_deform_attn.tasks(path, levels, inputs)):
                    on_device, clock = timed(task, device, seconds=0.2, least=3)
                    row[kind] = {"device_ms": 1e3 * on_device, "clock_ms": 1e3 * clock}
                yield row


def model_row(config: str, mode: str, *, device: str, size: tuple[int, int], batch: int) -> dict:
    """Images a second, peak memory and the share of each part of a step; or why not."""
    set_arithmetic(tf32=mode == "tf32", deterministic="deterministic" in mode)
    amp = torch.bfloat16 if "bf16" in mode else None
    row: dict[str, Any] = {"config": config, "mode": mode, "batch": batch}
    try:
        path = "plain" if mode == "plain float32" else "fast"
        bench = model.Bench(config, path=path, device=device, size=size, batch=batch, amp=amp)
        if "compile" in mode:
            bench.network.compile(dynamic=True)
        for name, work in (("train", bench.step), ("evaluate", bench.evaluate)):
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            clock = timed(work, device, seconds=2, least=5)[1]
            row[name] = {"images_s": batch / clock}
            if device == "cuda":
                row[name]["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        row["hours"] = {str(number): number * IMAGES / row["train"]["images_s"] / 3600 for number in EPOCHS}
        row["share"] = shares(bench, device)
    except Exception as error:  # out of memory, say: a row that fails must not hide those after it
        row["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    finally:
        set_arithmetic(tf32=False, deterministic=False)
    return row


def shares(bench: model.Bench, device: str) -> dict[str, float]:
    """Of a step's time, by part, with a wait after each."""
    marks: dict[str, list[float]] = {}
    for _ in range(3 if device == "cuda" else 1):
        wait(device)
        last = time.perf_counter()

        def mark(name: str) -> None:
            nonlocal last
            wait(device)
            now = time.perf_counter()
            marks.setdefault(name, []).append(now - last)
            last = now

        bench.step(mark)
    medians = {name: statistics.median(times) for name, times in marks.items()}
    return {name: value / sum(medians.values()) for name, value in medians.items()}


def speed(device: str) -> dict:
    until = time.monotonic() + LIMITS["speed"] - 90  # the longest row, which compiles
    operators = list(operator_rows(device))
    size, models = ((800, 1066), MODELS) if device == "cuda" else ((64, 64), {"R50_SMCA": 1})
    rows = []
    for mode in MODES if device == "cuda" else ("float32",):
        for config, batch in models.items():
            late = time.monotonic() > until
            row = {"config": config, "mode": mode, "batch": batch, "error": "not measured: no time was left"}
            rows.append(row if late else model_row(config, mode, device=device, size=size, batch=batch))
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
            torch._dynamo.reset()
    return {"operators": operators, "models": rows, "size": size}


def resume(device: str, folder: Path) -> dict:
    """The weights after three epochs (on a CPU two) of two runs, of which one is killed after its first checkpoint."""
    from samdetr.datasets.shapes import write_dataset

    shutil.rmtree(folder, ignore_errors=True)
    write_dataset(folder / "data", num_train=8 if device == "cpu" else 64, num_val=2, size=64, seed=0)
    epochs = "2" if device == "cpu" else "3"
    command = [sys.executable, *tiny_run(device, folder), "--epochs", epochs]

    def start(name: str, *flags: str) -> subprocess.Popen:
        words = [*command, "--output_dir", str(folder / name), *flags]
        with open(folder / f"{name}.log", "a") as log:
            return subprocess.Popen(words, stdout=log, stderr=log)

    def finish(name: str, process: subprocess.Popen) -> None:
        require_success(process.wait(timeout=100), folder / f"{name}.log")

    killed = start("killed")
    whole = start("whole")
    first, until = folder / "killed" / "checkpoint.pth", time.monotonic() + 100
    while killed.poll() is None and not first.exists() and time.monotonic() < until:
        time.sleep(0.02)
    was_running = killed.poll() is None
    killed.kill()
    killed.wait()
    finish("whole", whole)
    finish("killed", start("killed", "--resume", "auto"))
    files = [folder / name / "checkpoint.pth" for name in ("whole", "killed")]
    one, other = (read_file(str(file), name="checkpoint")["model"] for file in files)
    same = one.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in one.items())
    how = "killed after the first checkpoint" if was_running else "was over before it could be killed"
    shutil.rmtree(folder)
    text = f"{how}; {'equal' if same else 'other'} bits"
    return {"checks": {"killed and resumed": {"ok": same and was_running, "text": text}}}


def ddp(device: str, folder: Path) -> dict:
    """An epoch of one process, and of one for each GPU on a share of every batch."""
    from samdetr.datasets.shapes import write_dataset

    shutil.rmtree(folder, ignore_errors=True)
    number = torch.cuda.device_count() if device == "cuda" else 2
    write_dataset(folder / "data", num_train=4 * number, num_val=number, size=64, seed=0)
    program = [*tiny_run(device, folder), "--epochs", "1", "--backbone_norm", "frozen", "--backbone_weights", "none"]
    launcher = ["-m", "torch.distributed.run", "--nnodes", "1", "--nproc_per_node", str(number), "--standalone"]
    losses = []
    for name, words, batch in (("one", [], 2 * number), ("all", launcher, 2)):
        words = [sys.executable, *words, *program, "--batch_size", str(batch), "--output_dir", str(folder / name)]
        with open(folder / f"{name}.log", "w") as log:
            status = subprocess.run(words, stdout=log, stderr=log, timeout=100).returncode
        require_success(status, folder / f"{name}.log")
        losses.append(json.loads((folder / name / "log.txt").read_text().splitlines()[-1])["train_loss"])
    shutil.rmtree(folder)
    apart = abs(losses[1] - losses[0]) / abs(losses[0])
    text = f"{number} processes and one: losses {losses[1]:.5f} and {losses[0]:.5f}, {apart:.1e} apart"
    return {"checks": {"losses of all together": {"ok": apart <= 1e-3, "text": text}}}


def tiny_run(device: str, folder: Path) -> list[str]:
    """main.py with a small network and the data of a part's folder."""
    return [str(ROOT / "main.py"), "--coco_path", str(folder / "data"), *TINY.split(), "--device", device]


def require_success(status: int, log: Path) -> None:
    if status:
        raise RuntimeError(f"main.py ended with status {status}: {last_line(log)}")


def last_line(file: Path) -> str:
    return (file.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]


def environment(device: str) -> dict:
    about: dict[str, Any] = {"device": device, "torch": torch.__version__, "cuda": torch.version.cuda}
    about["name"] = torch.cuda.get_device_name() if device == "cuda" else report.processor()
    about["path"] = kernels.why_not(device, 0 if device == "cuda" else None) or "compiled kernels"
    return about


def run_part(name: str, out: Path, about: dict) -> dict:
    """In a separate process, whose output is in OUT/parts/PART.log."""
    file, log = out / "parts" / f"{name}.json", out / "parts" / f"{name}.log"
    file.unlink(missing_ok=True)
    begin = time.monotonic()
    words = [sys.executable, __file__, str(out), "--inside", name]
    # cuBLAS wants its variable before it starts.
    variables = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    if about["device"] == "cpu":
        variables["OMP_NUM_THREADS"] = "1"
    with open(log, "w") as output:
        process = subprocess.Popen(words, stdout=output, stderr=output, env=variables, start_new_session=True)
        try:
            status = process.wait(timeout=LIMITS[name])
            reason = "" if status == 0 and file.exists() else f"exit status {status}: {last_line(log)}"
        except subprocess.TimeoutExpired:
            reason = f"took more than {LIMITS[name]} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with all that it started
            process.wait()
    result = {"error": reason} if reason else json.loads(file.read_text())
    result |= {"environment": about, "seconds": round(time.monotonic() - begin, 1)}
    if not reason:
        report.write(file, result)
    return result


def done_before(file: Path, about: dict) -> dict | None:
    """The result of an earlier call, if it is of this machine and version."""
    try:
        result = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and result.get("environment") == about else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=Path("output/gpu_check"), help="folder of the results")
    parser.add_argument("--part", choices=LIMITS, help="this one alone, also if it is done")
    parser.add_argument("--inside", choices=LIMITS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = args.out.absolute()
    if args.inside:
        folder = (out / "parts" / "runs",) if args.inside in ("resume", "ddp") else ()
        work: dict[str, Callable] = {
            "ops": ops, "parity": parity, "step": step, "speed": speed, "resume": resume, "ddp": ddp,
        }  # fmt: skip
        report.write(out / "parts" / f"{args.inside}.json", work[args.inside](device, *folder))
        return 0
    try:
        (out / "parts").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"{out}: {error.strerror}; name another folder")
    about = environment(device)
    results: dict[str, dict] = {}
    for name in LIMITS:
        found = done_before(out / "parts" / f"{name}.json", about)
        if found is None or name == args.part:
            if args.part not in (None, name):
                continue
            print(f"{name}: runs, at most {LIMITS[name]} s", flush=True)
            found = run_part(name, out, about)
        results[name] = found
        print(f"{name}: {gpu_report.verdict(found)}", flush=True)
        gpu_report.write_all(out, {"environment": about, "parts": results})
    return int(any(gpu_report.faults(result) for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
