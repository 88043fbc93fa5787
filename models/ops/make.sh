#!/usr/bin/env bash
# Builds the kernels ahead of their first use: make.sh [cpu] [cuda], or both; CUDA where nvcc is found. No GPU is needed:
# TORCH_CUDA_ARCH_LIST="8.0;9.0" chooses the architectures, else those of the GPUs here, else a list of common ones.
# PYTHON chooses the interpreter (default: .venv, else python3). A second run finds everything built.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-python3}
if [[ -z "${PYTHON:-}" && -z "${VIRTUAL_ENV:-}" && -x .venv/bin/python ]]; then python=.venv/bin/python; fi
exec "$python" models/ops/build.py "$@" # by its path: needs PyTorch and nothing else of the project
