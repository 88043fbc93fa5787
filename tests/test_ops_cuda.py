"""The CUDA kernels where there is no GPU: nvcc accepts them, and emulated on the CPU they compute the right thing.

On a machine with a GPU `python models/ops/test.py` runs them in earnest.
"""

import contextlib
import ctypes
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from samdetr.models.ops import build, kernels, test as checks
from samdetr.models.ops.kernels import plain_path
from samdetr.models.ops.ms_deform_attn import binding
from samdetr.models.ops.ms_deform_attn.plain import plain_ms_deform_attn

SOURCE = build.FOLDER / "ms_deform_attn" / "cuda.cu"


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> ctypes.CDLL:
    """The CUDA source compiled as C++ with cuda_emulation.h in front of it."""
    try:
        compiler = build.find_cxx()
    except build.BuildError as error:
        pytest.skip(str(error))
    library = tmp_path_factory.mktemp("emulated") / "library.so"
    header = Path(__file__).with_name("cuda_emulation.h")
    command = [*compiler, "-std=c++20", "-O1", "-w", "-fPIC", "-shared", "-include", str(header)]
    result = subprocess.run([*command, "-x", "c++", str(SOURCE), "-o", str(library)], capture_output=True, text=True)
    if result.returncode and "cuda.cu" not in result.stderr:
        pytest.skip(f"the emulation needs C++20, coroutines and 16-bit floats: {result.stderr[-300:]}")
    assert not result.returncode, result.stderr[-3000:]
    return ctypes.CDLL(str(library))


