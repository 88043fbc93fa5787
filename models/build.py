"""From settings to networks: the only file here that reads args. Every implicit rule becomes a value."""

from __future__ import annotations

import contextlib
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException
from typing import Any

import torch
import torchvision
from torch import Tensor

from samdetr.models.backbone import Backbone
from samdetr.models.criterion import SetCriterion, box_losses, cardinality_error, class_error, focal_loss
from samdetr.models.deformable_detr import official_weights as deformable_detr_weights
from samdetr.models.deformable_detr.decoder import DeformableDecoder, DeformableDecoderLayer
from samdetr.models.detector import Detector
from samdetr.models.encoder import DeformableEncoder, DenseEncoder
from samdetr.models.layers import InputProjection
from samdetr.models.matcher import HungarianMatcher, focal_class_cost, giou_cost, l1_cost
from samdetr.models.postprocess import postprocess
from samdetr.models.sam_detr import official_weights as sam_detr_weights
from samdetr.models.sam_detr.decoder import SAMDecoder, SAMDecoderLayer
from samdetr.models.sap_detr import official_weights as sap_detr_weights
from samdetr.models.sap_detr.decoder import TEMPERATURE as SAP_DETR_TEMPERATURE
from samdetr.models.sap_detr.decoder import SAPDecoder, SAPDecoderLayer
from samdetr.models.sap_detr.losses import (
    OUTSIDE,
    corner_box_losses,
    corner_l1_cost,
    inner_loss,
    object_class_cost,
    object_loss,
    outside_cost,
)
from samdetr.models.sap_detr.losses import giou_cost as sap_giou_cost
from samdetr.models.semantics_aligner import SemanticsAligner
from samdetr.util.checkpoint import read_file

# Settings that shape every network and its input in evaluation: a checkpoint brings its own, so that evaluation and
# drawing need no flags. Each family adds its own in the table below.
TRUNK_SETTINGS = (
    "model",
    "eval_size",
    "max_size",
    "num_classes",
    "backbone",
    "backbone_norm",
    "dilation",
    "position_embedding",
    "enc_layers",
    "dec_layers",
    "dim_feedforward",
    "hidden_dim",
    "nheads",
    "num_queries",
)


def build_sam_detr(args: Namespace) -> Detector:
    """SAM-DETR (CVPR 2022): a dense encoder and the decoder with Semantics Aligners."""
    _check_widths(args)
    _check_levels(args)
    backbone = _build_backbone(args, levels=(3, 4, 5) if args.multiscale else (args.backbone_level,))
    num_levels = len(backbone.num_channels)
    projection = InputProjection(
        in_channels=backbone.num_channels, hidden_dim=args.hidden_dim, norm=input_proj_norm(args) == "group"
    )
    sizes = {"hidden_dim": args.hidden_dim, "num_heads": args.nheads, "dropout": args.dropout}
    if args.multiscale:
        # Half as wide a feed-forward branch as the flag says, as published: it runs on 21 times as many positions.
        encoder = DeformableEncoder(
            num_layers=args.enc_layers, feedforward_dim=args.dim_feedforward // 2, num_levels=num_levels, **sizes
        )
    else:
        encoder = DenseEncoder(num_layers=args.enc_layers, feedforward_dim=args.dim_feedforward, **sizes)
    decoder = SAMDecoder(
        layer=SAMDecoderLayer(**sizes, feedforward_dim=args.dim_feedforward, aligner=_build_aligner(args)),
        num_queries=args.num_queries,
        num_classes=args.num_classes,
        levels=coarse_to_fine(args.dec_layers, num_levels),
    )
    return Detector(backbone=backbone, projection=projection, encoder=encoder, decoder=decoder)


