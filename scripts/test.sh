#!/usr/bin/env bash
# Everything that is checked before a change lands: ruff, mypy, then pytest on two processes. Further arguments go to
# pytest, e.g. -k parity.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh requirements-dev.txt

.venv/bin/ruff check .
.venv/bin/ruff format --check .
bash scripts/typecheck.sh .venv/bin/python
.venv/bin/python -m pytest "$@"
