"""Compiles the kernels into a cache folder of the user: `python -m samdetr.models.ops.build [cpu] [cuda]`.

The kernels are C functions on plain pointers. No header of PyTorch or Python enters, so a build takes seconds, works
with every C++ compiler, and cannot disagree with PyTorch's own interface. CUDA's are compiled by NVRTC, which PyTorch
brings, with no header at all. A library is named after its source, flags, processor, and the version of PyTorch or
NVRTC; a change of one makes a new file. A library that is there is used, also where no C++ compiler is (any more).
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # started by its path: find the package from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from samdetr.models.ops import nvrtc

FOLDER = Path(__file__).parent  # a folder of sources for each operator
DEFAULT_ARCHITECTURES = "7.5 8.0 8.6 8.9 9.0 10.0 12.0"
CUDA_VALUES = ("float", "double", "Half", "BFloat")  # types of value in cuda.cu: a library for each
VECTOR_FLAGS = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"],
}


class BuildError(RuntimeError):
    """Why there is no library; the message is for the user."""


class NoCompiler(BuildError):
    """There is none here, and none was named."""


@dataclass(frozen=True)
class Recipe:
    """How one library is made. `target` is its processor: a vector extension, or sm_90 and the like."""

    name: str
    sources: tuple[Path, ...]
    headers: tuple[Path, ...]
    find_compiler: Callable[[], list[str]]
    flags: tuple[str, ...]
    target: str
    maker: str  # whose version the file's name tells
    suffix: str
    chosen: str = ""  # the compiler that the user named: another one's library will not do

    @property
    def library(self) -> Path:
        texts = (file.read_text(encoding="utf-8") for file in (*self.sources, *self.headers))
        parts = (*texts, self.chosen, *self.flags, self.maker)
        digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
        return cache_folder() / f"{self.name}-{self.target}-{self.maker}-{digest}{self.suffix}"


def cache_folder() -> Path:
    """PyTorch's folder for compiled extensions: TORCH_EXTENSIONS_DIR, else one in the user's cache."""
    if folder := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(folder) / "sam_detr_ops"
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:  # a user without a name, as in some containers
        raise BuildError(f"no cache folder: {error} Set TORCH_EXTENSIONS_DIR.") from error
    return Path(cache) / "torch_extensions" / "sam_detr_ops"


def find_cxx() -> list[str]:
    """The C++ compiler as the start of a command. CXX chooses it, and may hold flags."""
    if wanted := os.environ.get("CXX"):
        try:
            words = shlex.split(wanted)
        except ValueError as error:
            raise BuildError(f"CXX={wanted}: {error}") from error
        if not words or shutil.which(words[0]) is None:
            raise BuildError(f"CXX={wanted}: there is no such program")
        return words
    names = ("c++", "g++", "clang++")
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        raise NoCompiler(f"no C++ compiler: none of {', '.join(names)} is in PATH (CXX can name one)")
    return [compiler]


def cpu_recipe() -> Recipe:
    """For this processor, by the vector extension that PyTorch uses on it."""
    capability = torch.backends.cpu.get_cpu_capability()
    flags = ["-O3", "-std=c++17", "-fPIC", "-shared", *VECTOR_FLAGS.get(capability, [])]
    if sys.platform != "darwin":  # Apple's clang has no OpenMP: the kernel is then built without threads
        flags.append("-fopenmp")
    target = f"{platform.machine()}-{capability.lower().replace(' ', '')}"
    sources, headers = (tuple(sorted(FOLDER.rglob(pattern))) for pattern in ("cpu.cpp", "*.h"))
    maker, chosen = f"torch{torch.__version__.split('+')[0]}", os.environ.get("CXX", "")
    return Recipe("cpu_kernels", sources, headers, find_cxx, tuple(flags), target, maker, ".so", chosen)


@functools.cache
def find_nvrtc() -> str:
    """NVRTC of PyTorch's version of CUDA: where PyTorch's own loader finds it, else as the system does."""
    if not torch.version.cuda:
        raise NoCompiler("no NVRTC: this PyTorch was built without CUDA")
    major = torch.version.cuda.split(".")[0]
    folders = [f"nvidia/cu{major}/lib", "nvidia/cuda_nvrtc/lib", "cuda_nvrtc/lib", "torch/lib"]
    system = (
        f"{sys.prefix}/lib",
        *(f"{home}/lib64" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home),
    )
    for folder in (*(Path(path, folder) for path in sys.path for folder in folders), *map(Path, system)):
        for path in sorted(folder.glob(f"libnvrtc*.so.{major}*")):
            if "builtins" not in path.name and ".alt." not in path.name:
                return str(path.resolve())
    with contextlib.suppress(OSError):
        ctypes.CDLL(name := f"libnvrtc.so.{major}")
        return name
    raise NoCompiler(f"no NVRTC: libnvrtc.so.{major} is not beside PyTorch; pip install nvidia-cuda-nvrtc brings it")


def cuda_recipe(architecture: str, value: str) -> Recipe:
    """For one type of value, and GPUs of one compute capability, e.g. "9.0": machine code, or PTX for the next older
    architecture where NVRTC does not know this one yet."""
    path, number = find_nvrtc(), int(architecture.replace(".", ""))
    try:
        version, known = nvrtc.version(path), nvrtc.architectures(path)
    except nvrtc.NvrtcError as error:
        raise BuildError(str(error)) from error
    if number < known[0]:
        raise BuildError(f"NVRTC {version} compiles for sm_{known[0]} and newer GPUs, and this one is sm_{number}")
    nearest = max(code for code in known if code <= number)
    kind, suffix = ("sm", ".cubin") if nearest == number else ("compute", ".ptx")
    target, source = f"{kind}_{nearest}", FOLDER / "ms_deform_attn" / "cuda.cu"
    flags = (f"--gpu-architecture={target}", "--std=c++17", f"-DVALUE={value}")
    compiler = [sys.executable, "-I", str(FOLDER / "nvrtc.py"), path]
    name, maker = f"ms_deform_attn_{value}", f"nvrtc{version}"
    return Recipe(name, (source,), (), lambda: compiler, flags, target, maker, suffix)


@contextlib.contextmanager
def locked(path: Path, *, timeout: float) -> Iterator[None]:
    """Holds a lock file, so that of the processes of one machine (or one shared home) a single one compiles.

    Raises BuildError if another process holds it for longer than `timeout` seconds.
    """
    try:
        import fcntl
    except ImportError:  # no such locks here: the rename in build() still keeps half a file from being loaded
        yield
        return
    with open(path, "w") as file:
        until = time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the file closes, however that happens
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise BuildError(f"another process has held {path} for {timeout:.0f} s; end it") from None
                time.sleep(0.05)
        yield


def private(folder: Path) -> None:
    """Make the folder one that only this user can write into: what lies in it is loaded as code.

    Raises BuildError if it is another user's. Libraries in a folder that others could write into are removed.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    user = os.geteuid()
    if status.st_uid != user and not (status.st_uid == 0 and not status.st_mode & 0o022):
        raise BuildError(
            f"cache folder {folder} belongs to user {status.st_uid}, and this is user {user}; set TORCH_EXTENSIONS_DIR "
            "to a folder of your own"
        )
    if status.st_mode & 0o022:
        folder.chmod(status.st_mode & ~0o022)
        for path in (path for kind in ("so", "cubin", "ptx", "sha256") for path in folder.glob(f"*.{kind}")):
            path.unlink()


