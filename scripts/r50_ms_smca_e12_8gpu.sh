#!/usr/bin/env bash
# Multi-scale SAM-DETR with SMCA, ResNet-50, 12 epochs on COCO 2017.
#
# hardware              8 GPUs x 2 images
# AP on val2017         published: 42.8 (last epoch); measured by us: not yet
# trainable parameters  55.02 M
# GFLOPs                published: 203; measured by us: not yet
#
# COCO_PATH is the folder of COCO, data/coco unless set (relative paths start at the repository). Further flags pass
# through, e.g. --resume FILE. DRY_RUN=1 prints the command instead of running it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
read -ra launch <<< "${LAUNCH:-torchrun --standalone --nproc_per_node=8}"

exec ${DRY_RUN:+echo} "${launch[@]}" main.py \
  --batch_size 2 --multiscale --smca --epochs 12 --lr_drop 10 \
  --coco_path "${COCO_PATH:-data/coco}" --output_dir output/r50_ms_smca_e12_8gpu "$@"
