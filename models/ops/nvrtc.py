"""Compiles CUDA source for one GPU with NVRTC, the compiler that every CUDA build of PyTorch brings: no toolkit needed.

As a program, so that a build has a time limit and cannot harm its caller; needs nothing but Python:
`python nvrtc.py LIBNVRTC OPTION... SOURCE -o OUTPUT`.
"""

import ctypes
import functools
import sys
from pathlib import Path


class NvrtcError(RuntimeError):
    """One line."""


@functools.cache
def load(path: str) -> ctypes.CDLL:
    """Raises NvrtcError where it does not load."""
    try:
        # It looks for a second library by a bare name, which it finds if that is there already.
        for builtins in sorted(Path(path).parent.glob("libnvrtc-builtins*.so*")) if "/" in path else []:
            if ".alt." not in builtins.name:
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        library = ctypes.CDLL(path)
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        library.nvrtcGetSupportedArchs  # noqa: B018 - the newest function used, of CUDA 11.2
    except (OSError, AttributeError) as error:
        raise NvrtcError(f"{path} does not load: {error}") from error
    return library


def _check(library: ctypes.CDLL, status: int) -> None:
    if status:
        raise NvrtcError(f"NVRTC: {library.nvrtcGetErrorString(status).decode()}")


@functools.cache
def version(path: str) -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    library = load(path)
    _check(library, library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"


@functools.cache
def architectures(path: str) -> list[int]:
    """Of the GPUs that it compiles for, e.g. 90, ascending."""
    library, count = load(path), ctypes.c_int()
    _check(library, library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    numbers = (ctypes.c_int * count.value)()
    _check(library, library.nvrtcGetSupportedArchs(numbers))
    return sorted(numbers)


def compile_source(path: str, source: Path, options: list[str]) -> tuple[bytes, str]:
    """Machine code, or PTX where the options ask for a virtual architecture, and the log. Raises NvrtcError."""
    library, program, size = load(path), ctypes.c_void_p(), ctypes.c_size_t()

    def read(name: str) -> bytes:
        _check(library, getattr(library, f"nvrtcGet{name}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        _check(library, getattr(library, f"nvrtcGet{name}")(program, buffer))
        return buffer.raw

    name = source.name.encode()
    _check(library, library.nvrtcCreateProgram(ctypes.byref(program), source.read_bytes(), name, 0, None, None))
    try:
        encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = library.nvrtcCompileProgram(program, len(options), encoded)
        log = read("ProgramLog").rstrip(b"\0").decode(errors="replace")
        if status:
            lines = log.splitlines() or [library.nvrtcGetErrorString(status).decode()]
            raise NvrtcError(f"NVRTC {version(path)}: {next((line for line in lines if 'error' in line), lines[0])}")
        return read("CUBIN" if any("=sm_" in option for option in options) else "PTX"), log
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def main(library: str, *arguments: str) -> int:
    *options, source, _, output = arguments
    try:
        Path(output).write_bytes(compile_source(library, Path(source), options)[0])
    except (NvrtcError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