def checksum(library: Path) -> str:
    """Size and SHA-256."""
    content = library.read_bytes()
    return f"{len(content)} {hashlib.sha256(content).hexdigest()}"


def checksum_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def is_whole(library: Path) -> bool:
    """Whether the library is there as it was built, by this user: to load a part of one ends the process (SIGBUS)."""
    saved = checksum_file(library)
    if not (library.is_file() and saved.is_file()):
        return False
    if any(path.stat().st_mode & 0o022 or path.stat().st_uid not in (0, os.geteuid()) for path in (library, saved)):
        return False
    text = saved.read_text(errors="replace")
    return text.startswith(f"{library.stat().st_size} ") and text == checksum(library)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def build(recipe: Recipe, *, timeout: float = 900) -> Path:
    """The recipe's library, compiled unless it is there already, and whole.

    A process that waited for another's failed attempt takes over its reason instead of trying again.
    Raises:
        BuildError: with the compiler's last words, or why the cache folder cannot be used.
    """
    try:
        library = recipe.library
        folder = library.parent
        if folder.exists():
            private(folder)
        if is_whole(library):
            return library
        compiler = recipe.find_compiler()
        private(folder)
        asked = time.time()
        with locked(library.with_suffix(".lock"), timeout=1.1 * timeout):
            failure = library.with_suffix(".failed")
            if is_whole(library):
                return library
            if failure.exists() and failure.stat().st_mtime >= asked:
                raise BuildError(failure.read_text())
            remove_leftovers(library, older=2 * timeout)
            with tempfile.TemporaryDirectory(dir=folder, prefix=f"{library.stem}.build-") as temporary:
                output, digest = Path(temporary) / "library.so", Path(temporary) / "library.sha256"
                try:
                    run([*compiler, *recipe.flags, *map(str, recipe.sources), "-o", str(output)], timeout=timeout)
                except BuildError as error:
                    failure.write_text(str(error))
                    raise
                digest.write_text(checksum(output))
                for file, target in ((digest, checksum_file(library)), (output, library)):
                    file.chmod(0o600 if file is digest else 0o700)
                    sync(file)
                    file.replace(target)  # in one step: others see no file or a whole one
                sync(folder)
            failure.unlink(missing_ok=True)
        return library
    except OSError as error:
        raise BuildError(f"cache folder {cache_folder()}: {error}") from error


