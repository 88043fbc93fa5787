"""The compiled kernels as functions on tensors: loads (and on first use builds) the libraries, passes pointers.

forward() and backward() expect what registration.py has made sure of: contiguous tensors of one device, locations and
weights in coordinate_dtype(value).
"""

import contextlib
import ctypes
import functools
import os
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from samdetr.models.ops import build
from samdetr.models.ops.plain import coordinate_dtype

MAX_CUDA_LEVELS = 32  # they travel as a kernel argument; as in the CUDA source
CUDA_TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
CPU_NAMES = {torch.float32: "float32", torch.float64: "float64"}


@functools.cache
def load_cpu() -> ctypes.CDLL:
    return open_library(build.cpu_recipe())


@functools.cache
def load_cuda(index: int) -> ctypes.CDLL:
    """Raises BuildError where the library cannot be made or loaded, or where the driver does not take it."""
    library = open_library(build.cuda_recipe("{}.{}".format(*torch.cuda.get_device_capability(index))))
    library.error_text.restype = ctypes.c_char_p
    with torch.cuda.device(index):
        if status := library.probe(index):
            raise build.BuildError(f"the kernels do not run on cuda:{index}: {library.error_text(status).decode()}")
    return library


def open_library(recipe: build.Recipe) -> ctypes.CDLL:
    """Raises BuildError where the library cannot be made or loaded."""
    path = build.build(recipe)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise build.BuildError(f"{path} does not load: {error}") from error


@functools.cache
def why_not(device_type: str, index: int | None = None) -> str | None:
    """None if the compiled kernel runs on this device, else the reason. Builds the library where it is missing."""
    if os.environ.get("MS_DEFORM_ATTN") == "plain":
        return "MS_DEFORM_ATTN=plain is set"
    if device_type not in ("cpu", "cuda"):
        return f"there is no kernel for {device_type}"
    if device_type == "cuda" and torch.version.hip:
        return "there is no kernel for ROCm"
    try:
        if device_type == "cpu":
            load_cpu()
        else:
            load_cuda(index)
    except build.BuildError as error:
        return str(error)
    return None


@functools.cache
def available(device_type: str, index: int | None = None) -> bool:
    """why_not() is None; otherwise the first call warns, on the first process of a run only."""
    reason = why_not(device_type, index)
    expected = device_type in ("cpu", "cuda") and os.environ.get("MS_DEFORM_ATTN") != "plain"
    first = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    if reason and expected and first:
        warnings.warn(
            f"compiled kernels are missing, plain PyTorch on {device_type} is several times slower: {reason}\n"
            "(`python -m models.ops.doctor` tells more; MS_DEFORM_ATTN=plain silences this)",
            stacklevel=2,
        )
    return reason is None


_plain_wanted = False


@contextlib.contextmanager
def plain_path() -> Iterator[None]:
    """Runs the plain path inside, for comparisons: `with plain_path(): model(images)`. For the whole process."""
    global _plain_wanted
    before, _plain_wanted = _plain_wanted, True
    try:
        yield
    finally:
        _plain_wanted = before


def wanted(device_type: str, index: int | None = None) -> bool:
    """Whether compiled kernels run on this device, and are not turned off by plain_path."""
    return not _plain_wanted and available(device_type, index)


def takes(*tensors: Tensor) -> bool:
    """Whether the CPU's kernels take tensors like these: of one floating type of full precision, and real ones, without
    autocast."""
    dtypes = {x.dtype for x in tensors}
    return (
        len(dtypes) == 1
        and dtypes <= CPU_NAMES.keys()
        and all(x.device.type == "cpu" and type(x) in (Tensor, nn.Parameter) for x in tensors)  # fake ones are neither
        and not _followed()
        and not torch.is_autocast_enabled("cpu")
        and wanted("cpu")
    )


def _followed() -> bool:
    """Whether something follows each operation of PyTorch's, and would see nothing of a kernel: torch.compile, export,
    torch.jit.trace; torch.func and forward-mode differentiation; and modes, as of make_fx and FlopCounterMode."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
    )


def call(name: str, dtype: torch.dtype, *arguments: object) -> None:
    """A function of the CPU's library, of this type of numbers."""
    getattr(load_cpu(), f"{name}_{CPU_NAMES[dtype]}")(*arguments)


def integers(values: list[int]) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)


def pointer(tensor: Tensor | None) -> ctypes.c_void_p | None:
    """The null pointer for None."""
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def dimensions(value: Tensor, locations: Tensor) -> ctypes.Array:
    """B, L, N, C, levels, Q, points, as the C functions take them; offsets have the shape of locations."""
    _, queries, _, levels, points, _ = locations.shape
    return integers([*value.shape, levels, queries, points])


def forward(value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    batch, _, heads, channels = value.shape
    if value.is_cuda:
        output = value.new_empty(batch, locations.shape[1], heads * channels)
        cuda_call("forward", value, sizes, locations, value, locations, weights, output)
        return output
    wide = value.to(coordinate_dtype(value))  # 16 bits: widening the map once costs less than at every cell read
    output = wide.new_empty(batch, locations.shape[1], heads * channels)
    tensors = (wide, locations, weights, output)
    sizes_of = (integers(sizes), dimensions(value, locations))
    call("ms_deform_attn_forward", wide.dtype, *sizes_of, torch.get_num_threads(), *map(pointer, tensors))
    return output.to(value.dtype)


def backward(
    grad_output: Tensor, value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_value = torch.zeros_like(value, dtype=coordinate_dtype(value))  # summed at full width, rounded once
    gradients = (grad_value, torch.empty_like(locations), torch.empty_like(weights))
    if value.is_cuda:
        ordered = torch.are_deterministic_algorithms_enabled()
        tensors = (grad_output, value, locations, weights, *gradients)
        cuda_call("backward", value, sizes, locations, *tensors, ordered=ordered)
    else:
        tensors = (grad_output.to(grad_value.dtype), value.to(grad_value.dtype), locations, weights, *gradients)
        sizes_of = (integers(sizes), dimensions(value, locations))
        threads = torch.get_num_threads()
        call("ms_deform_attn_backward", grad_value.dtype, *sizes_of, threads, *map(pointer, tensors))
    return grad_value.to(value.dtype), *gradients[1:]


def cuda_call(name: str, value: Tensor, sizes: list[int], locations: Tensor, *tensors: Tensor, ordered: bool = False):
    """On the current stream of the tensors' device, without waiting. Raises RuntimeError if the launch fails."""
    if value.numel() == 0 or (name == "forward" and tensors[-1].numel() == 0):
        return  # nothing to launch
    device = value.device
    library = load_cuda(device.index)
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    settings = (ctypes.c_int(CUDA_TYPES[value.dtype]), ctypes.c_int(device.index), stream)
    extra = (ctypes.c_int(ordered),) if name == "backward" else ()
    arguments = (*settings, *extra, integers(sizes), dimensions(value, locations), *map(pointer, tensors))
    with torch.cuda.device(device):  # the library makes it current, this puts back what was
        status = getattr(library, name)(*arguments)
    if status:
        raise RuntimeError(f"deformable attention, {name} on {device}: {library.error_text(status).decode()}")
