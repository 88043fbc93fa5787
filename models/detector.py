"""The detector that all families share. The page to read first."""

from typing import Any

from torch import nn

from samdetr.models.backbone import Backbone
from samdetr.models.denoising import Noised
from samdetr.models.feature_levels import InputProjection
from samdetr.models.timm_backbone import TimmBackbone
from samdetr.util.padded_images import PaddedImages


class Detector(nn.Module):
    """Backbone -> projection to the model's width -> encoder -> decoder -> predictions.

    Args:
        backbone: images (B, 3, H, W) -> one feature map per level.
        projection: feature maps and padding -> list[FeatureLevel].
        encoder: list[FeatureLevel] -> list[FeatureLevel].
        decoder: list[FeatureLevel] -> list of prediction dicts, one per decoder layer, the last one final. With
            denoising it takes `Noised`, too.
    """

    def __init__(
        self,
        *,
        backbone: Backbone | TimmBackbone,
        projection: InputProjection,
        encoder: nn.Module,
        decoder: nn.Module,
    ):
        super().__init__()
        self.backbone = backbone
        self.projection = projection
        self.encoder = encoder
        self.decoder = decoder
        self.auxiliary = True  # whether the predictions of earlier decoder layers are handed out, for their losses

    def train(self, mode: bool = True) -> "Detector":
        """As of nn.Module, but BatchNorms whose scales are frozen keep their statistics, too."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
                module.eval()
        return self

    def forward(self, batch: PaddedImages, noised: Noised | None = None) -> dict[str, Any]:
        """
        Args:
            noised: copies of the batch's objects, in training with denoising alone.
        Returns:
            The dict, which alone matcher, criterion and post-processing depend on:
            `pred_logits` (B, Q, classes), before the sigmoid; `pred_boxes` (B, Q, 4), as centre x, centre y, width,
            height relative to the image without its padding, in [0, 1]; `aux_outputs`, a list of the same for the
            earlier decoder layers, empty without `auxiliary`. Decoders may predict more, as `pred_*`. If queries were
            chosen from proposals, `enc_outputs` has the same predictions for all of these. Those of denoising queries
            are under `denoising`, in each layer's dict.
        """
        maps = self.backbone(batch.images)
        levels = self.projection(maps, batch.padding)
        levels = self.encoder(levels)
        *auxiliary, final = self.decoder(levels) if noised is None else self.decoder(levels, noised)
        return {**final, "aux_outputs": auxiliary if self.auxiliary else []}
