#!/usr/bin/env bash
# Deformable DETR, ResNet-50, one level, 50 epochs on COCO 2017.
#
# hardware              8 GPUs x 4 images, or 2 nodes x 8 GPUs x 2 images
# AP on val2017         published: 39.4; measured by us: not yet
# trainable parameters  33.84 M (all: 34.07 M)
# GFLOPs                published: 78; counted: 79.3
#
# Two nodes: NODES=2 NODE_RANK=0 MASTER_ADDR=FIRST_NODE bash scripts/deformable_r50_single_scale.sh on the first, the same
# with NODE_RANK=1 on the second. COCO_PATH is the folder of COCO, data/coco unless set (relative paths start at the
# repository). Further flags pass through, e.g. --resume FILE. DRY_RUN=1 prints the command instead of running it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/nodes.sh

exec ${DRY_RUN:+echo} "${launch[@]}" main.py --model deformable_detr \
  --batch_size "$batch" --num_feature_levels 1 --epochs 50 --lr_drop 40 \
  --coco_path "${COCO_PATH:-data/coco}" --keep -1 --output_dir output/deformable_r50_single_scale "$@"
