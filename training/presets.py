"""Settings for own data, chosen by name: `preset`. docs/training.md lists them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# Small networks from random weights, which need no download; a high learning rate that falls to zero; no crops.
_COMMON: dict[str, Any] = {
    "backbone": "resnet18",
    "backbone_level": 3,
    "backbone_norm": "learned",
    "backbone_weights": "none",
    "hidden_dim": 128,
    "nheads": 4,
    "dim_feedforward": 256,
    "enc_layers": 1,
    "dec_layers": 3,
    "dropout": 0.0,
    "num_queries": 49,  # SAP-DETR needs a square number
    "smca": True,  # of SAM-DETR; the next one of Deformable DETR, the others of SAP-DETR
    "with_box_refine": True,
    "newconvinit": True,
    "sdg": True,
    "bbox_embed_diff_each_layer": True,
    "crop_augmentation": False,
    "batch_size": 4,
    "lr": 4e-4,
    "lr_backbone": 4e-4,
    "lr_schedule": "onecycle",
    "warmup_iters": 0,
}
# Measured on blood cells (docs/log.md): `tiny` as it is, `small`, of twice as many cells, with 16 epochs.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "none": {},
        "small": {**_COMMON, "train_sizes": (192, 208, 224, 240, 256), "eval_size": 224, "max_size": 448, "epochs": 50},
        "tiny": {**_COMMON, "train_sizes": (144, 160, 176), "eval_size": 160, "max_size": 320, "epochs": 16},
    }
)