def remove_leftovers(library: Path, *, older: float) -> None:
    """Remove temporary folders of builds that were killed: of this library, whose lock the caller holds, and of others
    if they are older than `older` seconds."""
    for path in (*library.parent.glob("*.build-*"), *library.parent.glob("tmp????????")):
        own = path.name.startswith(f"{library.stem}.build-")
        if path.is_dir() and (own or time.time() - path.stat().st_mtime > older):
            shutil.rmtree(path, ignore_errors=True)


def run(command: list[str], *, timeout: float) -> str:
    """What the command prints. Raises BuildError with its last words if it cannot be run, fails, or takes too long."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{shlex.join(command)} took more than {timeout:.0f} s") from error
    if result.returncode:
        words = "\n".join((result.stderr or result.stdout).strip().splitlines()[-15:])
        raise BuildError(f"{shlex.join(command)} failed with status {result.returncode}:\n{words or '(no message)'}")
    return result.stdout


def wanted_architectures() -> list[str]:
    """TORCH_CUDA_ARCH_LIST, else those of the GPUs in this machine, else all of a default list that NVRTC knows.

    Raises:
        ValueError: naming an entry of the list that is no compute capability, or one that NVRTC does not know.
        BuildError: without NVRTC, which is asked what it knows.
    """
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").replace(",", " ").split()
    for name in listed:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise ValueError(f"TORCH_CUDA_ARCH_LIST: {name!r} is no compute capability such as 9.0 or 9.0+PTX")
    # What "a", "f" and "+PTX" would add is not used.
    wanted = list(dict.fromkeys(re.sub(r"[af]?(\+PTX)?$", "", name) for name in listed))
    if not wanted and torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        return sorted({"{}.{}".format(*torch.cuda.get_device_capability(device)) for device in devices})
    path = find_nvrtc()
    try:
        version, known = nvrtc.version(path), [f"{code // 10}.{code % 10}" for code in nvrtc.architectures(path)]
    except nvrtc.NvrtcError as error:
        raise BuildError(str(error)) from error
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(
            f"TORCH_CUDA_ARCH_LIST: {unknown[0]} is unknown to NVRTC {version}, which has {' '.join(known)}"
        )
    return wanted or [name for name in DEFAULT_ARCHITECTURES.split() if name in known]


def wanted_recipes(device: str) -> list[Recipe]:
    if device == "cpu":
        return [cpu_recipe()]
    return [cuda_recipe(name, value) for name in wanted_architectures() for value in CUDA_VALUES]


def main(devices: list[str]) -> int:
    """Builds what can be built here and says so.

    Returns 2 for bad arguments; 1 if something failed, or if there is no compiler for a device that was named, or none
    at all; else 0.
    """
    if unknown := set(devices) - {"cpu", "cuda"}:
        print(f"{', '.join(sorted(unknown))}: expected cpu, cuda or nothing (both)", file=sys.stderr)
        return 2
    made = failed = 0
    for device in devices or ("cpu", "cuda"):
        try:
            recipes = wanted_recipes(device)
        except BuildError as error:
            fails = bool(devices) or not isinstance(error, NoCompiler)
            failed += fails
            print(f"{device}: {'FAILED' if fails else 'skipped'}, {error}")
            continue
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        for recipe in recipes:
            start = time.time()
            try:
                print(f"{device} {recipe.target}: {build(recipe)} ({time.time() - start:.0f} s)", flush=True)
                made += 1
            except BuildError as error:
                failed += 1
                print(f"{device} {recipe.target}: FAILED, {error}")
    return int(failed > 0 or made == 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
