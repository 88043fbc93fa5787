"""Loads compiled kernels into a GPU, and launches them, through CUDA's driver."""

import ctypes
import functools
from typing import Any

from samdetr.models.ops.build import BuildError

_P, _U = ctypes.c_void_p, ctypes.c_uint
FUNCTIONS: dict[str, list[Any]] = {
    "cuInit": [_U],
    "cuGetErrorString": [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)],
    "cuDeviceGet": [ctypes.POINTER(ctypes.c_int), ctypes.c_int],
    "cuDevicePrimaryCtxRetain": [ctypes.POINTER(_P), ctypes.c_int],
    "cuCtxPushCurrent_v2": [_P],
    "cuCtxPopCurrent_v2": [ctypes.POINTER(_P)],
    "cuModuleLoadData": [ctypes.POINTER(_P), ctypes.c_char_p],
    "cuModuleGetFunction": [ctypes.POINTER(_P), _P, ctypes.c_char_p],
    "cuLaunchKernel": [_P, *[_U] * 7, _P, ctypes.POINTER(_P), ctypes.POINTER(_P)],
}


@functools.cache
def driver() -> ctypes.CDLL:
    """Raises BuildError where there is none, or none that runs."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        for name, types in FUNCTIONS.items():
            getattr(library, name).argtypes = types
    except (OSError, AttributeError) as error:
        raise BuildError(f"no CUDA driver: {error}") from error
    if status := library.cuInit(0):
        raise BuildError(f"the CUDA driver does not start: {_text(library, status)}")
    return library


def _text(library: ctypes.CDLL, status: int) -> str:
    text = ctypes.c_char_p()
    library.cuGetErrorString(status, ctypes.byref(text))
    return (text.value or f"error {status}".encode()).decode()


class Module:
    """The kernels of one compiled file on one device, in the context that PyTorch uses there (the primary one).

    Raises:
        BuildError: where the driver does not take them: a build may succeed that is too new for it.
    """

    def __init__(self, image: bytes, index: int):
        self._driver, self._functions = driver(), dict[str, ctypes.c_void_p]()
        device, self._context, self._module = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        try:
            self._call("cuDeviceGet", ctypes.byref(device), index)
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
            self._inside("cuModuleLoadData", ctypes.byref(self._module), image)
        except RuntimeError as error:
            raise BuildError(f"the kernels do not run on cuda:{index}: {error}") from error

    def launch(self, kernel: str, blocks: int, threads: int, stream: int, arguments: list[Any]) -> None:
        """Without waiting. `arguments` are ctypes objects of the kernel's own types. Raises RuntimeError."""
        if kernel not in self._functions:
            function = ctypes.c_void_p()
            self._inside("cuModuleGetFunction", ctypes.byref(function), self._module, kernel.encode())
            self._functions[kernel] = function
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        grid = (blocks, 1, 1, threads, 1, 1, 0)  # the driver copies the arguments before it returns
        self._inside("cuLaunchKernel", self._functions[kernel], *grid, stream, pointers, None)

    def _inside(self, name: str, *arguments: Any) -> None:
        """In the device's context; the one that was current is put back. Any thread may call, autograd's too."""
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            self._call(name, *arguments)
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self._driver, name)(*arguments):
            raise RuntimeError(f"{name}: {_text(self._driver, status)}")
