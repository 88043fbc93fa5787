#!/usr/bin/env bash
# Makes .venv and installs requirements.txt, and any further requirement files given: setup.sh [FILE ...]
#
# A second run finds a stamp of what it installed and skips. PYTHON=python3.12 chooses the interpreter; an active
# environment is left alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ ! -x .venv/bin/python ]]; then
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version.split()[0] + "; set PYTHON=...")'
  "${PYTHON:-python3}" -m venv .venv || { echo "cannot make .venv; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
fi
for file in requirements.txt "$@"; do
  stamp=.venv/installed-$(basename "$file")
  if ! cmp -s "$file" "$stamp"; then
    echo "installing $file into .venv (PyTorch is a few GB on the first run)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement "$file"
    cp "$file" "$stamp" # last, so that an interrupted installation is not taken for done
  fi
done
