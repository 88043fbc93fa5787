#!/usr/bin/env bash
# SAM-DETR, ResNet-50, 50 epochs on COCO 2017.
#
# hardware              4 GPUs x 4 images
# AP on val2017         published: 39.8 (last epoch); measured by us: not yet
# trainable parameters  58.07 M
# GFLOPs                published: about 100; measured by us: not yet
#
# COCO_PATH is the folder of COCO, data/coco unless set (relative paths start at the repository). Further flags pass
# through, e.g. --resume FILE. DRY_RUN=1 prints the command instead of running it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
read -ra launch <<< "${LAUNCH:-torchrun --standalone --nproc_per_node=4}"

exec ${DRY_RUN:+echo} "${launch[@]}" main.py \
  --batch_size 4 --epochs 50 --lr_drop 40 \
  --coco_path "${COCO_PATH:-data/coco}" --output_dir output/r50_e50_4gpu "$@"