def forward(library: ctypes.CDLL, shapes, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    output = value.new_full((*locations.shape[:2], value.shape[2] * value.shape[3]), torch.nan)
    call(library.forward, [], shapes, value, locations, value, locations, weights, output)
    return output


def backward(library: ctypes.CDLL, shapes, grad: Tensor, inputs: tuple[Tensor, ...], *, ordered: bool) -> list[Tensor]:
    value, locations, weights = inputs
    gradients = [
        torch.zeros(value.shape, dtype=locations.dtype),
        torch.full_like(locations, torch.nan),  # to be overwritten
        torch.full_like(weights, torch.nan),
    ]
    call(library.backward, [ordered], shapes, value, locations, grad, *inputs, *gradients)
    return gradients


def plain_backward(grad: Tensor, value: Tensor, sizes: list[int], *rest: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (value, *rest)]
    return torch.autograd.grad(plain_ms_deform_attn(leaves[0], sizes, *leaves[1:]), leaves, grad)


def call(function, extra: list, shapes, value: Tensor, locations: Tensor, *tensors: Tensor) -> None:
    sizes = kernels.integers([size for shape in shapes for size in shape])
    settings = (binding.CUDA_TYPES[value.dtype], 0, None, *extra)
    pointers = [kernels.pointer(tensor) for tensor in tensors]
    assert function(*settings, sizes, binding.dimensions(value, locations), *pointers) == 0


# Channels for every choice of lanes: 16 bytes by 4, 8, 16 and 32 lanes, several rounds of these, and one at a time.
@pytest.mark.parametrize("dtype", list(checks.TOLERANCE))
@pytest.mark.parametrize("channels", [8, 32, 64, 96, 136, 264, 1, 30, 71])
def test_emulated(dtype, channels, emulated):
    """Odd level sizes; 2 x 3 x heads rows fill no block, or, for the narrow ones, more than one."""
    shapes, heads = [(9, 11), (3, 1), (1, 5)], 3 if channels > 8 else 15
    inputs = checks.example(shapes, channels=channels, device="cpu", dtype=dtype, queries=3, heads=heads)
    sizes = [size for shape in shapes for size in shape]
    expected = plain_ms_deform_attn(inputs[0], sizes, *inputs[1:])
    actual = forward(emulated, shapes, *inputs)
    assert checks.error(actual, expected) < checks.TOLERANCE[dtype]

    grad = torch.randn(actual.shape).to(dtype)
    wide = (inputs[0].to(inputs[1].dtype), sizes, *inputs[1:])
    expected = plain_backward(grad.to(wide[0].dtype), *wide)
    for ordered in (False, True):
        for gradient, wanted in zip(backward(emulated, shapes, grad, inputs, ordered=ordered), expected):
            assert checks.error(gradient, wanted) < checks.TOLERANCE[wide[0].dtype]


def test_emulated_many_points(emulated):
    """More points than a block takes at a time: 7 levels of 6, in three rounds."""
    torch.manual_seed(0)
    shapes = [(3, 4)] * 7
    value, weights = torch.randn(1, 84, 2, 8), torch.rand(1, 5, 2, 7, 6)
    inputs = (value, torch.rand(*weights.shape, 2) * 1.4 - 0.2, weights)
    sizes = [size for shape in shapes for size in shape]
    expected = plain_ms_deform_attn(value, sizes, *inputs[1:])
    assert checks.error(forward(emulated, shapes, *inputs), expected) < 1e-5
    grad = torch.randn_like(expected)
    expected = plain_backward(grad, value, sizes, *inputs[1:])
    for gradient, wanted in zip(backward(emulated, shapes, grad, inputs, ordered=False), expected):
        assert checks.error(gradient, wanted) < 1e-5


def test_emulated_edges(emulated):
    """Addresses off the 16 bytes, no queries, locations that are no numbers, and more levels than an argument holds."""
    shapes = [(4, 6)]
    value, locations, weights = checks.example(shapes, channels=8, device="cpu", dtype=torch.float32)
    expected = plain_ms_deform_attn(value, [4, 6], locations, weights)
    shifted = torch.cat([torch.zeros(1), value.flatten()])[1:].view(value.shape)
    assert shifted.data_ptr() % 16
    torch.testing.assert_close(forward(emulated, shapes, shifted, locations, weights), expected)
    assert forward(emulated, shapes, value, locations[:, :0], weights[:, :0]).shape == (2, 0, 16)
    for place in (torch.nan, torch.inf, -torch.inf, 1e30):
        nowhere = torch.full_like(locations, place)
        assert not forward(emulated, shapes, value, nowhere, weights).any()
        for gradient in backward(emulated, shapes, expected, (value, nowhere, weights), ordered=True):
            assert not gradient.any()
    many = [(1, 1)] * (binding.MAX_CUDA_LEVELS + 1)
    with pytest.raises(AssertionError):
        forward(emulated, many, torch.zeros(1, 33, 1, 1), torch.zeros(1, 1, 1, 33, 1, 2), torch.zeros(1, 1, 1, 33, 1))
    for dimensions in ([1, 2**31, 1, 1, 1, 1, 1], [2**16, 1, 2**8, 1, 1, 2**8, 1]):  # cells, rows past 32 bits
        status = emulated.forward(0, 0, None, kernels.integers([1, 1]), kernels.integers(dimensions), *[None] * 4)
        assert status != 0


def test_a_driver_that_is_too_old_is_a_reason(monkeypatch):
    """Code that compiles may still not run: then the plain path, not an error in every call."""
    library = SimpleNamespace(probe=lambda index: 35 * index, error_text=lambda status: b"insufficient driver")
    monkeypatch.setattr(kernels, "open_library", lambda recipe: library)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.delenv("MS_DEFORM_ATTN", raising=False)
    for function in (kernels.load_cuda, kernels.why_not):
        function.cache_clear()
    try:
        assert kernels.why_not("cuda", 0) is None
        assert kernels.why_not("cuda", 1) == "the kernels do not run on cuda:1: insufficient driver"
    finally:
        for function in (kernels.load_cuda, kernels.why_not):
            function.cache_clear()


def test_nvcc_compiles_the_source(tmp_path):
    """To an object file: a GPU or its runtime library is not needed for that."""
    try:
        recipe, nvcc = build.cuda_recipe("9.0"), build.find_nvcc()
    except build.BuildError as error:
        pytest.skip(str(error))
    flags = [flag for flag in recipe.flags if flag != "-shared"]
    output = tmp_path / "kernels.o"
    result = subprocess.run(
        [*nvcc, *flags, "-c", str(SOURCE), "-o", str(output), "-Xptxas", "-v"], capture_output=True, text=True
    )
    if result.returncode and "cuda.cu" not in result.stderr:
        pytest.skip(f"nvcc does not work here: {result.stderr[-300:]}")
    assert result.returncode == 0, result.stderr[-3000:]
    assert output.stat().st_size > 0
    used = [line for line in result.stderr.splitlines() if "spill" in line]
    assert used
    assert all("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in line for line in used)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", dict(checks.checks("cuda")))
def test_checks_of_the_package(name, compiled):
    if compiled:
        if kernels.why_not("cuda", 0):
            pytest.skip(f"no compiled kernel: {kernels.why_not('cuda', 0)}")
        dict(checks.checks("cuda"))[name]()
    elif name != "determinism":  # grid_sample has no deterministic backward on CUDA
        with plain_path():
            dict(checks.checks("cuda"))[name]()


def test_the_types_are_numbered_alike():
    text = SOURCE.read_text(encoding="utf-8")
    names = {torch.float32: "float", torch.float64: "double", torch.float16: "Half", torch.bfloat16: "BFloat"}
    for dtype, number in binding.CUDA_TYPES.items():
        assert f"case {number}: choose<{names[dtype]}>" in text
    assert f"kMaxLevels = {binding.MAX_CUDA_LEVELS};" in text
