"""Every flag of the three official programs, as their files hold them: honoured, refused by name, or without effect on
the network."""

import argparse
import shlex

import pytest
import torch
from helpers import error_line
from parity import cases

from samdetr.main import main
from samdetr.models.checkpoints import read_checkpoint

# Values other than the defaults, which our settings must take over. `epochs` and `dataset_file` shape SAM-DETR's norm
# and the class heads; both are read off the weights.
HONOURED = {
    "sam_detr": {
        "multiscale": True, "smca": True, "backbone": "resnet101", "dilation": True, "position_embedding": "sine",
        "enc_layers": 3, "dec_layers": 4, "dim_feedforward": 1024, "hidden_dim": 128, "nheads": 4, "num_queries": 90,
    },
    "deformable_detr": {
        "with_box_refine": True, "two_stage": True, "backbone": "resnet101", "dilation": True, "num_queries": 90,
        "position_embedding": "sine", "num_feature_levels": 3, "enc_layers": 3, "dec_layers": 4, "hidden_dim": 128,
        "dim_feedforward": 512, "nheads": 4, "dec_n_points": 3, "enc_n_points": 2,
    },
    "sap_detr": {
        "newconvinit": True, "sdg": True, "backbone": "resnet101", "dilation": True, "position_embedding": "sine",
        "bbox_embed_diff_each_layer": True, "enc_layers": 3, "dec_layers": 4, "dim_feedforward": 512, "nheads": 4,
        "hidden_dim": 128, "num_queries": 49, "num_select": 90, "transformer_activation": "relu",
        "meshgrid_refpoints_xy": True,
    },
}  # fmt: skip
ALL = {"backbone": "resnext50_32x4d", "position_embedding": "learned", "masks": True, "frozen_weights": "detr.pth"}
REFUSED = {
    "sam_detr": ALL,
    "deformable_detr": ALL,
    "sap_detr": ALL | {
        "backbone": "swin_B_224_22k", "pe_temperatureH": 10000, "pe_temperatureW": 19, "pre_norm": True,
        "class_embed_diff_each_layer": True, "rm_self_attn_decoder": True, "transformer_activation": "gelu",
    },
}  # fmt: skip
# Of training, data and processes, or of no effect in the official code either.
TRAINING = shlex.split("""lr lr_backbone batch_size weight_decay epochs lr_drop clip_max_norm dropout aux_loss
    set_cost_class set_cost_bbox set_cost_giou mask_loss_coef dice_loss_coef cls_loss_coef bbox_loss_coef
    giou_loss_coef focal_alpha dataset_file coco_path coco_panoptic_path remove_difficult output_dir device
    seed resume start_epoch eval num_workers world_size dist_url""")
OTHERS = {
    "sam_detr": [*TRAINING, *shlex.split("lr_linear_proj_names lr_linear_proj_mult eval_every_epoch save_every_epoch")],
    "deformable_detr": [
        *set(TRAINING) - {"world_size", "dist_url"},
        *shlex.split("lr_linear_proj_names lr_linear_proj_mult lr_backbone_names lr_drop_epochs sgd cache_mode"),
        "position_embedding_scale",  # never read
    ],
    "sap_detr": [
        *TRAINING,
        *shlex.split("save_checkpoint_interval modelname inner_loss_coef obj_loss_coef eos_coef fix_size note debug"),
        *shlex.split("pretrain_model_path finetune_ignore find_unused_params save_results save_log local_rank rank"),
        *shlex.split("warmup_iters cache_mode amp"),
        # never read, or read and not used
        *shlex.split(
            "keep_query_pos return_interm_layers backbone_freeze_keywords random_refpoints_xy batch_norm_type"
        ),
        "set_cost_obj",
    ],
}
NUMBER = {"sam_detr": 48, "deformable_detr": 52, "sap_detr": 77}  # counted in the official parsers
FAMILIES = {"sam_detr": "r50_smca_e50", "deformable_detr": "multi_scale_refine_two_stage", "sap_detr": "r50"}


def official_file(family: str, path, state: dict | None = None, **flags) -> str:
    """Names and shapes of a parity figure's model, with these flags alone."""
    facts, _ = cases.read_figures(FAMILIES[family], family=family)
    weights = {name: torch.zeros(()).expand(shape) for name, shape in facts["state_dict"].items()} | (state or {})
    torch.save({"model": weights, "epoch": 0, "args": argparse.Namespace(**flags)}, path / "official.pth")
    return str(path / "official.pth")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tables_are_complete(family):
    parts = [set(HONOURED[family]) | set(REFUSED[family]), set(OTHERS[family])]
    assert not parts[0] & parts[1]
    assert sum(map(len, parts)) == NUMBER[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_honoured(family, tmp_path):
    found = read_checkpoint(official_file(family, tmp_path, **HONOURED[family]))
    assert found["settings"] | HONOURED[family] == found["settings"]
    assert found["official"]
    assert found["settings"]["num_classes"] == 91
    accepted = {"masks": False, "frozen_weights": None, "pe_temperatureH": 20, "pe_temperatureW": 20, "pre_norm": False}
    read_checkpoint(official_file(family, tmp_path, **accepted, class_embed_diff_each_layer=False))


@pytest.mark.parametrize(("family", "name"), [(family, name) for family in FAMILIES for name in REFUSED[family]])
def test_refused(family, name, tmp_path):
    value = REFUSED[family][name]
    path = official_file(family, tmp_path, **HONOURED[family] | {name: value})
    with pytest.raises(ValueError, match=f"`resume` {path} has {name} {value}, which is not built here"):
        read_checkpoint(path)


def test_separate_class_heads_show_in_the_weights(tmp_path, capsys):
    """Also in a file without flags. The heads of our networks after the first are one: five of six would be lost."""
    path = official_file("sap_detr", tmp_path, {"class_embed.3.layers.2.bias": torch.ones(91)})
    assert main(["--eval", "--resume", path, "--coco_path", str(tmp_path), "--device", "cpu"]) == 2
    assert f"--resume {path} has class_embed_diff_each_layer True" in error_line(capsys.readouterr().err)
    read_checkpoint(official_file("sap_detr", tmp_path, {"class_embed.0.layers.2.bias": torch.ones(91)}))
