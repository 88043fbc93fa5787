#!/usr/bin/env bash
# Evaluates what scripts/sap_r50_dc5.sh trained, or --resume FILE, on one GPU with 1 image at once, as published.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export LAUNCH=${LAUNCH:-torchrun --standalone --nproc_per_node=1}
exec bash scripts/sap_r50_dc5.sh --eval --resume output/sap_r50_dc5/checkpoint0049.pth --output_dir output/sap_r50_dc5/eval "$@"
