"""`python -m samdetr.models.ops.doctor`: whether the compiled kernels run on this machine's devices, and why not."""

import os
import shlex
import sys

import torch

from samdetr.models.ops import build, kernels, nvrtc


def diagnose(device: torch.device) -> list[str]:
    """One finding a line, the path first. Builds the kernel where that has not been tried yet."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    reason = kernels.why_not(device.type, device.index)
    if reason is None:
        return [f"{device} ({name}): compiled kernel"]
    return [f"{device} ({name}): plain PyTorch, several times slower, because", *reason.splitlines()]


def describe(find) -> str:
    try:
        return shlex.join(find())
    except (build.BuildError, nvrtc.NvrtcError) as error:
        return str(error)


def main() -> int:
    version = torch.version.cuda or torch.version.hip or "none"
    print(f"torch {torch.__version__}, CUDA {version}, CPU capability {torch.backends.cpu.get_cpu_capability()}")
    print(f"C++ compiler: {describe(build.find_cxx)}")
    print(f"CUDA compiler: {describe(lambda: ['NVRTC', nvrtc.version(build.find_nvrtc()), build.find_nvrtc()])}")
    print(f"libraries: {describe(lambda: [str(build.cache_folder())])}")
    for variable in ("MS_DEFORM_ATTN", "CXX", "TORCH_CUDA_ARCH_LIST", "TORCH_EXTENSIONS_DIR"):
        if variable in os.environ:
            print(f"{variable}={os.environ[variable]}")
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    else:
        print("no CUDA device that PyTorch can use")
    for device in devices:
        first, *rest = diagnose(device)
        print("\n    ".join([first, *rest]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
