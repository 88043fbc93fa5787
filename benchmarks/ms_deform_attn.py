"""Times deformable attention at the shapes of this family's models: `python benchmarks/ms_deform_attn.py`.

A row is one shape, type and path. The paths take turns in every round, so that a busy machine slows all of them alike;
figures are medians. "of copy" sets the bytes that have to move at least (every tensor read or written once) over the
time in relation to the speed at which this device copies a large tensor: 100% is the limit of what any kernel can do.

    compiled   the kernel of this device
    ordered    the same with a backward whose sums have one fixed order (CUDA; the CPU's always has)
    deformops  the kernels of that package, where it is installed (`--ops deformops`)
    plain      grid_sample, the path taken where nothing is compiled; samples again in backward
    autograd   the same formula differentiated by autograd, which keeps the samples instead
"""

import argparse
import contextlib
import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # started by its path: find the package from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from samdetr.models.ops import kernels
from samdetr.models.ops.kernels import plain_path
from samdetr.models.ops.ms_deform_attn import by_deformops, ms_deform_attn
from samdetr.models.ops.ms_deform_attn.plain import coordinate_dtype, plain_ms_deform_attn

# An image of 800 x 1066 pixels: strides 8, 16, 32, and 64 in Deformable DETR.
THREE = [(100, 134), (50, 67), (25, 34)]
FOUR = [*THREE, (13, 17)]
SHAPES = {
    "SAM-DETR encoder": (THREE, None),
    "Deformable DETR encoder": (FOUR, None),
    "Deformable DETR decoder": (FOUR, 300),
}
HEADS, CHANNELS, POINTS = 8, 32, 4
DTYPES = ("float64", "float32", "bfloat16", "float16")


def example(levels: list, queries: int | None, *, batch: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Value, locations a few cells around the queries' own cells (or anywhere, for a number of queries), weights."""
    torch.manual_seed(0)
    sizes = torch.tensor([(width, height) for height, width in levels], dtype=torch.float32)
    if queries is None:
        grids = [torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w) for h, w in levels]
        reference = torch.cat(grids).flip(-1).expand(batch, -1, -1)
    else:
        reference = torch.rand(batch, queries, 2)
    offsets = 2 * torch.randn(*reference.shape[:2], HEADS, len(levels), POINTS, 2) / sizes[:, None]
    weights = torch.randn(*reference.shape[:2], HEADS, len(levels) * POINTS).softmax(-1)
    value = torch.randn(batch, sum(h * w for h, w in levels), HEADS, CHANNELS).to(device, dtype)
    wide = coordinate_dtype(value)
    locations = (reference[:, :, None, None, None] + offsets).to(device, wide)
    return [value, locations, weights.view(locations.shape[:-1]).to(device, wide)]


def by_autograd(value: Tensor, levels: list, locations: Tensor, weights: Tensor) -> Tensor:
    return plain_ms_deform_attn(value, [size for level in levels for size in level], locations, weights)


@contextlib.contextmanager
def fixed_order():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


PATHS = {
    "compiled": (ms_deform_attn, contextlib.nullcontext),
    "ordered": (ms_deform_attn, fixed_order),
    "deformops": (ms_deform_attn, lambda: kernels.path("deformops")),
    "plain": (ms_deform_attn, plain_path),
    "autograd": (by_autograd, contextlib.nullcontext),
}


def paths_here(device: str) -> list[str]:
    """Those that this machine can run."""
    index = 0 if device == "cuda" else None
    missing = set() if kernels.why_not(device, index) is None else {"compiled", "ordered"}
    if device != "cuda":
        missing.add("ordered")
    try:
        by_deformops.package()
    except ValueError:
        missing.add("deformops")
    return [path for path in PATHS if path not in missing]


