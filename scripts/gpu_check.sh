#!/usr/bin/env bash
# Proves and measures the code on a GPU, in at most 25 minutes: gpu_check.sh [OUT] [--part PART], a part being ops,
# parity, step, speed, resume or ddp. Without a GPU it runs small on the CPU. Parts that are done are kept;
# docs/operators.md says more. PYTHON chooses the interpreter (default: .venv, else python3); it needs
# requirements-dev.txt.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." > /dev/null && pwd)
python=${PYTHON:-python3}
if [[ -z "${PYTHON:-}" && -z "${VIRTUAL_ENV:-}" && -x $root/.venv/bin/python ]]; then python=$root/.venv/bin/python; fi
exec "$python" "$root/benchmarks/gpu_check.py" "$@"
