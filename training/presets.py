"""Settings for own data, chosen by name: `preset`. docs/training.md lists them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# Small networks from random weights, which need no download; a high learning rate that falls to zero; no crops.
_COMMON: dict[str, Any] = {
    "backbone": "resnet18",
    "backbone_norm": "learned",
    "backbone_weights": "none",
    "hidden_dim": 128,
    "nheads": 4,
    "dim_feedforward": 256,
    "enc_layers": 1,
    "dec_layers": 3,
    "num_queries": 49,  # SAP-DETR needs a square number
    "smca": True,  # of SAM-DETR; the next one of Deformable DETR, the others of SAP-DETR
    "with_box_refine": True,
    "newconvinit": True,
    "sdg": True,
    "bbox_embed_diff_each_layer": True,
    "crop_augmentation": False,
    "lr": 6e-4,
    "lr_backbone": 6e-4,
    "lr_schedule": "onecycle",
    "warmup_iters": 0,
}
# C4 of larger images for `small`; C3 of small ones for `tiny`.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "none": {},
        "small": {
            **_COMMON,
            "backbone_level": 4,
            "dropout": 0.05,
            "train_sizes": (160, 176, 192, 208, 224),
            "eval_size": 224,
            "max_size": 448,
            "batch_size": 8,
            "epochs": 50,
        },
        "tiny": {
            **_COMMON,
            "backbone_level": 3,
            "dropout": 0.0,
            "train_sizes": (128, 144, 160),
            "eval_size": 160,
            "max_size": 320,
            "batch_size": 16,
            "epochs": 24,
        },
    }
)
