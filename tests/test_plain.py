"""Whole networks: the fast path against the plain one (inference/plain.py): outputs, losses, gradients in float64."""

import json
import sys

import pytest
import torch
from helpers import settings
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import model
from samdetr.inference.plain import PLAIN, PlainMatcher, plain
from samdetr.models.build import build_model
from samdetr.util.padded_images import PaddedImages, pad_images

TINY = (
    "--backbone resnet18 --hidden_dim 32 --nheads 4 --dim_feedforward 64 --enc_layers 1 --dec_layers 3 --num_queries 12"
)
# As published, but for fewer layers, queries and pixels.
REAL = "--enc_layers 1 --dec_layers 3 --num_queries 20"
DEFORMABLE = "--model deformable_detr --backbone resnet18 --hidden_dim 32 --nheads 4 --dim_feedforward 64 "
DEFORMABLE += "--enc_layers 1 --dec_layers 2 --num_queries 12"
NETWORKS = [
    TINY,
    f"{TINY} --smca",
    f"{TINY} --backbone resnet50 --dilation --smca",
    f"{TINY} --multiscale",
    f"{TINY} --multiscale --smca --epochs 12",
    f"{TINY} --smca --sam_points 1 --no_sam_reweight --lr_backbone 0",
    f"{TINY} --smca --sam_range image --backbone_norm learned",
    f"{TINY} --sam_resample off --relation",
    DEFORMABLE,
    f"{DEFORMABLE} --with_box_refine --two_stage --sam_resample points",
    f"{REAL} --dilation --smca",
    f"{REAL} --multiscale --smca",
]


def build(flags: str):
    """A network and a criterion whose every parameter and constant matters: random, with activations of usual size."""
    # Training drops nothing, but passes where it would.
    found = settings(flags).replace(num_classes=7, dropout=1e-13)
    torch.manual_seed(0)
    network, criterion, _ = build_model(found.trunk, found.family, found.loss)
    network.double()
    with torch.no_grad():
        for parameter in network.parameters():  # the last layers of the box heads are 0 otherwise
            parameter += 0.02 * torch.randn_like(parameter)
        for name, constant in network.backbone.named_buffers():
            if constant.is_floating_point():
                low, high = {"running_var": (0.5, 2), "weight": (0.6, 1.2)}.get(name.split(".")[-1], (-0.2, 0.2))
                constant.uniform_(low, high)
    return network, criterion


def work(network: nn.Module, criterion: nn.Module, *, training: bool) -> tuple[dict, dict]:
    """Outputs and losses, and the gradient of every parameter and of the images."""
    torch.manual_seed(1)
    images = [torch.randn(3, 64, 96, dtype=torch.float64), torch.randn(3, 80, 64, dtype=torch.float64)]
    boxes = 0.2 + 0.4 * torch.rand(3, 4, dtype=torch.float64)
    targets = [
        {"labels": torch.tensor([1, 5]), "boxes": boxes[:2]},
        {"labels": torch.tensor([3]), "boxes": boxes[2:]},
    ]
    batch = pad_images(images)
    batch.images.requires_grad_()
    network.train(training)
    criterion.train(training)
    outputs = network(batch)
    losses = criterion(outputs, targets)
    leaves = {name: p for name, p in network.named_parameters() if p.requires_grad} | {"images": batch.images}
    total = sum(criterion.weighted(losses).values())
    gradients = torch.autograd.grad(total, leaves.values(), allow_unused=True)
    return {"outputs": outputs, "losses": losses}, dict(zip(leaves, gradients))


def outputs(network: nn.Module) -> dict:
    """In evaluation, of images large enough for the kernels that need many rows."""
    torch.manual_seed(2)
    return network.eval()(pad_images([torch.randn(3, 160, 224, dtype=torch.float64) for _ in range(2)]))


