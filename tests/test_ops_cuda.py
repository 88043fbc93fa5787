"""The CUDA kernels where there is no GPU: NVRTC accepts them, and emulated on the CPU they compute the right thing.

On a machine with a GPU `python models/ops/test.py` runs them in earnest.
"""

import ctypes
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from samdetr.models.ops import build, driver, kernels, nvrtc, test as checks
from samdetr.models.ops.kernels import plain_path
from samdetr.models.ops.ms_deform_attn import binding, launch
from samdetr.models.ops.ms_deform_attn.plain import plain_ms_deform_attn

SOURCE = build.FOLDER / "ms_deform_attn" / "cuda.cu"


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    """The CUDA source compiled as C++ with cuda_emulation.h in front of it, which plays the driver, too."""
    try:
        compiler = build.find_cxx()
    except build.BuildError as error:
        pytest.skip(str(error))
    path = tmp_path_factory.mktemp("emulated") / "library.so"
    header = Path(__file__).with_name("cuda_emulation.h")
    command = [*compiler, "-std=c++20", "-O1", "-w", "-fPIC", "-shared", "-include", str(header)]
    result = subprocess.run([*command, "-x", "c++", str(SOURCE), "-o", str(path)], capture_output=True, text=True)
    if result.returncode and "cuda.cu" not in result.stderr:
        pytest.skip(f"the emulation needs C++20, coroutines and 16-bit floats: {result.stderr[-300:]}")
    assert not result.returncode, result.stderr[-3000:]
    library = ctypes.CDLL(str(path))
    for name, types in driver.FUNCTIONS.items():
        getattr(library, name).argtypes = types
    return library


@pytest.fixture
def emulated(library, monkeypatch) -> driver.Module:
    """Calls on CPU tensors take the way of CUDA tensors."""
    monkeypatch.setattr(driver, "driver", lambda: library)
    module = driver.Module(b"image", 0)
    monkeypatch.setattr(kernels, "load_cuda", lambda index, value: module)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0x7000000000))
    return module


