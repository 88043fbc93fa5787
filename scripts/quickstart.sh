#!/usr/bin/env bash
# From nothing to drawn detections: environment, embedded data set, training, evaluation, pictures. Minutes on two CPU
# cores; a GPU is used where there is one. Further flags go to the training, e.g. --seed 1.
#
# measured by us: see "Quick start" in README.md
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
python=.venv/bin/python
output=output/quickstart

$python -m datasets.shapes --output data/shapes
rm -rf "$output" # a run before this one would go on in the same log
$python main.py --coco_path data/shapes --output_dir "$output" "${SMALL[@]}" "$@"
