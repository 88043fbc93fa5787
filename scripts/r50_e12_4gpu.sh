#!/usr/bin/env bash
# SAM-DETR, ResNet-50, 12 epochs on COCO 2017.
#
# hardware              4 GPUs x 4 images
# AP on val2017         published: 33.1 (last epoch); measured by us: not yet
# trainable parameters  58.07 M
# GFLOPs                published: about 100; counted: 99.3
#
# Two nodes, as many images a step: NODES=2 NODE_RANK=0 MASTER_ADDR=FIRST_NODE bash scripts/r50_e12_4gpu.sh on the
# first, the same with NODE_RANK=1 on the second. COCO_PATH is the folder of COCO, data/coco unless set (relative paths
# start at the repository). Further flags pass through, e.g. --resume FILE. DRY_RUN=1 prints the command instead of
# running it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
images=16 gpus=4
source scripts/nodes.sh

exec ${DRY_RUN:+echo} "${launch[@]}" main.py \
  --batch_size "$batch" --epochs 12 --lr_drop 10 \
  --coco_path "${COCO_PATH:-data/coco}" --keep -1 --output_dir output/r50_e12_4gpu "$@"