def forward(shapes, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    output = value.new_full((*locations.shape[:2], value.shape[2] * value.shape[3]), torch.nan)
    binding._call_cuda("forward", sizes_of(shapes), value, value, locations, weights, output)
    return output


def backward(shapes, grad: Tensor, inputs: tuple[Tensor, ...], *, ordered: bool) -> list[Tensor]:
    value, locations, weights = inputs
    gradients = [
        torch.zeros(value.shape, dtype=locations.dtype),
        torch.full_like(locations, torch.nan),  # to be overwritten
        torch.full_like(weights, torch.nan),
    ]
    torch.use_deterministic_algorithms(ordered)
    try:
        binding._call_cuda("backward", sizes_of(shapes), value, grad, *inputs, *gradients)
    finally:
        torch.use_deterministic_algorithms(False)
    return gradients


def sizes_of(shapes) -> list[int]:
    return [size for shape in shapes for size in shape]


def plain_backward(grad: Tensor, value: Tensor, sizes: list[int], *rest: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (value, *rest)]
    return torch.autograd.grad(plain_ms_deform_attn(leaves[0], sizes, *leaves[1:]), leaves, grad)


# Channels for every choice of lanes: 16 bytes by 4, 8, 16 and 32 lanes, several rounds of these, and one at a time.
@pytest.mark.parametrize("dtype", list(checks.TOLERANCE))
@pytest.mark.parametrize("channels", [8, 32, 64, 96, 136, 264, 1, 30, 71])
def test_emulated(dtype, channels, emulated):
    """Odd level sizes; 2 x 3 x heads rows fill no block, or, for the narrow ones, more than one."""
    shapes, heads = [(9, 11), (3, 1), (1, 5)], 3 if channels > 8 else 15
    inputs = checks.example(shapes, channels=channels, device="cpu", dtype=dtype, queries=3, heads=heads)
    sizes = sizes_of(shapes)
    expected = plain_ms_deform_attn(inputs[0], sizes, *inputs[1:])
    actual = forward(shapes, *inputs)
    assert checks.error(actual, expected) < checks.TOLERANCE[dtype]

    grad = torch.randn(actual.shape).to(dtype)
    wide = (inputs[0].to(inputs[1].dtype), sizes, *inputs[1:])
    expected = plain_backward(grad.to(wide[0].dtype), *wide)
    for ordered in (False, True):
        for gradient, wanted in zip(backward(shapes, grad, inputs, ordered=ordered), expected):
            assert checks.error(gradient, wanted) < checks.TOLERANCE[wide[0].dtype]


def test_emulated_many_points(emulated):
    """More points than a block takes at a time: 7 levels of 6, in three rounds."""
    torch.manual_seed(0)
    shapes = [(3, 4)] * 7
    value, weights = torch.randn(1, 84, 2, 8), torch.rand(1, 5, 2, 7, 6)
    inputs = (value, torch.rand(*weights.shape, 2) * 1.4 - 0.2, weights)
    sizes = sizes_of(shapes)
    expected = plain_ms_deform_attn(value, sizes, *inputs[1:])
    assert checks.error(forward(shapes, *inputs), expected) < 1e-5
    grad = torch.randn_like(expected)
    expected = plain_backward(grad, value, sizes, *inputs[1:])
    for gradient, wanted in zip(backward(shapes, grad, inputs, ordered=False), expected):
        assert checks.error(gradient, wanted) < 1e-5


def test_emulated_edges(emulated):
    """Addresses off the 16 bytes, no queries, locations that are no numbers, and more levels than an argument holds."""
    shapes = [(4, 6)]
    value, locations, weights = checks.example(shapes, channels=8, device="cpu", dtype=torch.float32)
    expected = plain_ms_deform_attn(value, [4, 6], locations, weights)
    shifted = torch.cat([torch.zeros(1), value.flatten()])[1:].view(value.shape)
    assert shifted.data_ptr() % 16
    torch.testing.assert_close(forward(shapes, shifted, locations, weights), expected)
    assert forward(shapes, value, locations[:, :0], weights[:, :0]).shape == (2, 0, 16)
    for place in (torch.nan, torch.inf, -torch.inf, 1e30):
        nowhere = torch.full_like(locations, place)
        assert not forward(shapes, value, nowhere, weights).any()
        for gradient in backward(shapes, expected, (value, nowhere, weights), ordered=True):
            assert not gradient.any()
    for shape, error in (
        ((1, 33, 1, 1, 33, 1, 1), "33, 33 and 1;"),
        ((1, 2**31, 1, 1, 1, 1, 1), "1, 2147483648 and 1;"),
    ):
        with pytest.raises(ValueError, match=f"got {error} plain"):
            launch.problem((1, 1) * shape[4], shape)
    with pytest.raises(ValueError, match="1, 1 and 4294967296;"):  # rows past 32 bits
        launch.problem((1, 1), (2**16, 1, 2**8, 1, 1, 2**8, 1))


def test_launches_by_hand():
    """Deformable DETR's encoder at batch 2: 11 x 7 + 5 x 3 = 92 queries of 8 heads, 32 channels, two levels."""
    value, locations = torch.zeros(2, 92, 8, 32), torch.zeros(2, 92, 8, 2, 4, 2)
    weights, output = torch.zeros(2, 92, 8, 2, 4), torch.zeros(2, 92, 256)

    def planned(value: Tensor, *rest: Tensor, ordered: bool = False) -> list[tuple[str, int]]:
        name = "backward" if len(rest) > 3 else "forward"
        tensors = (value, *rest) if name == "forward" else (rest[0], value, *rest[1:])
        found = launch.launches(name, [11, 7, 5, 3], value, tensors, ordered=ordered)
        return [(one.kernel, one.blocks) for one in found]

    # 2 * 92 * 8 = 1472 rows; 32 floats are 8 times 16 bytes: 256 / 8 = 32 rows a block. In 16 bits 4 lanes: 64 rows.
    assert planned(value, locations, weights, output) == [("forward_float_8", 46)]
    assert planned(value.half(), locations, weights, output.half()) == [("forward_Half_4", 23)]
    wide = [x.double() for x in (value, locations, weights, output)]
    assert planned(*wide) == [("forward_double_16", 92)]
    assert planned(value[..., :30].contiguous(), locations, weights, output) == [("forward_float_single", 184)]
    both = (value, output, locations, weights, value, locations, weights)
    assert planned(*both) == [("backward_float_8", 46)]
    # Bands of 4 rows: 3 of the first level, 2 of the second; a warp for each, image and head: 80 warps, 8 a block.
    assert planned(*both, ordered=True) == [("backward_float_8", 46), ("ordered_float", 10)]
    assert planned(value, locations[:, :0], weights[:, :0], output[:, :0]) == []
    task = launch.problem((11, 7, 5, 3), (2, 92, 8, 32, 2, 92, 4))
    assert (task.rows, list(task.start[:3]), list(task.width[:2])) == (1472, [0, 77, 0], [7, 3])
    assert ctypes.sizeof(task) == 2 * 8 + 6 * 4 + 3 * 32 * 4


def test_a_driver_that_refuses_is_a_reason(emulated):
    """Code that compiles may still not run: then the plain path and one line, not an error in every call."""
    with pytest.raises(build.BuildError, match=r"^the kernels .* cuda:0: cuModuleLoadData: invalid argument$"):
        driver.Module(b"other", 0)
    with pytest.raises(build.BuildError, match="on cuda:1: cuDeviceGet"):
        driver.Module(b"image", 1)
    with pytest.raises(RuntimeError, match=r"^cuModuleGetFunction: named symbol not found$"):
        emulated.launch("forward_int", 1, 256, 0, [])
    with pytest.raises(RuntimeError, match=r"^cuLaunchKernel: invalid argument$"):
        emulated.launch("ordered_float", 0, 256, 0, [])
    forward([(1, 1)], torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 1, 1))  # still works


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_without_a_driver_the_reason_is_a_line(fresh, monkeypatch):
    nvrtc_or_skip()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert kernels.why_not("cuda", 0).startswith("no CUDA driver: libcuda.so.1")
    assert len(list((fresh / "cache").rglob("ms_deform_attn_float-sm_90-nvrtc*.cubin"))) == 1
    source = fresh / "cuda.cu"
    source.write_text("__device__ int wrong = ;\n__device__ int worse = ;\n")
    right = build.cuda_recipe
    monkeypatch.setattr(build, "cuda_recipe", lambda *names: replace(right(*names), sources=(source,)))
    kernels.load_cuda.cache_clear()
    kernels.why_not.cache_clear()
    reason = kernels.why_not("cuda", 0)
    assert "\n" not in reason
    assert re.search(r"failed with status 1: NVRTC [\d.]+: cuda.cu\(1\): error: expected an expression$", reason)
    monkeypatch.setattr(torch.version, "hip", "6.0")
    kernels.why_not.cache_clear()
    assert kernels.why_not("cuda", 0) == "there is no kernel for ROCm"