@pytest.mark.parametrize("flags", NETWORKS)
def test_fast_and_plain_path_are_equal(flags):
    network, criterion = build(flags)
    plain_network, plain_criterion = plain(network), plain(criterion)
    assert type(plain_criterion.matcher) is PlainMatcher
    kinds = {type(part) for part in (*plain_network.modules(), plain_criterion)}
    assert len(kinds & set(PLAIN.values())) >= 3
    assert not kinds & set(PLAIN)
    assert plain_network.state_dict().keys() == network.state_dict().keys()
    network.to(memory_format=torch.channels_last)
    for training in (False, True):
        if training and "learned" in flags:
            continue  # the plain network's norms would have seen fewer batches
        ours, gradients = work(network, criterion, training=training)
        wanted, wanted_gradients = work(plain_network, plain_criterion, training=training)
        assert wanted["outputs"]["pred_logits"].std((0, 1)).max() > 0.01  # queries differ: something to compare
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)
        missing = {name for name, gradient in wanted_gradients.items() if gradient is None}
        assert missing == {name for name, gradient in gradients.items() if gradient is None}
        for name in wanted_gradients.keys() - missing:
            # In units of the largest gradient of that parameter, at most; the true gradient of a key's bias is 0.
            scale = max(1.0, wanted_gradients[name].abs().max().item())
            torch.testing.assert_close(gradients[name], wanted_gradients[name], rtol=0, atol=1e-9 * scale, msg=name)
    with torch.no_grad():  # where less is kept, more is done in one go
        torch.testing.assert_close(outputs(network), outputs(plain_network), rtol=1e-9, atol=1e-9)


def test_the_benchmark_counts_and_writes_json(tmp_path, monkeypatch, capsys):
    flags = f"--config R50 --rounds 0 --flops_size 800 1120 --device cpu --json {tmp_path / 'figures.json'}"
    monkeypatch.setattr(sys, "argv", ["model.py", *flags.split()])
    model.main()
    assert "R50                              plain  58.30 M parameters" in capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["torch"] == torch.__version__
    r50 = figures["configs"]["R50"]["plain"]
    assert r50["trainable"] == 58_073_546  # as tests/test_parity.py has it
    assert 98e9 < r50["flops"] < 102e9  # published: 100


@pytest.mark.slow
def test_the_benchmark_measures_in_a_process_of_its_own():
    inputs = {"device": "cpu", "size": [64, 96], "batch": 1, "threads": 1}
    peak = model.in_process("memory", "R50", path="fast", task="evaluate", **inputs)
    assert 58.3e6 * 4 / 2**20 < peak < 2000  # MiB: the weights and a little more
    times = model.measure_times(
        "R50", paths=["plain", "fast"], task="evaluate", rounds=1, device="cpu", size=(64, 96), batch=1
    )
    assert {path: len(values) for path, values in times.items()} == {"plain": 1, "fast": 1}


def largest_kept(flags: str, *, path: str) -> int:
    """Bytes of the largest tensor that forward keeps for backward of one image of 800 x 1120, with fake tensors."""
    found = settings(flags).replace(num_classes=91)
    with torch.device("meta"):
        network = build_model(found.trunk, found.family, found.loss)[0].train()
        network = plain(network) if path == "plain" else network
    kept = []
    with FakeTensorMode(allow_non_fake_inputs=True):  # shapes without work, and the attention that a CPU would take
        network.to_empty(device="cpu")
        images = PaddedImages(torch.empty(1, 3, 800, 1120), torch.zeros(1, 800, 1120, dtype=torch.bool))
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel() * x.element_size()) or x, id)
        with hooks:
            network(images)
    return max(kept)


def test_no_large_tensor_is_kept_for_backward():
    """R50-DC5: the plain path keeps the encoder's weights of 3,500 positions for as many in 8 heads, the other one at
    most an activation of the first stage, 256 channels of 200 x 280."""
    wanted = {"plain": 4 * 8 * 3500**2, "fast": 4 * 256 * 200 * 280}
    assert {path: largest_kept("--dilation --smca", path=path) for path in wanted} == wanted
    assert wanted["fast"] <= 0.4 * wanted["plain"]
