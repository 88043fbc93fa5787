"""Shortcuts of training give the numbers that they should: accumulated batches, 16 bits, compiled networks, repeats."""

import copy
import warnings
from collections import Counter

import pytest
import torch
from helpers import (
    MULTISCALE,
    TINY,
    TINY_DEFORMABLE,
    TINY_SAP,
    build_tiny,
    call_main,
    criterion_of,
    error_line,
    read_log,
    run_main,
    settings,
)
from torch import Tensor

from samdetr import engine
from samdetr.datasets.build import collate
from samdetr.training.loop import compiled_graphs
from samdetr.training.optim import build_scheduler
from samdetr.training.run import AMP
from samdetr.training.update import Update
from samdetr.util.padded_images import pad_images
from samdetr.util.targets import TargetBatch

FAMILY = {
    "sam": TINY,
    "multiscale": MULTISCALE,
    "deformable": TINY_DEFORMABLE,
    "two-stage": [*TINY_DEFORMABLE, "--with_box_refine", "--two_stage"],
    "sap": TINY_SAP,
}


def batches(sizes: list[int], *, dtype: torch.dtype) -> list:
    """Batches of so many images of one size, with 0 to 3 objects each; 12 at most."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(12, 3, 64, 96, generator=generator, dtype=dtype)  # the first ones are always the same
    targets = [
        {
            "labels": torch.randint(6, (i % 4,), generator=generator),
            "boxes": 0.3 + 0.3 * torch.rand(i % 4, 4, generator=generator, dtype=dtype),
            "image_id": torch.tensor(i),
        }
        for i in range(12)
    ]
    parts = torch.arange(sum(sizes)).split(sizes)
    return [(pad_images(list(images[part])), TargetBatch.pack([targets[i] for i in part])) for part in parts]


def train(network: list[str], loader: list, *, dtype: torch.dtype = torch.float64, device: str = "cpu", **options):
    """An epoch without dropout on fixed norms; the network, and what is logged."""
    flags = [*network, "--backbone_norm", "frozen", "--dropout", "0"]
    detector = build_tiny(network=flags)[0].to(device, dtype)
    criterion = criterion_of(flags)
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.1, fused=True)  # AdamW makes steps of rounding errors
    scheduler = build_scheduler(optimizer, schedule="step", total_steps=10, drop_step=10)
    stats = engine.train_one_epoch(
        model=detector, criterion=criterion, loader=loader, device=torch.device(device), epoch=0, print_every=50,
        update=Update(detector, optimizer, scheduler, clip_max_norm=0.1), **options,
    )  # fmt: skip
    return detector, stats


def detector_family(flags: list[str]) -> str:
    return settings(flags).trunk.model


@pytest.mark.parametrize("family", ["sam", "sap"])
def test_accumulated_batches_equal_one_large_batch(family):
    """Weights after two steps, and the log, although the small batches have unlike numbers of objects, one none."""
    large, wanted = train(FAMILY[family], batches([4, 4], dtype=torch.float64))
    small, logged = train(FAMILY[family], batches([1, 1, 1, 1, 1, 1, 1, 1, 1], dtype=torch.float64), accumulate=4)
    for (name, weight), other in zip(large.named_parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(other, weight, rtol=0, atol=1e-9, msg=name)
    assert logged.keys() == wanted.keys()
    for name in wanted:
        if not name.startswith("class_error"):  # of each batch's own objects
            assert logged[name] == pytest.approx(wanted[name], rel=1e-9), name
    start = build_tiny(network=[*FAMILY[family], "--backbone_norm", "frozen"])[0]
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(start.double().parameters(), large.parameters()))


def test_accumulation_in_a_run(shapes, tmp_path, capsys):
    """16 images are 2 steps of 2 x 4."""
    run_main(shapes, "--epochs", "1", "--accumulate", "2", "--output_dir", str(tmp_path))
    steps = {int(s["step"]) for s in torch.load(tmp_path / "checkpoint.pth")["optimizer"]["state"].values()}
    assert steps == {2}
    assert "epoch 0: 2/2" in capsys.readouterr().out
    assert call_main(shapes, "--accumulate", "5") == 2
    assert "--batch_size 4 --accumulate 5" in error_line(capsys.readouterr().err)


@pytest.mark.parametrize("family", ["sam", "multiscale", "deformable", "sap"])  # two-stage: other proposals are best
@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_16_bits(family, kind):
    """Predictions near those of float32, losses in float32, gradients of every weight finite."""
    flags = [*FAMILY[family], "--backbone_norm", "frozen", "--dropout", "0"]
    detector = build_tiny(network=flags)[0].eval()
    ((images, targets),) = batches([3], dtype=torch.float32)
    with torch.no_grad():
        wanted = detector(images)
    outputs = engine.predict(detector, images, AMP[kind])
    for name in ("pred_logits", "pred_boxes"):
        assert outputs[name].dtype == torch.float32
        torch.testing.assert_close(outputs[name], wanted[name], rtol=0, atol=0.15 if name == "pred_logits" else 0.03)
        assert not torch.equal(outputs[name], wanted[name])
    criterion = criterion_of(flags)
    sum(criterion.weighted(criterion(outputs, targets.unpack())).values()).backward()
    for name, weight in detector.named_parameters():
        assert weight.grad is None or torch.isfinite(weight.grad).all(), name


def test_16_bits_in_a_run(shapes, tmp_path):
    """Files hold float32; a run that goes on has its scale."""
    for kind in ("bf16", "fp16"):
        output = tmp_path / kind
        run_main(shapes, "--epochs", "1", "--amp", kind, "--output_dir", str(output))
        checkpoint = torch.load(output / "checkpoint.pth", weights_only=True)
        assert {v.dtype for v in checkpoint["model"].values() if v.is_floating_point()} == {torch.float32}
        assert read_log(output)[0]["train_loss"] > 0
    assert checkpoint["scaler"]["scale"] > 1
    run_main(
        shapes,
        "--epochs",
        "2",
        "--amp",
        "fp16",
        "--resume",
        str(output / "checkpoint.pth"),
        "--output_dir",
        str(output),
    )
    assert len(read_log(output)) == 2


@pytest.mark.parametrize("family", ["sam", "deformable", "sap"])
def test_compiled_in_one_piece_for_any_size(family):
    """One graph without a break, compiled a few times at most, however many sizes of images there are."""
    torch._dynamo.reset()
    detector = build_tiny(network=[*FAMILY[family], "--dropout", "0"])[0].eval()
    plain = copy.deepcopy(detector)
    detector.compile(dynamic=True, fullgraph=True, backend="eager")
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for height, width in [(64, 96), (96, 128), (128, 64), (80, 160), (96, 112)]:
            batch = pad_images([torch.randn(3, height, width), torch.randn(3, height - 9, width - 20)])
            ours, wanted = detector(batch), plain(batch)
            torch.testing.assert_close(ours["pred_logits"], wanted["pred_logits"], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ours["pred_boxes"], wanted["pred_boxes"], rtol=1e-4, atol=1e-4)
    assert compiled_graphs() <= 3
    assert list(detector.state_dict()) == list(plain.state_dict())
    torch._dynamo.reset()


def test_deterministic_runs_are_equal_bit_by_bit(shapes, tmp_path):
    try:
        for name in "ab":
            run_main(shapes, "--epochs", "1", "--deterministic", "--output_dir", str(tmp_path / name))
            assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    first, second = (torch.load(tmp_path / name / "checkpoint.pth")["model"] for name in "ab")
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILY)
def test_one_transfer_to_the_host_in_a_step(family, monkeypatch):
    """The matching's. On a GPU each would wait for all that is under way."""
    calls = Counter()
    for name in ("item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__"):
        original = getattr(Tensor, name)

        def counted(tensor, *args, original=original, name=name):
            if name != "numpy" or not tensor.is_cpu:
                calls[name] += 1
            return original(tensor, *args)

        monkeypatch.setattr(Tensor, name, counted)
    counts = []
    for number in (2, 6):
        calls.clear()
        train(FAMILY[family], batches([2] * number, dtype=torch.float32), dtype=torch.float32)
        counts.append(calls.total())
    assert counts[1] - counts[0] == 4, calls  # in four more steps; what an epoch needs once is in both


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", FAMILY)
def test_one_wait_for_the_gpu_in_a_step(family):
    """As CUDA itself counts them."""
    counts = []
    for number in (2, 6):
        loader = batches([2] * number, dtype=torch.float32)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                train(FAMILY[family], loader, dtype=torch.float32, device="cuda")
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchronizing CUDA operation" in str(warning.message) for warning in caught))
    assert counts[1] - counts[0] <= 4, [str(warning.message) for warning in caught]


def test_profile(shapes, tmp_path, capsys):
    run_main(shapes, "--epochs", "1", "--profile", "2", "--output_dir", str(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("milliseconds"))
    names = lines[head].split()[1:]
    assert names == ["data", "transfer", "forward", "matching", "loss", "backward", "optimiser", "all", "busy"]
    for row in range(2):
        label, number, *cells = lines[head + 1 + row].split()
        assert (label, number) == ("iteration", str(row))
        *parts, whole = map(float, cells[:-1])
        assert all(part > 0 for name, part in zip(names, parts) if name != "transfer")
        assert 0.5 * whole < sum(parts) <= 1.01 * whole
        assert 0 < int(cells[-1].rstrip("%")) <= 100
    assert not lines[head + 3].startswith("iteration")


def test_padding_to_multiples():
    target = {"labels": torch.tensor([1]), "boxes": torch.rand(1, 4)}
    images, _ = collate([(torch.ones(3, 33, 64), target), (torch.ones(3, 20, 65), target)], multiple=32)
    assert images.images.shape == (2, 3, 64, 96)
    assert (~images.padding).sum((1, 2)).tolist() == [33 * 64, 20 * 65]
    assert images.images.sum() == 3 * (33 * 64 + 20 * 65)
