"""Any network of timm that gives feature maps (`features_only`) as a backbone. timm is an optional dependency."""

import difflib
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from samdetr.models.backbone import fitting_weights
from samdetr.util.padded_images import IMAGENET_MEAN, IMAGENET_STD

PREFIX = "timm/"


class TimmBackbone(nn.Module):
    """A network of timm without its classifier, with the interface of `Backbone`.

    Images come normalised as for torchvision's networks, and are normalised anew here if the network's own weights were
    trained with another mean and standard deviation.

    Args:
        name: "timm/" and timm's name of the network.
        levels: maps to return: 3, 4, 5 for strides 8, 16, 32.
        dilation: stride 16 for level 5, for networks that have `output_stride`.
        norm: "frozen": BatchNorms keep their statistics and scales. Other norms learn.
        freeze_stem: whether what comes before the map of stride 4, this map's stage included, keeps its weights.

    Raises:
        ValueError: timm is missing, the name is unknown, or the network has no such maps or takes images of one size.
    """

    factor: Tensor
    shift: Tensor

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
        self.name = name
        timm = _import_timm(name)
        strides = {level: 2**level for level in levels} | ({5: 16} if dilation else {})
        self.strides = [strides[level] for level in levels]
        options = {"output_stride": 16} if dilation else {}
        known = _create(timm, name, options).feature_info.info
        reductions = [info["reduction"] for info in known]
        missing = [stride for stride in self.strides if stride not in reductions]
        if missing:
            raise ValueError(
                f"`backbone` {name} has maps of strides {sorted(set(reductions))}, and stride {missing[0]} is needed; "
                "choose another `backbone_level` or network"
            )
        # The last map of this stride, except C4 beside a dilated C5.
        last = {stride: index for index, stride in enumerate(reductions)}
        indices = [
            reductions.index(stride) if dilation and level < 5 else last[stride]
            for level, stride in zip(levels, self.strides)
        ]
        self.body = _create(timm, name, {"out_indices": tuple(indices), **options})
        self.num_channels = [known[index]["num_chs"] for index in indices]
        if norm == "frozen":
            self.body = timm.layers.freeze_batch_norm_2d(self.body)
        if freeze_stem:
            stages = [info["module"] for info in known if info["reduction"] <= 4]
            _freeze_to(self.body, stages[-1] if stages else None)
        trained = timm.get_pretrained_cfg(name.removeprefix(PREFIX), allow_unregistered=True)
        mean, std = (trained.mean, trained.std) if trained else (IMAGENET_MEAN, IMAGENET_STD)
        columns = [torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD, mean, std)]
        self.normalizes = (tuple(mean), tuple(std)) != (IMAGENET_MEAN, IMAGENET_STD)
        self.register_buffer("factor", columns[1] / columns[3], persistent=False)
        self.register_buffer("shift", (columns[0] - columns[2]) / columns[3], persistent=False)
        self._check_sizes()

    @torch.no_grad()
    def _check_sizes(self) -> None:
        """Run it once on a small image that is no square. Raises ValueError."""
        self.eval()
        try:
            shapes = [tuple(each.shape) for each in self(torch.zeros(1, 3, 96, 160))]
        except Exception as error:  # networks of one input size raise AssertionError, RuntimeError and others
            raise ValueError(
                f"`backbone` {self.name} does not take images of any size ({error}); choose a convolutional network"
            ) from None
        finally:
            self.train()
        wanted = [(1, c, 96 // s, 160 // s) for c, s in zip(self.num_channels, self.strides)]
        if shapes != wanted:
            raise ValueError(f"`backbone` {self.name} gives maps {shapes}, not {wanted}; choose another network")

    def forward(self, images: Tensor) -> list[Tensor]:
        """`images` (B, 3, H, W), normalised -> one map (B, C_l, H_l, W_l) for each level."""
        maps = self.body(images * self.factor + self.shift if self.normalizes else images)
        if getattr(self.body, "output_fmt", None) == "NHWC":
            return [each.permute(0, 3, 1, 2).contiguous() for each in maps]
        return maps

    def imagenet_weights(self) -> dict[str, Tensor]:
        """Those that timm has for this network, downloaded if needed. Raises OSError."""
        try:
            return _import_timm(self.name).create_model(self.name.removeprefix(PREFIX), pretrained=True).state_dict()
        except Exception as error:  # of huggingface_hub, of its HTTP library, of timm
            raise OSError(str(error).splitlines()[0] if str(error) else type(error).__name__) from None

    @property
    def weights_url(self) -> str:
        """Where a file of them can be found."""
        trained = _import_timm(self.name).get_pretrained_cfg(self.name.removeprefix(PREFIX), allow_unregistered=True)
        if trained and trained.url:
            return trained.url
        return f"https://huggingface.co/{trained.hf_hub_id}" if trained and trained.hf_hub_id else "its weights"

    def load_classifier_weights(self, state: dict[str, Tensor]) -> None:
        """Copy the weights of a classifier of timm, or of EfficientNet-Lite in the names of its PyTorch port.

        Raises:
            ValueError: a weight is missing or has another shape.
        """
        own = self.body.state_dict()
        if "_conv_stem.weight" in state:
            state = rename_efficientnet_lite(state)
        # timm numbers the parts of a feature extractor with underscores, or puts "model." before the names.
        found = {_plain(name): weight for name, weight in state.items()}
        fitting = {name: found[_plain(name)] for name in own if _plain(name) in found}
        self.body.load_state_dict(fitting_weights(fitting, own), strict=False)


def _create(timm: Any, name: str, options: dict[str, Any]) -> Any:
    """A feature extractor of timm. Raises ValueError."""
    short = name.removeprefix(PREFIX)
    try:
        try:  # networks of windows, as Swin, otherwise take images of one size only
            return timm.create_model(short, features_only=True, strict_img_size=False, **options)
        except TypeError:
            return timm.create_model(short, features_only=True, **options)
    except Exception as error:  # timm raises RuntimeError, TypeError, AssertionError and others here
        near = [one for one in difflib.get_close_matches(short, timm.list_models(), n=4) if one != short]
        hint = f"; similar: {', '.join(PREFIX + one for one in near)}" if near else ""
        what = "`dilation` with `backbone`" if "output_stride" in options else "`backbone`"
        raise ValueError(f"{what} {name}: timm cannot build it as a feature extractor ({error}){hint}") from None


def _plain(name: str) -> str:
    return name.removeprefix("model.").replace(".", "_")


def _import_timm(name: str) -> Any:
    try:
        import timm
    except ImportError:
        raise ValueError(f"`backbone` {name} needs timm: pip install timm") from None
    return timm


def _freeze_to(network: nn.Module, stage: str | None) -> None:
    """Freeze the parameters up to the end of a stage, in the order in which they were registered."""
    names = [name for name, _ in network.named_parameters()]
    prefix = f"{_plain(stage)}_" if stage else None
    ends = [index for index, name in enumerate(names) if prefix and f"{_plain(name)}_".startswith(prefix)]
    for _, parameter in list(network.named_parameters())[: ends[-1] + 1 if ends else 0]:
        parameter.requires_grad_(False)


def rename_efficientnet_lite(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of EfficientNet-Lite under timm's names. `state` has those of its PyTorch port, which numbers the
    blocks of all stages together."""
    widths = [len(weight) for name, weight in state.items() if name.endswith("_project_conv.weight")]
    stages = enumerate(list(blocks) for _, blocks in groupby(widths))  # each stage has another width
    numbers = [f"{stage}.{index}" for stage, blocks in stages for index in range(len(blocks))]
    outside = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    plain = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    expanding = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    expanding |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    renamed = {}
    for name, weight in state.items():
        part, _, rest = name.partition(".")
        if part == "_blocks":
            number, part, rest = rest.split(".", 2)
            table = expanding if f"_blocks.{number}._expand_conv.weight" in state else plain
            renamed[f"blocks.{numbers[int(number)]}.{table[part]}.{rest}"] = weight
        else:
            renamed[f"{outside[part]}.{rest}"] = weight
    return renamed
