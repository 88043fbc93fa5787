"""Backbones of timm: strides and widths, norms, what is frozen, weights by name."""

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, call_main, evaluate, run_main
from torch import Tensor

pytest.importorskip("timm")
import timm

from samdetr.models.checkpoints import load_backbone_weights
from samdetr.models.timm_backbone import TimmBackbone, rename_efficientnet_lite
from samdetr.util.padded_images import IMAGENET_MEAN, IMAGENET_STD

NETWORK = [*TINY, "--backbone", "timm/test_efficientnet"]


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "mobilenetv3_small_050", "hgnetv2_b0"])
def test_maps_are_those_of_timm(name):
    backbone = TimmBackbone(name=f"timm/{name}", levels=(3, 4, 5)).eval()
    assert backbone.strides == [8, 16, 32]
    plain = timm.create_model(name, num_classes=7).eval()
    backbone.load_classifier_weights(plain.state_dict())
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    its_mean, its_std = (torch.tensor(plain.default_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    pixels = torch.rand(2, 3, 64, 96)
    found = backbone((pixels - mean) / std)
    expected = plain.forward_intermediates((pixels - its_mean) / its_std, intermediates_only=True)
    for one, other, width in zip(found, expected[-3:], backbone.num_channels, strict=True):
        assert one.shape == other.shape
        assert one.shape[1] == width
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_norms_and_the_first_stages_are_frozen_or_learn():
    frozen = TimmBackbone(name="timm/resnet18", levels=(4,))
    trainable = {name.split(".")[1] for name, weight in frozen.named_parameters() if weight.requires_grad}
    assert trainable == {"layer2", "layer3"}
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in frozen.modules())
    learned = TimmBackbone(name="timm/resnet18", levels=(4,), norm="learned", freeze_stem=False)
    assert all(weight.requires_grad for weight in learned.parameters())
    dilated = TimmBackbone(name="timm/resnet18", levels=(4, 5), dilation=True)
    assert dilated.strides == [16, 16]
    assert dilated.num_channels == [256, 512]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--backbone", "timm/resnet1"], "similar: timm/resnet18"),
        (["--backbone", "timm/vit_tiny_patch16_224", "--backbone_level", "3"], "has maps of strides [16]"),
        (["--backbone", "timm/repvit_m0_9", "--dilation", "--backbone_level", "5"], "--dilation with --backbone"),
        (["--backbone", "timm/resnet18", "--backbone_weights", "FILE"], "does not fit --backbone timm/resnet18"),
    ],
)
def test_bad_input(flags, words, shapes, tmp_path, capsys):
    torch.save(timm.create_model("test_efficientnet").state_dict(), tmp_path / "w.pth")
    flags = [str(tmp_path / "w.pth") if word == "FILE" else word for word in flags]
    assert call_main(shapes, *flags) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_detector_trains_evaluates_and_loads(shapes, tmp_path):
    run_main(shapes, "--epochs", "1", "--output_dir", str(tmp_path / "run"), network=NETWORK)
    figures, _ = evaluate(shapes, tmp_path / "run" / "checkpoint.pth", tmp_path / "eval")
    assert len(figures) == 12


# EfficientNet-Lite0: expansion, kernel, stride, output width and number of blocks of each stage (its published table).
STAGES = [(1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3), (6, 5, 2, 192, 4),
          (6, 3, 1, 320, 1)]  # fmt: skip


def lite0_blocks():
    width = 32
    for expansion, kernel, stride, out, number in STAGES:
        for index in range(number):
            yield expansion, kernel, stride if index == 0 else 1, width, out
            width = out


def lite0_weights() -> dict[str, Tensor]:
    """Random weights under the names of the PyTorch port."""
    state: dict[str, Tensor] = {}

    def convolution(name: str, *shape: int) -> None:
        state[f"{name}.weight"] = torch.randn(shape) * (2 / (shape[1] * shape[2] * shape[3])) ** 0.5

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.rand(width) + 0.5, 0.1 * torch.randn(width)
        state[f"{name}.running_mean"] = 0.1 * torch.randn(width)
        state[f"{name}.running_var"] = torch.rand(width) + 0.5

    convolution("_conv_stem", 32, 3, 3, 3)
    norm("_bn0", 32)
    for number, (expansion, kernel, _, width, out) in enumerate(lite0_blocks()):
        block, inner = f"_blocks.{number}", width * expansion
        if expansion > 1:
            convolution(f"{block}._expand_conv", inner, width, 1, 1)
            norm(f"{block}._bn0", inner)
        convolution(f"{block}._depthwise_conv", inner, 1, kernel, kernel)
        norm(f"{block}._bn1", inner)
        convolution(f"{block}._project_conv", out, inner, 1, 1)
        norm(f"{block}._bn2", out)
    convolution("_conv_head", 1280, 320, 1, 1)
    norm("_bn1", 1280)
    state["_fc.weight"], state["_fc.bias"] = 0.05 * torch.randn(1000, 1280), torch.randn(1000)
    return state


def lite0_logits(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """The network by hand: padding as TensorFlow's "same", ReLU6 after all norms but the last of a block."""

    def convolve(x: Tensor, name: str, norm: str, *, stride: int = 1, groups: int = 1, active: bool = True) -> Tensor:
        weight = state[f"{name}.weight"]
        pads = []
        for size in (x.shape[3], x.shape[2]):
            total = max((-(-size // stride) - 1) * stride + weight.shape[2] - size, 0)
            pads += [total // 2, total - total // 2]
        x = F.conv2d(F.pad(x, pads), weight, stride=stride, groups=groups)
        mean, var, scale, bias = (state[f"{norm}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        x = F.batch_norm(x, mean, var, scale, bias, eps=1e-3)
        return x.clamp(0, 6) if active else x

    x = convolve(images, "_conv_stem", "_bn0", stride=2)
    for number, (expansion, _, stride, width, out) in enumerate(lite0_blocks()):
        block, y = f"_blocks.{number}", x
        if expansion > 1:
            y = convolve(y, f"{block}._expand_conv", f"{block}._bn0")
        y = convolve(y, f"{block}._depthwise_conv", f"{block}._bn1", stride=stride, groups=width * expansion)
        y = convolve(y, f"{block}._project_conv", f"{block}._bn2", active=False)
        x = x + y if stride == 1 and width == out else y
    x = convolve(x, "_conv_head", "_bn1").mean((2, 3))
    return x @ state["_fc.weight"].T + state["_fc.bias"]


def test_weights_of_efficientnet_lite_in_the_names_of_its_port(tmp_path):
    torch.manual_seed(0)
    state, images = lite0_weights(), torch.randn(2, 3, 75, 96)
    network = timm.create_model("tf_efficientnet_lite0").eval()
    missing, unexpected = network.load_state_dict(rename_efficientnet_lite(state), strict=False)
    assert all(name.endswith("num_batches_tracked") for name in missing)
    assert not unexpected
    with torch.no_grad():
        expected = lite0_logits(state, images)
        torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())

    torch.save(state, tmp_path / "lite0.pth")
    from helpers import from_flags

    flags = [*TINY, "--backbone", "timm/tf_efficientnet_lite0", "--backbone_level", "5"]
    detector = from_flags(flags)[0]
    load_backbone_weights(detector, str(tmp_path / "lite0.pth"))
    weights = detector.backbone.state_dict()
    assert torch.equal(weights["body.blocks.6.0.conv_pwl.weight"], state["_blocks.15._project_conv.weight"])
    assert torch.equal(weights["body.blocks.1.1.bn1.running_var"], state["_blocks.2._bn0.running_var"])
