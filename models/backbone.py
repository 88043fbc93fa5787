"""torchvision's ResNets as feature extractors. Knows no transformer."""

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


class Backbone(nn.Module):
    """A ResNet without its classifier.

    Args:
        name: one of RESNETS.
        levels: which stages to return, by their usual names: 3, 4, 5 for C3, C4, C5 (strides 8, 16, 32). Later
            stages than the last one named are not built.
        dilation: C5 at stride 16 instead of 32 (DC5); bottleneck ResNets only.
        norm: "frozen" - BatchNorm with constant statistics and scales, as published for pretrained weights - or
            "learned", for training from scratch.
        freeze_stem: whether the stem and the first stage keep their weights, as is usual for pretrained ones.

    Raises:
        ValueError: unknown name, or dilation of a ResNet without bottlenecks.
    """

    def __init__(
        self,
        *,
        name: str,
        levels: Sequence[int] = (5,),
        dilation: bool = False,
        norm: str = "frozen",
        freeze_stem: bool = True,
    ):
        super().__init__()
        if name not in RESNETS:
            raise ValueError(f"unknown `backbone` {name!r}; choose one of {', '.join(RESNETS)}, or timm/NAME")
        basic = name in ("resnet18", "resnet34")
        if dilation and basic:
            raise ValueError(f"`dilation` needs bottleneck blocks, which {name} has not; use resnet50 or deeper")
        if dilation and 5 not in levels:
            raise ValueError(
                f"`dilation` changes C5, but `backbone_level` {levels[-1]} leaves it out; drop one of them"
            )
        assert list(levels) == sorted(set(levels)), f"levels go from fine to coarse, not {levels}"
        norm_layer = {"frozen": FrozenBatchNorm2d, "learned": nn.BatchNorm2d}[norm]
        kwargs = {} if basic else {"replace_stride_with_dilation": [False, False, dilation]}
        resnet = getattr(torchvision.models, name)(weights=None, norm_layer=norm_layer, **kwargs)
        self.name = name
        if norm == "frozen":
            fold_frozen_norms(resnet)
        self.stages = [f"layer{level - 1}" for level in levels]
        modules = dict(resnet.named_children())
        names = list(modules)[: list(modules).index(self.stages[-1]) + 1]
        self.body = nn.ModuleDict({name: modules[name] for name in names})
        channels, strides = {3: 128, 4: 256, 5: 512}, {3: 8, 4: 16, 5: 16 if dilation else 32}
        self.num_channels = [channels[level] * (1 if basic else 4) for level in levels]
        self.strides = [strides[level] for level in levels]
        for parameter_name, parameter in self.body.named_parameters():
            if freeze_stem and parameter_name.startswith(("conv1", "bn1", "layer1")):
                parameter.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """`images` (B, 3, H, W), normalised -> one map (B, C_l, H_l, W_l) for each level."""
        maps, x = [], images
        for name, module in self.body.items():
            x = module(x)
            if name in self.stages:
                maps.append(x)
        return maps

    def load_classifier_weights(self, state: dict[str, Tensor]) -> None:
        """Copy the weights of a torchvision ResNet classifier, except its last layer and unused stages.

        Raises:
            ValueError: a weight is missing or has another shape.
        """
        self.body.load_state_dict(fitting_weights(state, self.body.state_dict()), strict=False)

    @property
    def weights_url(self) -> str:
        """Where torchvision's weights are."""
        return self._weights().url

    def imagenet_weights(self) -> dict[str, Tensor]:
        """Torchvision's IMAGENET1K_V1, downloaded if needed. Raises OSError, HTTPException or RuntimeError."""
        with contextlib.redirect_stderr(sys.stdout):  # older versions of torch print the address there
            return self._weights().get_state_dict(progress=False, check_hash=True)

    def _weights(self) -> Any:
        return torchvision.models.get_model_weights(self.name)["IMAGENET1K_V1"]


def fitting_weights(state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries of `state` for the network with the state dict `own`.

    Raises:
        ValueError: one is missing, except the counts of batches, or has another shape.
    """
    missing = sorted(k for k in own if k not in state and not k.endswith("num_batches_tracked"))
    wrong = sorted(k for k in own if k in state and state[k].shape != own[k].shape)
    if missing or wrong:
        raise ValueError(
            f"these are not the weights of this network: {len(missing)} missing (first: {missing[:3]}), "
            f"{len(wrong)} of another shape (first: {wrong[:3]})"
        )
    return {name: state[name] for name in own if name in state}


class FoldedNorm(FrozenBatchNorm2d):
    """A frozen norm whose factor and shift the convolution before it applies."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class FoldedConvolution(nn.Conv2d):
    """A convolution with the frozen norm after it, in one pass over the map instead of three. Its parameters are the
    published ones: the factor is applied in every forward pass."""

    norm: FrozenBatchNorm2d

    def forward(self, x: Tensor) -> Tensor:
        weight, shift = self.folded()
        return F.conv2d(x, weight, shift, self.stride, self.padding, self.dilation, self.groups)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the convolution that does both."""
        norm = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        return self.weight * scale[:, None, None, None], shift


def apply_frozen_norms(network: nn.Module) -> None:
    """Write the norms into the weights, in place, for a network that is not trained any more."""
    for part in network.modules():
        if isinstance(part, FoldedConvolution):
            weight, shift = part.folded()
            part.__class__ = nn.Conv2d  # type: ignore[assignment]
            part.weight, part.bias = nn.Parameter(weight.detach()), nn.Parameter(shift.detach())


def fold_frozen_norms(resnet: nn.Module) -> None:
    """Convert a torchvision ResNet, in place. Names and values of parameters and buffers stay."""
    convolution = resnet.conv1
    for part in resnet.modules():  # each norm comes right after its convolution
        if isinstance(part, nn.Conv2d):
            convolution = part
        elif isinstance(part, FrozenBatchNorm2d):
            part.__class__, convolution.__class__ = FoldedNorm, FoldedConvolution
            object.__setattr__(convolution, "norm", part)  # not registered: it is a part of the ResNet already
