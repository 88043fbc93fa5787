"""What only networks of several levels have: which layer attends which level, and levels of very unlike sizes."""

import pytest
import torch
from helpers import from_flags
from torch import nn

from samdetr.models.family import coarse_to_fine
from samdetr.models.sam_detr.family import attended_levels
from samdetr.util.padded_images import pad_images

# Wide enough for the GroupNorm: of a map of one cell it needs more than one channel a group.
NETWORK = (
    "--multiscale --backbone resnet18 --hidden_dim 64 --nheads 4 --dim_feedforward 48 --enc_layers 2 --dec_layers 5 "
    "--num_queries 6"
)


def build(flags: str):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    detector, criterion, _ = from_flags(f"{NETWORK} {flags}".split())
    for head in detector.decoder.box_heads:  # boxes would stay where they are otherwise
        nn.init.normal_(head.layers[-1].weight, std=0.3)
    return detector.train(), criterion


@pytest.mark.parametrize(
    ("layers", "levels", "attended"),
    [
        (6, 3, (2, 2, 1, 1, 0, 0)),
        (3, 3, (2, 1, 0)),
        (4, 3, (2, 2, 1, 0)),
        (5, 3, (2, 2, 1, 1, 0)),
        (7, 3, (2, 2, 2, 1, 1, 0, 0)),
        (6, 2, (1, 1, 1, 0, 0, 0)),
        (6, 4, (3, 3, 2, 1, 1, 0)),
        (6, 1, (0, 0, 0, 0, 0, 0)),
    ],
)
def test_decoder_layers_go_from_coarse_to_fine(layers, levels, attended):
    assert coarse_to_fine(layers, levels) == attended


def test_levels_of_sam_detr_are_the_published_ones_up_to_six_layers():
    """Layers 0 and 1 attend the coarsest level, 2 and 3 the middle one, 4 and 5 the finest, however many there are."""
    for layers in range(1, 7):
        assert attended_levels(layers, 3) == tuple(2 - layer // 2 for layer in range(layers))
        assert build(f"--dec_layers {layers}")[0].decoder.levels == attended_levels(layers, 3)
    assert attended_levels(7, 3) == (2, 2, 2, 1, 1, 0, 0)  # an even split: beyond what the official code can build
    assert attended_levels(6, 1) == (0, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match=r"--multiscale.*--enc_layers 0 and --dec_layers 4.*at least 5"):
        build("--enc_layers 0 --dec_layers 4")


@pytest.mark.parametrize(
    ("flags", "strides", "channels"),
    [
        ("", [8, 16, 32], [128, 256, 512]),
        ("--backbone resnet50", [8, 16, 32], [512, 1024, 2048]),
        ("--backbone resnet50 --dilation", [8, 16, 16], [512, 1024, 2048]),
    ],
)
def test_levels_of_the_backbone(flags, strides, channels):
    with torch.device("meta"):
        detector, _ = build(f"{flags} --dec_layers 6")
        maps = detector.backbone(torch.empty(1, 3, 128, 192))
    assert detector.backbone.strides == strides
    assert [m.shape for m in maps] == [(1, c, 128 // s, 192 // s) for c, s in zip(channels, strides)]
    assert detector.decoder.levels == (2, 2, 1, 1, 0, 0)


# Heights and widths.
@pytest.mark.parametrize("batch", [[(32, 32)], [(33, 65)], [(31, 1)], [(64, 1333)], [(32, 32), (1333, 64)]], ids=str)
@pytest.mark.parametrize("flags", ["", "--smca", "--smca --backbone resnet50 --dilation"])
def test_images_of_any_shape_train(flags, batch):
    """From a single cell on the coarsest level, alone and beside the longest image that --max_size allows: finite
    losses, and a finite gradient for every parameter."""
    detector, criterion = build(flags)
    images = [torch.randn(3, *size) for size in batch]
    targets = [{"labels": torch.tensor([3]), "boxes": torch.tensor([[0.6, 0.4, 0.7, 0.5]])} for _ in images]
    levels = []
    hook = detector.projection.register_forward_hook(lambda module, inputs, output: levels.extend(output))
    outputs = detector(pad_images(images))
    hook.remove()
    losses = criterion(outputs, targets)
    sum(criterion.weighted(losses).values()).backward()

    height, width = (max(sides) for sides in zip(*batch))
    for level, stride in zip(levels, detector.backbone.strides):
        assert level.features.shape[2:] == (-(-height // stride), -(-width // stride))
        assert not level.padding[:, 0, 0].any()  # an image keeps a cell, however small it is
    for name, loss in losses.items():
        assert torch.isfinite(loss), name
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