def build_deformable_detr(args: Namespace) -> Detector:
    """Deformable DETR (ICLR 2021): deformable attention in the encoder and in the decoder."""
    _check_widths(args)
    if args.two_stage and not args.with_box_refine:
        raise ValueError("--two_stage needs --with_box_refine: proposals are boxes to refine; add that flag")
    # The coarsest stages up to the last one used; what is missing to the number of levels is made of that one.
    stages = range(3, args.backbone_level + 1)[-args.num_feature_levels :]
    backbone = _build_backbone(args, levels=tuple(stages))
    projection = InputProjection(
        in_channels=backbone.num_channels,
        hidden_dim=args.hidden_dim,
        norm=input_proj_norm(args) == "group",
        extra_levels=args.num_feature_levels - len(stages),
        level_embedding=True,  # of a single level, too
        xavier=True,
    )
    sizes = {
        "hidden_dim": args.hidden_dim,
        "num_heads": args.nheads,
        "dropout": args.dropout,
        "feedforward_dim": args.dim_feedforward,
        "num_levels": args.num_feature_levels,
    }
    aligner = None
    if args.sam_resample != "off":  # the heads of deformable attention share one query and its reference
        aligner = SemanticsAligner(
            hidden_dim=args.hidden_dim,
            num_heads=1,
            resample=args.sam_resample,
            reweight=args.sam_reweight,
            search_range=args.sam_range,
        )
    decoder = DeformableDecoder(
        layer=DeformableDecoderLayer(**sizes, num_points=args.dec_n_points, aligner=aligner),
        levels=coarse_to_fine(args.dec_layers, args.num_feature_levels),
        num_queries=args.num_queries,
        num_classes=args.num_classes,
        refine=args.with_box_refine,
        two_stage=args.two_stage,
    )
    return Detector(
        backbone=backbone,
        projection=projection,
        encoder=DeformableEncoder(num_layers=args.enc_layers, num_points=args.enc_n_points, **sizes),
        decoder=decoder,
    )


def told_by_weights(state: dict[str, Tensor]) -> dict[str, Any]:
    """What official files do not tell."""
    told: dict[str, Any] = {"input_proj_norm": "group" if "projection.levels.0.1.weight" in state else "none"}
    if "decoder.class_heads.0.bias" in state:
        told["num_classes"] = len(state["decoder.class_heads.0.bias"])
    return told


