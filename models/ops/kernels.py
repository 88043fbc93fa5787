"""Which kernels run where, and how they are called: loads their libraries, and builds them on first use."""

import contextlib
import ctypes
import functools
import math
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samdetr.models.ops import build, driver
from samdetr.models.ops.exporting import exporting

CPU_NAMES = {torch.float32: "float32", torch.float64: "float64"}
# Largest difference from the plain path that rounding explains, in units of the largest value compared.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}


@functools.cache
def load_cpu() -> ctypes.CDLL:
    return open_library(build.cpu_recipe())


@functools.cache
def load_cuda(index: int, value: str = "float") -> driver.Module:
    """The kernels for one type of value. Raises BuildError, in one line, where they cannot be made or loaded."""
    try:
        recipe = build.cuda_recipe("{}.{}".format(*torch.cuda.get_device_capability(index)), value)
        return driver.Module(build.build(recipe).read_bytes(), index)
    except build.BuildError as error:
        raise build.BuildError(" ".join(str(error).split())) from error


def open_library(recipe: build.Recipe) -> ctypes.CDLL:
    """Raises BuildError where the library cannot be made or loaded."""
    path = build.build(recipe)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise build.BuildError(f"{path} does not load: {error}") from error


@functools.cache
def why_not(device_type: str, index: int | None = None) -> str | None:
    """None if the library of this device can be used, else the reason. Builds it where it is missing."""
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
    """why_not() is None; otherwise the first call warns, except where the plain path was asked for."""
    reason = why_not(device_type, index)
    if reason and device_type in ("cpu", "cuda") and os.environ.get("MS_DEFORM_ATTN") != "plain":
        _warn(f"compiled kernels are missing, plain PyTorch on {device_type} is several times slower: {reason}")
    return reason is None


def _warn(message: str) -> None:
    """On the first process of a run only."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        hint = "`python -m samdetr.models.ops.doctor` says more; MS_DEFORM_ATTN=plain silences this"
        warnings.warn(f"{message}\n({hint})", stacklevel=3)


PATHS = ("auto", "plain", "deformops")
_wanted = "auto"


@torch.compiler.assume_constant_result
def wanted() -> str:
    """The path that is asked for: "auto", our kernels where they run; "plain", PyTorch alone; "deformops", deformable
    attention by that package, the rest as in "auto"."""
    return _wanted


@contextlib.contextmanager
def path(name: str) -> Iterator[None]:
    """Ask for a path inside, for the whole process."""
    global _wanted
    assert name in PATHS, name
    before, _wanted = _wanted, name
    try:
        yield
    finally:
        _wanted = before


def plain_path() -> contextlib.AbstractContextManager[None]:
    """Runs the plain path inside, for comparisons: `with plain_path(): model(images)`. For the whole process."""
    return path("plain")


@dataclass(frozen=True, eq=False)
class Kernels:
    """The kernels of one operator.

    Attributes:
        name: of the operator.
        compiled, plain: the operator by its kernels, and in plain PyTorch; both take the same arguments.
        examples: small arguments for a dtype, on the CPU; what the kernels are checked with.
        dtypes: of the tensors that the kernels take, by type of device.
        own: whether they are in the library of this project.
    """

    name: str
    compiled: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    examples: Callable[[torch.dtype], list[tuple]]
    dtypes: dict[str, tuple[torch.dtype, ...]]
    own: bool = True

    def take(self, *tensors: Tensor | None) -> bool:
        """Whether they run on tensors like these, which must be of one device and dtype."""
        kinds = {(x.device, x.dtype) for x in tensors if x is not None}
        if len(kinds) > 1:
            return False
        ((device, dtype),) = kinds
        return _run(self.name, device.type, device.index, dtype)

    def difference(self, device: torch.device, dtype: torch.dtype) -> float:
        """The largest one of outputs and gradients, in units of the largest value; the plain path has float64."""
        largest = 0.0
        for example in self.examples(dtype):
            on_device = [x.to(device) if isinstance(x, Tensor) else x for x in example]
            wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in example]
            for actual, expected in zip(_with_gradients(self.compiled, on_device), _with_gradients(self.plain, wide)):
                error = ((actual.cpu().double() - expected).abs().max() / expected.abs().max()).item()
                largest = max(largest, error if math.isfinite(error) else math.inf)
        return largest


OPERATORS: dict[str, Kernels] = {}


def register(name: str, **fields: Any) -> Kernels:
    """The kernels of an operator, which OPERATORS knows by its name from now on."""
    return OPERATORS.setdefault(name, Kernels(name=name, **fields))


def _with_gradients(function: Callable[..., Tensor], arguments: list) -> list[Tensor]:
    """The output, and the gradients of what has some."""
    leaves = [x.requires_grad_() for x in arguments if isinstance(x, Tensor) and x.is_floating_point()]
    output = function(*arguments)
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output)
    gradients = torch.autograd.grad(output, leaves, weights, allow_unused=True)
    return [output.detach(), *(gradient for gradient in gradients if gradient is not None)]


@torch.compiler.assume_constant_result
def _run(name: str, device_type: str, index: int | None, dtype: torch.dtype) -> bool:
    kernels = OPERATORS[name]
    if _wanted == "plain" or exporting() or _transformed() or dtype not in kernels.dtypes.get(device_type, ()):
        return False
    return (not kernels.own or available(device_type, index)) and correct(name, device_type, index, dtype)


def _transformed() -> bool:
    """Whether torch.func or forward-mode differentiation transforms the operation: the kernels have no rules for it."""
    in_func = torch._C._functorch.peek_interpreter_stack() is not None
    return in_func or torch.autograd.forward_ad._current_level >= 0


@functools.cache
def correct(name: str, device_type: str, index: int | None, dtype: torch.dtype) -> bool:
    """Whether the kernels of an operator agree with its plain path on an example, which takes milliseconds; where they
    do not, the first call warns."""
    device = torch.device(device_type if index is None else f"{device_type}:{index}")
    # In a separate thread: gradients, autocast and tracing are turned on and off for a thread.
    with ThreadPoolExecutor(1) as thread:
        try:
            difference = thread.submit(OPERATORS[name].difference, device, dtype).result()
        except RuntimeError as error:
            _warn(f"the kernels of {name} fail on {device}, so plain PyTorch is used: {error}")
            return False
    if difference > TOLERANCE[dtype]:
        numbers = f"{difference:.1e} in {dtype}, more than {TOLERANCE[dtype]:.0e}"
        _warn(f"the kernels of {name} on {device} differ from plain PyTorch by {numbers}: plain PyTorch is used")
        return False
    return True


def first_derivatives_only(backward: Any, name: str) -> None:
    """Registers that the backward pass of an operator has no derivative."""

    def refuse(ctx: Any, *gradients: Any) -> None:
        raise NotImplementedError(f"{name} has first derivatives only; plain_path() may have more")

    backward.register_autograd(refuse)


def call(name: str, dtype: torch.dtype, *arguments: object) -> None:
    """A function of the CPU's library, for numbers of this type. Raises MemoryError."""
    if getattr(load_cpu(), f"{name}_{CPU_NAMES[dtype]}")(*arguments):
        raise MemoryError(f"{name} on the CPU ran out of memory; smaller images or batches need less")


def integers(values: list[int]) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)


def pointer(tensor: Tensor | None) -> ctypes.c_void_p | None:
    """The null pointer for None."""
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())
