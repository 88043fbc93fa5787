#!/usr/bin/env bash
# From nothing to drawn detections: environment, embedded data set, training, evaluation, pictures. A GPU is used where
# there is one. Further flags go to the training, e.g. --seed 1. README.md says what we measured.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
python=.venv/bin/python
data=data/shapes
pictures=data/shapes320
output=output/quickstart

# Small enough for two CPU cores: a ResNet-18 up to C3 (stride 8) from scratch, one encoder and three decoder layers
# (docs/training.md lists the flags of the preset), for small images with few objects. Denoising queries and a class
# loss that knows how well boxes fit make up for the short training (docs/log.md, 2026-11-26).
small=(
  --preset tiny --num_queries 10 --train_sizes 80 --eval_size 80 --denoising 5 --class_loss ia_bce
  --batch_size 16 --lr 1e-3 --lr_backbone 1e-3 --epochs 7
)

$python -m datasets.shapes --output "$data" --size 160
$python main.py --coco_path "$data" --output_dir "$output" "${small[@]}" \
  --eval_every_epoch 4 --print_every 25 --overwrite "$@" # an earlier quick start moves to a subfolder
# The same scenes as the first of those held out, in more pixels than the network sees.
$python -m datasets.shapes --output "$pictures" --size 320 --num_train 1 --num_val 12
$python demo.py --resume "$output/checkpoint.pth" --images "$pictures/val2017" --threshold 0.3 --nms 0.5 \
  --annotations "$pictures/annotations/instances_val2017.json" --output "$output/pictures" --overwrite --salient_points

echo
echo "Evaluation of $output/checkpoint.pth on the held-out images:"
$python main.py --coco_path "$data" --resume "$output/checkpoint.pth" --eval --output_dir "$output/eval"
echo
echo "detections beside the ground truth, salient points:  $output/pictures"
echo "training curve:                                      $output/curves.png"
echo "draw your own:  .venv/bin/python demo.py --resume $output/checkpoint.pth --images FILE_OR_FOLDER"
