#!/usr/bin/env bash
# SAM-DETR with SMCA, ResNet-50-DC5, 12 epochs on COCO 2017.
#
# hardware              8 GPUs x 1 image
# AP on val2017         published: 40.6 (last epoch); measured by us: not yet
# trainable parameters  58.12 M
# GFLOPs                published: 210; counted: 209.5
#
# Two nodes, as many images a step: NODES=2 NODE_RANK=0 MASTER_ADDR=FIRST_NODE bash scripts/r50_dc5_smca_e12_8gpu.sh on the
# first, the same with NODE_RANK=1 on the second. COCO_PATH is the folder of COCO, data/coco unless set (relative paths
# start at the repository). Further flags pass through, e.g. --resume FILE. DRY_RUN=1 prints the command instead of
# running it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
images=8 gpus=8
source scripts/nodes.sh

exec ${DRY_RUN:+echo} "${launch[@]}" main.py \
  --batch_size "$batch" --dilation --smca --epochs 12 --lr_drop 10 \
  --coco_path "${COCO_PATH:-data/coco}" --keep -1 --output_dir output/r50_dc5_smca_e12_8gpu "$@"