def coarse_to_fine(num_layers: int, num_levels: int) -> tuple[int, ...]:
    """Which level each decoder layer attends, levels being given from fine to coarse: an even split that starts with
    the coarsest. Six layers and three levels: 2, 2, 1, 1, 0, 0."""
    return tuple(num_levels - 1 - layer * num_levels // num_layers for layer in range(num_layers))


def _build_aligner(args: Namespace) -> SemanticsAligner | None:
    if args.smca and args.sam_resample != "points":
        raise ValueError(
            f"--smca needs salient points, which --sam_resample {args.sam_resample} takes away; leave one of them out"
        )
    if args.sam_points not in (None, 1, args.nheads):
        raise ValueError(f"--sam_points {args.sam_points} must be 1, or as many as --nheads, {args.nheads}")
    if args.sam_resample == "off":
        return None
    return SemanticsAligner(
        hidden_dim=args.hidden_dim,
        num_heads=args.nheads,
        resample=args.sam_resample,
        num_points=args.sam_points,
        reweight=args.sam_reweight,
        search_range=args.sam_range,
        predict_scales=args.smca,
    )


def build_sap_detr(args: Namespace) -> Detector:
    """SAP-DETR (CVPR 2023): queries are salient points of a grid with distances to the sides of their boxes."""
    _check_widths(args)
    backbone = _build_backbone(args, levels=(args.backbone_level,))
    projection = InputProjection(
        in_channels=backbone.num_channels,
        hidden_dim=args.hidden_dim,
        norm=input_proj_norm(args) == "group",
        temperature=SAP_DETR_TEMPERATURE,
        centred=False,
    )
    sizes = {
        "hidden_dim": args.hidden_dim,
        "num_heads": args.nheads,
        "feedforward_dim": args.dim_feedforward,
        "dropout": args.dropout,
        "activation": args.transformer_activation,
    }
    decoder = SAPDecoder(
        layer=SAPDecoderLayer(**sizes, gaussian=args.sdg),
        num_layers=args.dec_layers,
        num_queries=args.num_queries,
        num_classes=args.num_classes,
        content_from_points=args.newconvinit,
        share_box_heads=not args.bbox_embed_diff_each_layer,
        point_reference=args.point_reference,
        head_cell=args.head_cell,
    )
    encoder = DenseEncoder(num_layers=args.enc_layers, **sizes, scale_position=True)
    return Detector(backbone=backbone, projection=projection, encoder=encoder, decoder=decoder)


def sap_detr_settings(state: dict[str, Tensor]) -> dict[str, Any]:
    """What official files do not tell, or tell only with their flags."""
    told: dict[str, Any] = {
        "input_proj_norm": "group" if "projection.levels.0.1.weight" in state else "none",
        "sdg": "decoder.layers.0.gaussian.head.layers.0.bias" in state,
        "newconvinit": "decoder.initial_content.0.bias" in state,
        "transformer_activation": "prelu" if "decoder.layers.0.feed_forward.activation.weight" in state else "relu",
    }
    if "decoder.class_heads.0.layers.2.bias" in state:
        told["num_classes"] = len(state["decoder.class_heads.0.layers.2.bias"])
    heads = [state[name] for name in state if re.fullmatch(r"decoder\.distance_heads\.\d+\.layers\.2\.bias", name)]
    if any(not torch.equal(head, heads[0]) for head in heads):
        told["bbox_embed_diff_each_layer"] = True
    return told


def _build_backbone(args: Namespace, *, levels: tuple[int, ...]) -> Backbone:
    return Backbone(
        name=args.backbone,
        levels=levels,
        dilation=args.dilation,
        norm=args.backbone_norm,
        # What is pretrained keeps its first stage; a backbone whose norms learn is trained from scratch.
        freeze_stem=args.backbone_norm == "frozen",
        trainable=args.lr_backbone > 0,
    )


def _check_widths(args: Namespace) -> None:
    if args.hidden_dim % 4:
        raise ValueError(f"--hidden_dim {args.hidden_dim} is not a multiple of 4, which the position encoding needs")
    if args.hidden_dim % args.nheads:
        raise ValueError(
            f"--hidden_dim {args.hidden_dim} cannot be divided by --nheads {args.nheads}; change one of them"
        )


def _check_levels(args: Namespace) -> None:
    if args.multiscale and args.backbone_level != 5:
        raise ValueError(
            f"--multiscale uses C3, C4 and C5, --backbone_level {args.backbone_level} one of them; leave one flag out"
        )
    if args.multiscale and not args.enc_layers and args.dec_layers < 3:
        raise ValueError(
            f"--multiscale has three levels, of which --enc_layers 0 and --dec_layers {args.dec_layers} leave some "
            "unused; use an encoder, or at least 3 decoder layers"
        )


def build_criterion(args: Namespace) -> SetCriterion:
    matcher = HungarianMatcher(
        costs=[
            (args.set_cost_class, focal_class_cost(alpha=args.focal_alpha)),
            (args.set_cost_bbox, l1_cost),
            (args.set_cost_giou, giou_cost),
        ]
    )
    return SetCriterion(
        matcher=matcher,
        losses=[focal_loss(alpha=args.focal_alpha), box_losses, cardinality_error],
        final_losses=[class_error],
        weights={"loss_ce": args.cls_loss_coef, "loss_bbox": args.bbox_loss_coef, "loss_giou": args.giou_loss_coef},
        auxiliary=args.aux_loss,
    )


def build_sap_criterion(args: Namespace) -> SetCriterion:
    matcher = HungarianMatcher(
        costs=[
            (args.set_cost_class, object_class_cost(alpha=args.focal_alpha)),
            (args.set_cost_bbox, corner_l1_cost),
            (args.set_cost_giou, sap_giou_cost),
            (OUTSIDE, outside_cost),
        ]
    )
    return SetCriterion(
        matcher=matcher,
        losses=[
            focal_loss(alpha=args.focal_alpha),
            corner_box_losses,
            object_loss(alpha=args.focal_alpha, detach_target=args.objectness_target == "detached"),
            inner_loss,
        ],
        final_losses=[class_error],
        weights={
            "loss_ce": args.cls_loss_coef,
            "loss_bbox": args.bbox_loss_coef,
            "loss_giou": args.giou_loss_coef,
            "loss_ce_obj": args.obj_loss_coef,
            "loss_inner": args.inner_loss_coef,
        },
        auxiliary=args.aux_loss,
    )


def input_proj_norm(args: Namespace) -> str:
    """ "group" or "none". The reference has a GroupNorm in multi-scale models and where the schedule is shorter than 25
    epochs ("by accident", it says); "auto" keeps this rule."""
    if args.input_proj_norm != "auto":
        return args.input_proj_norm
    return "group" if args.multiscale or args.epochs < 25 else "none"


Postprocess = Callable[..., list[dict[str, Tensor]]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the programs know of a family of detectors.

    Args:
        build: settings -> network.
        criterion: settings -> losses.
        settings: names of the settings that shape its network, beside TRUNK_SETTINGS.
        from_weights: settings that are read off weights under our names, because files may not tell them.
        is_official: whether parameters have the official names of this family.
        convert_official: an official state dict under our names.
        defaults: its published settings, where they differ from the defaults of main.py (which are SAM-DETR's).
        top_k: detections kept of an image.
    """

    build: Callable[[Namespace], Detector]
    criterion: Callable[[Namespace], SetCriterion] = build_criterion
    settings: tuple[str, ...]
    from_weights: Callable[[dict[str, Tensor]], dict[str, Any]]
    is_official: Callable[[Iterable[str]], bool]
    convert_official: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    defaults: dict[str, Any] = field(default_factory=dict)
    top_k: Callable[[Namespace], int] = lambda args: 100


FAMILIES: dict[str, Family] = {
    "sam_detr": Family(
        build=build_sam_detr,
        settings=(
            "multiscale", "backbone_level", "input_proj_norm", "smca",
            "sam_resample", "sam_points", "sam_reweight", "sam_range",
        ),
        from_weights=told_by_weights,
        is_official=sam_detr_weights.is_official,
        convert_official=sam_detr_weights.convert_official,
    ),
    "deformable_detr": Family(
        build=build_deformable_detr,
        settings=(
            "num_feature_levels", "backbone_level", "input_proj_norm", "with_box_refine", "two_stage", "enc_n_points",
            "dec_n_points", "sam_resample", "sam_reweight", "sam_range",
        ),
        from_weights=told_by_weights,
        is_official=deformable_detr_weights.is_official,
        convert_official=deformable_detr_weights.convert_official,
        defaults={
            "lr": 2e-4, "lr_backbone": 2e-5, "lr_linear_proj_names": ["reference_points", "sampling_offsets"],
            "dim_feedforward": 1024, "input_proj_norm": "group", "sam_resample": "off",
        },
    ),
    "sap_detr": Family(
        build=build_sap_detr,
        criterion=build_sap_criterion,
        settings=(
            "backbone_level", "input_proj_norm", "num_select", "transformer_activation", "meshgrid_refpoints_xy",
            "newconvinit", "sdg", "bbox_embed_diff_each_layer", "point_reference", "head_cell", "objectness_target",
        ),
        from_weights=sap_detr_settings,
        is_official=sap_detr_weights.is_official,
        convert_official=sap_detr_weights.convert_official,
        defaults={
            "num_queries": 306, "dropout": 0.0, "input_proj_norm": "none", "meshgrid_refpoints_xy": True,
            "cls_loss_coef": 1.0, "warmup_iters": 1000,
        },
        top_k=lambda args: args.num_select,
    ),
}  # fmt: skip


def build_model(args: Namespace) -> tuple[Detector, SetCriterion, Postprocess]:
    """The network (no weights are fetched), its criterion, and the function that makes detections of its output.

    Raises:
        ValueError: settings that cannot be built; the message names the flag and its value.
    """
    family = FAMILIES[args.model]
    return family.build(args), family.criterion(args), partial(postprocess, top_k=family.top_k(args))


def load_backbone_weights(detector: Detector, source: str) -> None:
    """Pretrained weights: "imagenet" (torchvision's IMAGENET1K_V1, fetched if need be) or a file; "none" does nothing.

    Raises:
        ValueError: weights that cannot be fetched or do not fit; says how to get and pass a file.
    """
    if source == "none":
        return
    name = detector.backbone.name
    if source == "imagenet":
        weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
        try:
            with contextlib.redirect_stderr(sys.stdout):  # on which older versions of torch say what they fetch
                state = weights.get_state_dict(progress=False, check_hash=True)
        except (OSError, HTTPException, RuntimeError) as error:  # no network, no space, a proxy's refusal or own page
            raise ValueError(
                f"cannot fetch the ImageNet weights of {name} ({error}); download {weights.url} elsewhere and pass it "
                "with --backbone_weights FILE, or train from scratch with --backbone_weights none"
            ) from None
    else:
        state = read_file(source, flag="--backbone_weights")
    try:
        detector.backbone.load_classifier_weights(state)
    except ValueError as error:
        raise ValueError(f"--backbone_weights {source} does not fit --backbone {name}: {error}") from None


def read_checkpoint(source: str) -> dict[str, Any]:
    """A checkpoint of ours, or an official one under our names, from a file or an http(s) URL.

    Returns:
        A dict with at least `model` (weights), `settings` (those of the family that the file or its weights tell) and
        `official`.

    Raises:
        ValueError: no checkpoint, or one that is damaged or holds code.
    """
    checkpoint = read_file(source, flag="--resume")
    state = checkpoint.get("model")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"--resume {source} holds no weights under 'model' (it has {sorted(map(str, checkpoint))[:8]}); "
            "pass a checkpoint of this project or an official one"
        )
    told = vars(checkpoint["args"]) if isinstance(checkpoint.get("args"), Namespace) else checkpoint.get("settings", {})
    official = next((name for name, family in FAMILIES.items() if family.is_official(state)), None)
    model = official or told.get("model", "sam_detr")  # our first files do not name the only family that there was
    if model not in FAMILIES:
        raise ValueError(f"--resume {source} holds a {model}; this version knows {', '.join(FAMILIES)}")
    family = FAMILIES[model]
    state = family.convert_official(state) if official else state
    settings = {name: told[name] for name in (*TRUNK_SETTINGS, *family.settings) if name in told}
    settings |= family.from_weights(state) | {"model": model}
    return {**checkpoint, "model": state, "settings": settings, "official": official is not None}
