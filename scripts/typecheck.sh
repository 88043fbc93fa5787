#!/usr/bin/env bash
# mypy over the whole package: typecheck.sh [PYTHON], by default the active environment's.
#
# mypy cannot follow that samdetr/__init__.py extends the package by the folders beside it. So it checks the package as
# a wheel has it: a temporary folder of links, by pyproject.toml's table force-include.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
checkout=$PWD
python=$(command -v "${1:-python}") && python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")

links=$(mktemp -d)
trap 'rm -r "$links"' EXIT
mkdir "$links/samdetr"
ln -s "$checkout"/samdetr/*.py "$checkout/samdetr/py.typed" "$links/samdetr"
sed -n 's|^"\(.*\)" = "samdetr/.*"$|\1|p' pyproject.toml | while read -r part; do
  ln -s "$checkout/$part" "$links/samdetr"
done

cd "$links"
"$python" -m mypy --config-file "$checkout/pyproject.toml" --cache-dir "$checkout/.mypy_cache" -p samdetr
