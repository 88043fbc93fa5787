"""Checks of deformable attention on every device and path of this machine: `python models/ops/test.py [WORD]`.

Prints a line per check, with what was measured, and exits with 1 if one fails. WORD limits them to checks that have it
in their names. Needs nothing but PyTorch.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # started by its path: find the package from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from samdetr.models.ops import kernels
from samdetr.models.ops.kernels import plain_path
from samdetr.models.ops.ms_deform_attn import ms_deform_attn

Shapes = list[tuple[int, int]]
EVEN: Shapes = [(8, 12), (4, 6), (2, 3)]
ODD: Shapes = [(7, 11), (3, 1), (1, 5)]
# Largest error that rounding may cause, in units of the largest value compared.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def example(
    shapes: Shapes, *, channels: int, device: str, dtype: torch.dtype, queries: int = 5, heads: int = 2, spread=0.4
) -> tuple[Tensor, Tensor, Tensor]:
    """Random value, locations and weights. With the default spread about a third of the points are outside."""
    generator = torch.Generator().manual_seed(channels)
    length, points = sum(h * w for h, w in shapes), 3
    value = torch.randn(2, length, heads, channels, generator=generator, dtype=torch.float64)
    locations = 0.5 + spread * torch.randn(2, queries, heads, len(shapes), points, 2, generator=generator).double()
    weights = torch.rand(locations.shape[:-1], generator=generator, dtype=torch.float64)
    coordinates = torch.float64 if dtype == torch.float64 else torch.float32
    return value.to(device, dtype), locations.to(device, coordinates), weights.to(device, coordinates)


def by_definition(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """The same from the definition: each cell counts by max(0, 1 - |x|) max(0, 1 - |y|), x, y its distances."""
    output, start = value.new_zeros(()), 0
    for level, (height, width) in enumerate(shapes):
        cells = value[:, start : start + height * width]
        start += height * width
        x = locations[..., level, :, 0, None] * width - 0.5 - torch.arange(width, device=value.device)
        y = locations[..., level, :, 1, None] * height - 0.5 - torch.arange(height, device=value.device)
        share = (1 - y.abs()).clamp(min=0)[..., :, None] * (1 - x.abs()).clamp(min=0)[..., None, :]
        share = share.flatten(-2) * weights[..., level, :, None]  # (B, Q, N, points, cells)
        output = output + torch.einsum("bqnpl,blnc->bqnc", share, cells)
    return output.flatten(2)


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, in units of the largest value expected."""
    if expected.numel() == 0:
        return 0.0
    return ((actual.double() - expected.double()).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def with_gradients(function: Callable, inputs: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Output and the gradients of all inputs, the output weighted by a fixed random tensor."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def check_forward(device: str, shapes: Shapes, dtype: torch.dtype) -> str:
    worst = 0.0
    for channels in (30, 32, 64, 71):
        inputs = example(shapes, channels=channels, device=device, dtype=dtype)
        wide = [tensor.double() for tensor in inputs]  # holds what the narrow ones hold: only the arithmetic differs
        output = ms_deform_attn(inputs[0], shapes, *inputs[1:])
        assert output.dtype == dtype, output.dtype
        worst = max(worst, error(output, by_definition(wide[0], shapes, *wide[1:])))
    assert worst < TOLERANCE[dtype], f"error {worst:.1e}"
    return f"error {worst:.1e}"


def check_gradients(device: str, shapes: Shapes, dtype: torch.dtype) -> str:
    """Against autograd through the definition, in float64."""
    worst = 0.0
    for channels in (30, 32, 64, 71):
        inputs = example(shapes, channels=channels, device=device, dtype=dtype)
        wide = tuple(tensor.double() for tensor in inputs)
        actual = with_gradients(lambda v, *rest: ms_deform_attn(v, shapes, *rest), inputs)
        # The gradient that arrives is rounded to dtype as well: give both the same.
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(actual[0].shape, generator=generator, dtype=torch.float64).to(actual[0]).double()
        leaves = [tensor.requires_grad_() for tensor in wide]
        expected = torch.autograd.grad(by_definition(leaves[0], shapes, *leaves[1:]), leaves, grad)
        worst = max([worst, *(error(a, e) for a, e in zip(actual[1:], expected))])
    assert worst < 2 * TOLERANCE[dtype], f"error {worst:.1e}"
    return f"error {worst:.1e}"


def check_numerical_gradients(device: str, channels: int) -> str:
    shapes = [(3, 2), (1, 3)]
    inputs = example(shapes, channels=channels, device=device, dtype=torch.float64, queries=2)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    # Where a point lies at a cell's centre the function has a kink, so differences must be small.
    torch.autograd.gradcheck(
        lambda v, *rest: ms_deform_attn(v, shapes, *rest),
        leaves,
        eps=1e-7,
        atol=1e-5,
        fast_mode=channels > 30,  # along random directions instead of every entry of the Jacobian
        nondet_tol=1e-12 if device == "cuda" else 0.0,
    )
    return "agree"


def check_outside(device: str) -> str:
    """Points beyond the border by half a cell or more, or nowhere, count as zero and get no gradient."""
    value, _, weights = example(EVEN, channels=32, device=device, dtype=torch.float32)
    # 0.25 is half a cell and more on every level.
    for place in (-0.26, 1.26, 1e30, -1e30, 3e38, torch.inf, -torch.inf, torch.nan):
        locations = torch.full((*weights.shape, 2), float(place), device=device)
        for tensor in with_gradients(lambda v, *rest: ms_deform_attn(v, EVEN, *rest), (value, locations, weights)):
            assert not tensor.any(), f"location {place}: {tensor.abs().max():.1e}"
    return "0, with gradients 0"


def check_empty(device: str) -> str:
    for batch, queries in ((2, 0), (0, 5)):
        value, locations, weights = example(ODD, channels=32, device=device, dtype=torch.float32)
        inputs = (value[:batch], locations[:batch, :queries], weights[:batch, :queries])
        output, *gradients = with_gradients(lambda v, *rest: ms_deform_attn(v, ODD, *rest), inputs)
        assert output.shape == (batch, queries, 64), output.shape
        assert [g.shape for g in gradients] == [i.shape for i in inputs]
        assert not any(g.any() for g in gradients)
    return "no queries, no images"


def check_determinism(device: str) -> str:
    """Many queries on few cells: sums of hundreds of terms, which any change of order would show."""
    shapes = [(9, 7), (2, 2)]
    inputs = example(shapes, channels=32, device=device, dtype=torch.float32, queries=400, spread=0.2)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        runs = [with_gradients(lambda v, *rest: ms_deform_attn(v, shapes, *rest), inputs) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(before)
    value, locations, weights = (tensor.double() for tensor in inputs)
    exact = with_gradients(lambda v, *rest: by_definition(v, shapes, *rest), (value, locations, weights))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run)), "runs differ"
    assert error(runs[0][1], exact[1]) < 1e-5
    return "three runs equal to the bit"


def checks(device: str) -> Iterator[tuple[str, Callable[[], str]]]:
    for name, shapes in (("even", EVEN), ("odd", ODD)):
        for dtype in TOLERANCE:
            short = str(dtype).removeprefix("torch.")
            yield f"forward, {short}, {name} level sizes", partial(check_forward, device, shapes, dtype)
            yield f"gradients, {short}, {name} level sizes", partial(check_gradients, device, shapes, dtype)
    for channels in (30, 32, 64, 71, 1025):
        yield f"numerical gradients, {channels} channels", partial(check_numerical_gradients, device, channels)
    yield "points outside the map", partial(check_outside, device)
    yield "empty sets", partial(check_empty, device)
    yield "determinism", partial(check_determinism, device)


def main(word: str = "") -> int:
    failures = 0
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        reason = kernels.why_not(device, 0 if device == "cuda" else None)
        if reason:
            print(f"{device}, compiled: not here, {reason}")
        for path in ("plain", *([] if reason else ["compiled"])):
            for name, check in checks(device):
                if word not in name:
                    continue
                if (device, path, name) == ("cuda", "plain", "determinism"):
                    continue  # grid_sample has no deterministic backward on CUDA
                with plain_path() if path == "plain" else contextlib.nullcontext():
                    try:
                        line = f"ok      {device}, {path}: {name}: {check()}"
                    except Exception as problem:  # a failed check must not hide the ones after it
                        failures += 1
                        line = f"FAILED  {device}, {path}: {name}: {type(problem).__name__}: {problem}"
                print(line, flush=True)
    print(f"{failures} failed" if failures else "all passed")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
