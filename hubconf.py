"""torch.hub entry points: one function for each published model.

    detector = torch.hub.load("PATH/TO/THIS/REPOSITORY", "sam_detr_r50_smca", source="local", checkpoint="FILE")

Each returns a models.detector.Detector in evaluation mode; `checkpoint` is a file or URL, ours or an official one;
averaged weights (--ema) are taken where it has some. Without one the weights are random. `num_classes` counts the class
head's outputs (largest category id + 1).
"""

from __future__ import annotations

dependencies = ["torch", "torchvision", "scipy"]


def _build(flags: str, *, checkpoint: str | None, num_classes: int):
    # torch.hub imports this file before the repository is on the path.
    from samdetr.main import build_parser, chosen_weights, take_network_settings
    from samdetr.models.build import build_model, read_checkpoint
    from samdetr.util.checkpoint import load_weights

    parser = build_parser()
    args = parser.parse_args(flags.split())
    args.num_classes = num_classes
    weights = read_checkpoint(checkpoint) if checkpoint else None
    if weights:  # a file of another model is refused on loading: only what flags cannot tell is taken from it
        told = {name: weights["settings"][name] for name in ("model", "input_proj_norm", "num_classes")}
        take_network_settings(args, {"model"}, {**weights, "settings": told})
    detector, _, _ = build_model(args)
    if weights:
        load_weights(detector, chosen_weights(weights, raw=False), source=str(checkpoint))
    return detector.eval()


def sam_detr_r50(*, checkpoint: str | None = None, num_classes: int = 91):
    """SAM-DETR, ResNet-50, published AP 39.8 after 50 epochs."""
    return _build("", checkpoint=checkpoint, num_classes=num_classes)


def sam_detr_r50_smca(*, checkpoint: str | None = None, num_classes: int = 91):
    """SAM-DETR with SMCA, ResNet-50."""
    return _build("--smca", checkpoint=checkpoint, num_classes=num_classes)


def sam_detr_r50_dc5(*, checkpoint: str | None = None, num_classes: int = 91):
    """SAM-DETR, ResNet-50 with C5 at stride 16."""
    return _build("--dilation", checkpoint=checkpoint, num_classes=num_classes)


def sam_detr_r50_dc5_smca(*, checkpoint: str | None = None, num_classes: int = 91):
    """SAM-DETR with SMCA, ResNet-50 with C5 at stride 16."""
    return _build("--dilation --smca", checkpoint=checkpoint, num_classes=num_classes)


def sam_detr_r50_ms(*, checkpoint: str | None = None, num_classes: int = 91):
    """Multi-scale SAM-DETR, ResNet-50, published AP 46.1 after 50 epochs."""
    return _build("--multiscale", checkpoint=checkpoint, num_classes=num_classes)


def sam_detr_r50_ms_smca(*, checkpoint: str | None = None, num_classes: int = 91):
    """Multi-scale SAM-DETR with SMCA, ResNet-50, published AP 47.1 after 50 epochs."""
    return _build("--multiscale --smca", checkpoint=checkpoint, num_classes=num_classes)


def deformable_detr_r50_single_scale(*, checkpoint: str | None = None, num_classes: int = 91):
    """Deformable DETR, ResNet-50, one level, published AP 39.4 after 50 epochs."""
    return _build("--model deformable_detr --num_feature_levels 1", checkpoint=checkpoint, num_classes=num_classes)


def deformable_detr_r50_single_scale_dc5(*, checkpoint: str | None = None, num_classes: int = 91):
    """Deformable DETR, ResNet-50 with C5 at stride 16, one level, published AP 41.5 after 50 epochs."""
    flags = "--model deformable_detr --num_feature_levels 1 --dilation"
    return _build(flags, checkpoint=checkpoint, num_classes=num_classes)


def deformable_detr_r50(*, checkpoint: str | None = None, num_classes: int = 91):
    """Deformable DETR, ResNet-50, four levels, published AP 44.5 after 50 epochs."""
    return _build("--model deformable_detr", checkpoint=checkpoint, num_classes=num_classes)


def deformable_detr_r50_refine(*, checkpoint: str | None = None, num_classes: int = 91):
    """Deformable DETR with iterative box refinement, ResNet-50, published AP 46.2 after 50 epochs."""
    return _build("--model deformable_detr --with_box_refine", checkpoint=checkpoint, num_classes=num_classes)


def deformable_detr_r50_refine_two_stage(*, checkpoint: str | None = None, num_classes: int = 91):
    """Two-stage Deformable DETR with box refinement, ResNet-50, published AP 46.9 after 50 epochs."""
    return _build(
        "--model deformable_detr --with_box_refine --two_stage", checkpoint=checkpoint, num_classes=num_classes
    )


_SAP_DETR = "-m sap_detr --meshgrid_refpoints_xy --newconvinit --sdg --bbox_embed_diff_each_layer"


def sap_detr_r50(*, checkpoint: str | None = None, num_classes: int = 91):
    """SAP-DETR, ResNet-50, published AP 43.1 after 50 epochs."""
    return _build(_SAP_DETR, checkpoint=checkpoint, num_classes=num_classes)


def sap_detr_r50_dc5(*, checkpoint: str | None = None, num_classes: int = 91):
    """SAP-DETR, ResNet-50 with C5 at stride 16, published AP 46.0 after 50 epochs."""
    return _build(f"{_SAP_DETR} --dilation", checkpoint=checkpoint, num_classes=num_classes)


def sap_detr_r101(*, checkpoint: str | None = None, num_classes: int = 91):
    """SAP-DETR, ResNet-101, published AP 44.4 after 50 epochs."""
    return _build(f"{_SAP_DETR} --backbone resnet101", checkpoint=checkpoint, num_classes=num_classes)


def sap_detr_r101_dc5(*, checkpoint: str | None = None, num_classes: int = 91):
    """SAP-DETR, ResNet-101 with C5 at stride 16, published AP 46.9 after 50 epochs."""
    return _build(f"{_SAP_DETR} --backbone resnet101 --dilation", checkpoint=checkpoint, num_classes=num_classes)
