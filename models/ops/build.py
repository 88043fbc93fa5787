"""Compiles the kernels in csrc/ into a cache folder of the user: `python -m models.ops.build [cpu] [cuda]`.

The kernels are C functions on plain pointers. No header of PyTorch or Python enters, so a build takes seconds (CUDA:
about half a minute), works with every compiler and CUDA toolkit that supports the GPU, and cannot disagree with
PyTorch's own interface. A library is named after everything that it depends on; a change of one makes a new file.
"""

import contextlib
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

CSRC = Path(__file__).with_name("csrc")
DEFAULT_ARCHITECTURES = "7.5 8.0 8.6 8.9 9.0 10.0 12.0"
VECTOR_FLAGS = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"],
}


class BuildError(RuntimeError):
    """Why there is no library; the message is for the user."""


@dataclass(frozen=True)
class Recipe:
    """How one library is made. `target` is its processor: a vector extension, or sm_90 and the like."""

    source: Path
    compiler: str
    version: str
    flags: tuple[str, ...]
    target: str

    @property
    def library(self) -> Path:
        parts = (self.source.read_text(encoding="utf-8"), self.compiler, self.version, *self.flags, torch.__version__)
        digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
        cuda = f"-cu{torch.version.cuda}" if self.source.suffix == ".cu" else ""
        name = f"{self.source.stem}-{self.target}-torch{torch.__version__.split('+')[0]}{cuda}-{digest}.so"
        return cache_folder() / name

    def command(self, output: Path) -> list[str]:
        return [*shlex.split(self.compiler), *self.flags, str(self.source), "-o", str(output)]


def cache_folder() -> Path:
    """PyTorch's folder for compiled extensions: TORCH_EXTENSIONS_DIR, else one in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(cache) / "torch_extensions") / "sam_detr_ops"


def compiler_version(compiler: str) -> str:
    """First lines of what `compiler --version` says. Raises BuildError where it cannot be run."""
    command = shlex.split(compiler)
    if not command or shutil.which(command[0]) is None:
        raise BuildError(f"no compiler {compiler!r}")
    try:
        return subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{compiler!r} does not run: {error}") from error


def cpu_recipe() -> Recipe:
    """For this processor, by the vector extension that PyTorch uses on it; CXX chooses the compiler."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    compiler = next((name for name in names if shutil.which((shlex.split(name) or [""])[0])), None)
    if compiler is None:
        raise BuildError(f"no C++ compiler: none of {', '.join(names)} is in PATH (CXX can name one)")
    capability = torch.backends.cpu.get_cpu_capability()
    flags = ["-O3", "-std=c++17", "-fPIC", "-shared", *VECTOR_FLAGS.get(capability, [])]
    if sys.platform != "darwin":  # Apple's clang has no OpenMP: the kernel is then built without threads
        flags.append("-fopenmp")
    target = f"{os.uname().machine}-{capability.lower().replace(' ', '')}"
    return Recipe(CSRC / "ms_deform_attn_cpu.cpp", compiler, compiler_version(compiler), tuple(flags), target)


def find_nvcc() -> str:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        raise BuildError("no nvcc: it is not in PATH, CUDA_HOME/bin or /usr/local/cuda/bin")
    return nvcc


def cuda_recipe(architecture: str) -> Recipe:
    """For GPUs of one compute capability, e.g. "9.0"; such code also runs on later minor versions (8.0 on 8.6)."""
    if not re.fullmatch(r"\d+\.\d[a-f]?", architecture):
        raise BuildError(f"CUDA architecture {architecture!r}: expected a compute capability such as 9.0")
    number = architecture.replace(".", "")
    nvcc = find_nvcc()
    # The runtime is linked in: it shares the device's primary context with PyTorch's, whichever version that is.
    flags = ["-O3", "-std=c++17", "-shared", "-cudart", "static", "-Xcompiler", "-fPIC"]
    flags += [f"-gencode=arch=compute_{number},code=[sm_{number},compute_{number}]"]
    return Recipe(CSRC / "ms_deform_attn_cuda.cu", nvcc, compiler_version(nvcc), tuple(flags), f"sm_{number}")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file, so that of the processes of one machine (or one shared home) a single one compiles."""
    try:
        import fcntl
    except ImportError:  # no such locks here: the rename in build() still keeps half a file from being loaded
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file closes, also when the process dies
        yield


def build(recipe: Recipe, *, timeout: float = 900) -> Path:
    """The recipe's library, compiled unless it is there already.

    A process that waited for another's failed attempt takes over its reason instead of trying again.
    Raises:
        BuildError: with the compiler's last words, or why the cache folder cannot be used.
    """
    try:
        library = recipe.library
        if library.exists():
            return library
        library.parent.mkdir(parents=True, exist_ok=True)
        asked = time.time()
        with locked(library.with_suffix(".lock")):
            failure = library.with_suffix(".failed")
            if library.exists():
                return library
            if failure.exists() and failure.stat().st_mtime >= asked:
                raise BuildError(failure.read_text())
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                output = Path(folder) / "library.so"
                try:
                    run(recipe.command(output), timeout=timeout)
                except BuildError as error:
                    failure.write_text(str(error))
                    raise
                output.replace(library)  # in one step: others see no file or a whole one
            failure.unlink(missing_ok=True)
        return library
    except OSError as error:
        raise BuildError(f"cache folder {cache_folder()}: {error}") from error


def run(command: list[str], *, timeout: float) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{shlex.join(command)} took more than {timeout:.0f} s") from error
    if result.returncode:
        words = "\n".join((result.stderr or result.stdout).strip().splitlines()[-15:])
        raise BuildError(f"{shlex.join(command)} failed with status {result.returncode}:\n{words}")


def wanted_architectures() -> list[str]:
    """TORCH_CUDA_ARCH_LIST, else those of the GPUs in this machine, else all of a default list that nvcc knows."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").replace(",", " ").split()
    if listed:
        return list(dict.fromkeys(name.removesuffix("+PTX") for name in listed))
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        return sorted({"{}.{}".format(*torch.cuda.get_device_capability(device)) for device in devices})
    known = subprocess.run([find_nvcc(), "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    return [name for name in DEFAULT_ARCHITECTURES.split() if "sm_" + name.replace(".", "") in known]


def main(devices: list[str]) -> int:
    """Builds what can be built here and says so; status 1 if something that has a compiler failed."""
    if unknown := set(devices) - {"cpu", "cuda"}:
        print(f"{', '.join(sorted(unknown))}: expected cpu, cuda or nothing (both)")
        return 2
    status = 0
    for device in devices or ("cpu", "cuda"):
        try:
            recipes = [cpu_recipe()] if device == "cpu" else [cuda_recipe(name) for name in wanted_architectures()]
        except BuildError as error:
            print(f"{device}: skipped, {error}")
            continue
        for recipe in recipes:
            start = time.time()
            try:
                print(f"{device} {recipe.target}: {build(recipe)} ({time.time() - start:.0f} s)")
            except BuildError as error:
                status = 1
                print(f"{device} {recipe.target}: FAILED, {error}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
