#!/usr/bin/env bash
# Evaluates what scripts/sap_r50.sh trained, or --resume FILE, on one GPU with 4 images at once, as published.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export LAUNCH=${LAUNCH:-torchrun --standalone --nproc_per_node=1}
exec bash scripts/sap_r50.sh --eval --resume output/sap_r50/checkpoint0049.pth --output_dir output/sap_r50/eval "$@"