class Memory:
    """Peak memory of a block, beyond what was in use before, in MiB; None where the system does not tell."""

    def __init__(self, device: str):
        self.device = device

    def used(self, field: str) -> int | None:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() if field == "VmHWM" else torch.cuda.memory_allocated()
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))
        except (OSError, StopIteration):
            return None

    def peak(self, work: Callable[[], object]) -> float | None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError, AttributeError):  # what earlier rows freed would count as in use (glibc)
                ctypes.CDLL(None).malloc_trim(0)
            try:
                Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (Linux)
            except OSError:
                return None
        before = self.used("VmRSS")
        work()
        after = self.used("VmHWM")
        return None if before is None or after is None else (after - before) / 2**20


def seconds(work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def copy_speed(device: str, repeats: int) -> float:
    """Bytes read and written a second by copying 256 MiB."""
    source = torch.zeros(2**26, device=device)
    target = torch.empty_like(source)
    times = [seconds(lambda: target.copy_(source), device) for _ in range(repeats + 1)]
    return 2 * source.nbytes / statistics.median(times[1:])


def tasks(path: str, levels: list, inputs: list[Tensor]) -> tuple[Callable, Callable]:
    """Forward without gradients, and forward with backward."""
    function, setting = PATHS[path]
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    batch, queries = inputs[1].shape[:2]
    grad = torch.randn(batch, queries, HEADS * CHANNELS).to(inputs[0])

    def forward():
        with setting(), torch.no_grad():
            return function(inputs[0], levels, *inputs[1:])

    def both():
        with setting():
            return torch.autograd.grad(function(leaves[0], levels, *leaves[1:]), leaves, grad)

    return forward, both


def measure(name: str, args, dtype: torch.dtype, speed: float, paths: list[str]) -> None:
    levels, queries = SHAPES[name]
    inputs = example(levels, queries, batch=args.batch, device=args.device, dtype=dtype)
    output = inputs[0].element_size() * args.batch * inputs[1].shape[1] * HEADS * CHANNELS
    least = sum(tensor.nbytes for tensor in inputs) + output  # forward reads three, writes one
    moved = (least, least + 2 * sum(tensor.nbytes for tensor in inputs) + output)  # backward reads four, writes three
    work = {path: tasks(path, levels, inputs) for path in paths}
    peaks = {path: [Memory(args.device).peak(task) for task in work[path]] for path in paths}  # also warms up
    times = {path: ([], []) for path in paths}
    for _ in range(args.repeats):
        for path in paths:
            for kind, task in enumerate(work[path]):
                times[path][kind].append(seconds(task, args.device))
    for path in paths:
        cells = []
        for kind in range(2):
            median = statistics.median(times[path][kind])
            baseline = statistics.median(times["plain"][kind])
            peak = peaks[path][kind]
            cells += [f"{1e3 * median:9.2f}", f"{baseline / median:6.1f}x", f"{moved[kind] / median / speed:7.1%}"]
            cells += ["      -" if peak is None else f"{peak:7.0f}"]
        print(f"{name:24} {str(dtype).removeprefix('torch.'):9} {path:9}", *cells, flush=True)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batch", type=positive, default=1, help="images at once")
    parser.add_argument("--repeats", type=positive, default=3, help="rounds to take medians of, after one to warm up")
    parser.add_argument("--threads", type=positive, help="of the CPU; default: as PyTorch chooses")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device here")
    if args.threads:
        torch.set_num_threads(args.threads)

    cuda = args.device == "cuda"
    reason = kernels.why_not(args.device, 0 if cuda else None)
    paths = paths_here(args.device)
    speed = copy_speed(args.device, args.repeats)
    where = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {args.device} ({where}), copies {speed / 1e9:.1f} GB/s, batch {args.batch}")
    if reason:
        print(f"no compiled kernel: {reason}")
    print(f"{'':44} {'forward':>9} {'':7} {'':7} {'peak':>7} {'+ backward':>10}{'':7} {'':7} {'peak':>8}")
    columns = f"{'ms':>9} {'speed':>7} {'of copy':>7} {'MiB':>7}"
    print(f"{'shape':24} {'type':9} {'path':9} {columns} {columns}")
    for name in args.shapes:
        for dtype in args.dtypes:
            measure(name, args, getattr(torch, dtype), speed, paths)


if __name__ == "__main__":
    main()
