"""torch.hub entry points: one function for each published model, and `detector` for any checkpoint.

    network = torch.hub.load("PATH/TO/THIS/REPOSITORY", "sam_detr_r50_smca", source="local", checkpoint="FILE")
    predictor = torch.hub.load("PATH/TO/THIS/REPOSITORY", "detector", source="local", checkpoint="FILE")

Functions of published models return a `samdetr.models.detector.Detector` in evaluation mode. Their arguments are

- `checkpoint`: a file or URL, ours or an official one; of a file with averaged weights (--ema) these are taken. Without
  one the weights are random.
- `num_classes`: outputs of the class head, the largest category id + 1; a checkpoint brings its own.
"""

from __future__ import annotations

dependencies = ["torch", "torchvision", "scipy"]


def detector(*, checkpoint: str, device: str = "auto"):
    """A `samdetr.inference.predictor.Predictor` from any checkpoint of ours or an official one of a known family:
    `.predict(image)` detects, `.model` is the network. `device` "auto" is a GPU if there is one."""
    from samdetr.inference.predictor import load

    return load(checkpoint, device=device)


def _published(model: str, description: str, *, ap: float | None = None, trunk: dict | None = None, **config):
    """The function that builds one published model. Its docstring is `description`, with the `ap` if published."""

    def build(*, checkpoint: str | None = None, num_classes: int = 91):
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
            # The published model gives the rest; weights that do not fit it are refused below.
            shape |= {name: saved[name] for name in ("input_proj_norm", "num_classes") if name in saved}
        network, _, _ = build_model(family.trunk(**shape), family.config(**config))
        if weights:
            load_weights(network, chosen_weights(weights), source=str(checkpoint))
        return network.eval()

    build.__doc__ = f"{description}, published AP {ap} after 50 epochs." if ap else f"{description}."
    return build


_DC5, _R101 = {"dilation": True}, {"backbone": "resnet101"}
_ONE_LEVEL_DC5: dict = {"trunk": _DC5, "num_feature_levels": 1}
_TWO_STAGE: dict = {"with_box_refine": True, "two_stage": True}
_SAP: dict = {"meshgrid_refpoints_xy": True, "newconvinit": True, "sdg": True, "bbox_embed_diff_each_layer": True}

sam_detr_r50 = _published("sam_detr", "SAM-DETR, ResNet-50", ap=39.8)
sam_detr_r50_smca = _published("sam_detr", "SAM-DETR with SMCA, ResNet-50", smca=True)
sam_detr_r50_dc5 = _published("sam_detr", "SAM-DETR, ResNet-50 with C5 at stride 16", trunk=_DC5)
sam_detr_r50_dc5_smca = _published(
    "sam_detr", "SAM-DETR with SMCA, ResNet-50 with C5 at stride 16", trunk=_DC5, smca=True
)
sam_detr_r50_ms = _published("sam_detr", "Multi-scale SAM-DETR, ResNet-50", ap=46.1, multiscale=True)
sam_detr_r50_ms_smca = _published(
    "sam_detr", "Multi-scale SAM-DETR with SMCA, ResNet-50", ap=47.1, multiscale=True, smca=True
)
deformable_detr_r50_single_scale = _published(
    "deformable_detr", "Deformable DETR, ResNet-50, one level", ap=39.4, num_feature_levels=1
)
deformable_detr_r50_single_scale_dc5 = _published(
    "deformable_detr", "Deformable DETR, ResNet-50 with C5 at stride 16, one level", ap=41.5, **_ONE_LEVEL_DC5
)
deformable_detr_r50 = _published("deformable_detr", "Deformable DETR, ResNet-50, four levels", ap=44.5)
deformable_detr_r50_refine = _published(
    "deformable_detr", "Deformable DETR with iterative box refinement, ResNet-50", ap=46.2, with_box_refine=True
)
deformable_detr_r50_refine_two_stage = _published(
    "deformable_detr", "Two-stage Deformable DETR with box refinement, ResNet-50", ap=46.9, **_TWO_STAGE
)
sap_detr_r50 = _published("sap_detr", "SAP-DETR, ResNet-50", ap=43.1, **_SAP)
sap_detr_r50_dc5 = _published("sap_detr", "SAP-DETR, ResNet-50 with C5 at stride 16", ap=46.0, trunk=_DC5, **_SAP)
sap_detr_r101 = _published("sap_detr", "SAP-DETR, ResNet-101", ap=44.4, trunk=_R101, **_SAP)
sap_detr_r101_dc5 = _published(
    "sap_detr", "SAP-DETR, ResNet-101 with C5 at stride 16", ap=46.9, trunk=_DC5 | _R101, **_SAP
)