def nvrtc_or_skip() -> str:
    try:
        return build.find_nvrtc()
    except build.BuildError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("architecture", build.DEFAULT_ARCHITECTURES.split())
def test_nvrtc_compiles_the_source(architecture, tmp_path):
    """For every GPU, to machine code with all entries, and hardly a register spilled."""
    library = nvrtc_or_skip()
    values = build.CUDA_VALUES if architecture == "9.0" else ("BFloat",)
    for value in values:
        recipe = build.cuda_recipe(architecture, value)
        if recipe.suffix != ".cubin":
            pytest.skip(f"NVRTC {nvrtc.version(library)} does not know {architecture}")
        image, log = nvrtc.compile_source(library, SOURCE, [*recipe.flags, "--ptxas-options=-v"])
        assert image[:4] == b"\x7fELF"
        names = [f"{kind}_{value}_{end}" for kind in ("forward", "backward") for end in ("single", 4, 8, 16, 32)]
        assert all(name.encode() + b"\0" in image for name in (*names, f"ordered_{value}"))
        spilled = [int(number) for number in re.findall(r"(\d+) bytes spill stores", log)]
        assert len(spilled) >= 11
        assert max(spilled) <= 8


def test_a_gpu_that_nvrtc_does_not_know(monkeypatch):
    """A newer one gets PTX of the nearest older architecture; an older one a reason."""
    library = nvrtc_or_skip()
    monkeypatch.setattr(nvrtc, "architectures", lambda path: [75, 86, 90])
    recipe = build.cuda_recipe("10.3", "float")
    assert (recipe.target, recipe.suffix) == ("compute_90", ".ptx")
    assert nvrtc.compile_source(library, SOURCE, list(recipe.flags))[0].lstrip().startswith(b"//")
    with pytest.raises(build.BuildError, match="compiles for sm_75 and newer GPUs, and this one is sm_70"):
        build.cuda_recipe("7.0", "float")


@pytest.mark.parametrize("folder", ["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib", "torch/lib"])
def test_nvrtc_is_found_as_by_pytorch(folder, tmp_path, monkeypatch):
    """Of the wheels of every age, in the major version of CUDA that PyTorch was built with."""
    lib = tmp_path / folder
    lib.mkdir(parents=True)
    for name in ("libnvrtc.so.11.2", "libnvrtc-builtins.so.13.0", "libnvrtc.alt.so.13", "libnvrtc-0a1b.so.13"):
        (lib / name).write_text("")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    find = build.find_nvrtc.__wrapped__
    assert find() == str(lib / "libnvrtc-0a1b.so.13")
    monkeypatch.setattr(build, "find_nvrtc", find)
    with pytest.raises(build.BuildError, match=r"libnvrtc-0a1b.so.13 does not load: "):
        build.cuda_recipe("9.0", "float")
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    with pytest.raises(build.NoCompiler, match=r"libnvrtc.so.99 is not beside PyTorch"):
        find()
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(build.NoCompiler, match="built without CUDA"):
        find()


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


def test_the_source_has_the_same_constants():
    text = SOURCE.read_text(encoding="utf-8")
    for name, number in (("Threads", launch.THREADS), ("MaxLevels", launch.MAX_LEVELS), ("Band", launch.BAND)):
        assert re.search(rf"constexpr int k{name} = {number};", text)
    assert tuple(launch.VALUES.values()) == build.CUDA_VALUES
