"""torch.hub entry points: one function for each published model, and `detector` for any checkpoint.

    network = torch.hub.load("PATH/TO/THIS/REPOSITORY", "sam_detr_r50_smca", source="local", checkpoint="FILE")
    predictor = torch.hub.load("PATH/TO/THIS/REPOSITORY", "detector", source="local", checkpoint="FILE")

Functions of published models return a `samdetr.models.detector.Detector` in evaluation mode. Their arguments are

- `checkpoint`: a file or URL, ours or an official one; of a file with averaged weights (--ema) these are taken. Without
  one the weights are random.
- `num_classes`: outputs of the class head, the largest category id + 1; a checkpoint brings its own.
"""

from __future__ import annotations

from typing import Any

dependencies = ["torch", "torchvision", "scipy"]


def _published(
    model: str, checkpoint: str | None, num_classes: int, *, trunk: dict[str, Any] | None = None, **config: Any
):
    # Imported here, so that torch.hub can report missing dependencies first.
    from samdetr.models.build import FAMILIES, build_model
    from samdetr.models.checkpoints import chosen_weights, read_checkpoint
    from samdetr.util.checkpoint import load_weights

    family = FAMILIES[model]
    shape = {**(trunk or {}), "num_classes": num_classes}
    weights = read_checkpoint(checkpoint, name="checkpoint") if checkpoint else None
    if weights:
        saved = weights["settings"]
        if saved["model"] != model:
            raise ValueError(f"`checkpoint` {checkpoint} holds a {saved['model']}, not a {model}")
        # The rest is given by the published model: weights that do not fit it are refused below.
        shape |= {name: saved[name] for name in ("input_proj_norm", "num_classes") if name in saved}
    detector, _, _ = build_model(family.trunk(**shape), family.config(**config))
    if weights:
        load_weights(detector, chosen_weights(weights), source=str(checkpoint))
    return detector.eval()


def detector(*, checkpoint: str, device: str = "auto"):
    """A `samdetr.inference.predictor.Predictor` from any checkpoint of ours or an official one of a known family:
    `.predict(image)` detects, `.model` is the network. `device` "auto" is a GPU if there is one."""
    from samdetr.inference.predictor import load

    return load(checkpoint, device=device)


def sam_detr_r50(*, checkpoint: str | None = None, num_classes: int = 91):
    """SAM-DETR, ResNet-50, published AP 39.8 after 50 epochs."""
    return _published("sam_detr", checkpoint, num_classes)


def sam_detr_r50_smca(*, checkpoint: str | None = None, num_classes: int = 91):
    """SAM-DETR with SMCA, ResNet-50."""
    return _published("sam_detr", checkpoint, num_classes, smca=True)


def sam_detr_r50_dc5(*, checkpoint: str | None = None, num_classes: int = 91):
    """SAM-DETR, ResNet-50 with C5 at stride 16."""
    return _published("sam_detr", checkpoint, num_classes, trunk=_DC5)


def sam_detr_r50_dc5_smca(*, checkpoint: str | None = None, num_classes: int = 91):
    """SAM-DETR with SMCA, ResNet-50 with C5 at stride 16."""
    return _published("sam_detr", checkpoint, num_classes, trunk=_DC5, smca=True)


def sam_detr_r50_ms(*, checkpoint: str | None = None, num_classes: int = 91):
    """Multi-scale SAM-DETR, ResNet-50, published AP 46.1 after 50 epochs."""
    return _published("sam_detr", checkpoint, num_classes, multiscale=True)


def sam_detr_r50_ms_smca(*, checkpoint: str | None = None, num_classes: int = 91):
    """Multi-scale SAM-DETR with SMCA, ResNet-50, published AP 47.1 after 50 epochs."""
    return _published("sam_detr", checkpoint, num_classes, multiscale=True, smca=True)


def deformable_detr_r50_single_scale(*, checkpoint: str | None = None, num_classes: int = 91):
    """Deformable DETR, ResNet-50, one level, published AP 39.4 after 50 epochs."""
    return _published("deformable_detr", checkpoint, num_classes, num_feature_levels=1)


def deformable_detr_r50_single_scale_dc5(*, checkpoint: str | None = None, num_classes: int = 91):
    """Deformable DETR, ResNet-50 with C5 at stride 16, one level, published AP 41.5 after 50 epochs."""
    return _published("deformable_detr", checkpoint, num_classes, trunk=_DC5, num_feature_levels=1)


def deformable_detr_r50(*, checkpoint: str | None = None, num_classes: int = 91):
    """Deformable DETR, ResNet-50, four levels, published AP 44.5 after 50 epochs."""
    return _published("deformable_detr", checkpoint, num_classes)


def deformable_detr_r50_refine(*, checkpoint: str | None = None, num_classes: int = 91):
    """Deformable DETR with iterative box refinement, ResNet-50, published AP 46.2 after 50 epochs."""
    return _published("deformable_detr", checkpoint, num_classes, with_box_refine=True)


def deformable_detr_r50_refine_two_stage(*, checkpoint: str | None = None, num_classes: int = 91):
    """Two-stage Deformable DETR with box refinement, ResNet-50, published AP 46.9 after 50 epochs."""
    return _published("deformable_detr", checkpoint, num_classes, with_box_refine=True, two_stage=True)


def sap_detr_r50(*, checkpoint: str | None = None, num_classes: int = 91):
    """SAP-DETR, ResNet-50, published AP 43.1 after 50 epochs."""
    return _published("sap_detr", checkpoint, num_classes, **_SAP)


def sap_detr_r50_dc5(*, checkpoint: str | None = None, num_classes: int = 91):
    """SAP-DETR, ResNet-50 with C5 at stride 16, published AP 46.0 after 50 epochs."""
    return _published("sap_detr", checkpoint, num_classes, trunk=_DC5, **_SAP)


def sap_detr_r101(*, checkpoint: str | None = None, num_classes: int = 91):
    """SAP-DETR, ResNet-101, published AP 44.4 after 50 epochs."""
    return _published("sap_detr", checkpoint, num_classes, trunk=_R101, **_SAP)


def sap_detr_r101_dc5(*, checkpoint: str | None = None, num_classes: int = 91):
    """SAP-DETR, ResNet-101 with C5 at stride 16, published AP 46.9 after 50 epochs."""
    return _published("sap_detr", checkpoint, num_classes, trunk=_DC5 | _R101, **_SAP)


_DC5: dict[str, Any] = {"dilation": True}
_R101: dict[str, Any] = {"backbone": "resnet101"}
_SAP: dict[str, Any] = {
    "meshgrid_refpoints_xy": True,
    "newconvinit": True,
    "sdg": True,
    "bbox_embed_diff_each_layer": True,
}
