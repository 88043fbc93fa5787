#!/usr/bin/env bash
# SAP-DETR, ResNet-101, 50 epochs on COCO 2017.
#
# hardware              4 GPUs x 4 images, or 2 nodes x 4 GPUs x 2 images
# AP on val2017         published: 44.4; measured by us: not yet
# trainable parameters  69.11 M (all: 69.33 M; published: 67 M)
# GFLOPs                published: 158; counted: 160.0
#
# Two nodes: NODES=2 NODE_RANK=0 MASTER_ADDR=FIRST_NODE bash scripts/sap_r101.sh on the first, the same with
# NODE_RANK=1 on the second; --batch_size 4 makes it the published multi-node run, of 32 images a step. The published
# training loop is --legacy_no_zero_grad. COCO_PATH is the folder of COCO, data/coco unless set (relative paths start at
# the repository). Further flags pass through, e.g. --resume FILE. DRY_RUN=1 prints the command instead of running it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
images=16 gpus=4
source scripts/nodes.sh

exec ${DRY_RUN:+echo} "${launch[@]}" main.py -m sap_detr --backbone resnet101 \
  --num_queries 306 --num_select 300 --meshgrid_refpoints_xy --newconvinit --sdg --bbox_embed_diff_each_layer \
  --batch_size "$batch" --epochs 50 --lr_drop 40 --warmup_iters 1000 \
  --coco_path "${COCO_PATH:-data/coco}" --keep -1 --output_dir output/sap_r101 "$@"
