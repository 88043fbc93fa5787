#!/usr/bin/env bash
# Builds the kernels ahead of their first use: make.sh [cpu] [cuda], or both; CUDA by PyTorch's NVRTC. No GPU is needed:
# TORCH_CUDA_ARCH_LIST="8.0;9.0" chooses the architectures, else those of the GPUs here, else a list of common ones.
# PYTHON chooses the interpreter (default: .venv, else python3). A second run finds everything built.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." > /dev/null && pwd)
python=${PYTHON:-python3}
if [[ -z "${PYTHON:-}" && -z "${VIRTUAL_ENV:-}" && -x $root/.venv/bin/python ]]; then python=$root/.venv/bin/python; fi
"$python" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("torch"))' 2> /dev/null ||
  { echo "$python has no PyTorch: run scripts/setup.sh, or name another interpreter with PYTHON" >&2; exit 2; }
exec "$python" "$root/models/ops/build.py" "$@" # by its path: needs PyTorch and nothing else of the project
