"""The study of convergence: what it measures, against numbers worked out by hand; its queue; its tables."""

import json
import os
import shlex
import signal
import time

import pytest
import torch
from helpers import MULTISCALE, TINY, TINY_DEFORMABLE, TINY_SAP, build_tiny, criterion_of

from benchmarks import convergence
from benchmarks.study import measures, report
from samdetr.models.ops.module import MSDeformAttn
from samdetr.models.ops.prior_attention.plain import plain_prior_attention
from samdetr.models.sam_detr.decoder import SAMDecoder
from samdetr.models.spatial_prior import SeparablePrior
from samdetr.training.cluster.folder_lock import FolderLock
from samdetr.util.padded_images import pad_images

SMALL = shlex.split(
    "--size 64 --images 16 --val_images 7 --epochs 2 --seeds 1 --hidden_dim 32 --dim_feedforward 64 --batch_size 4"
)


def test_instability():
    """Image 1: query 3 takes query 2's object (2 changes), query 5 stays. Image 2: queries 0 and 1 swap. Image 3: no
    object, no change."""
    before = {"1": {"2": 0, "5": 1}, "2": {"0": 0, "1": 1}, "3": {}}
    after = {"1": {"3": 0, "5": 1}, "2": {"0": 1, "1": 0}, "3": {}}
    assert measures.instability(before, after) == pytest.approx((2 + 2 + 0) / 3)
    assert measures.instability(after, after) == 0
    # All objects go to other queries: twice their number, the most there can be.
    assert measures.instability({"1": {"2": 0, "5": 1}}, {"1": {"3": 0, "4": 1}}) == 4


def test_points_in_boxes():
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.2], [0.2, 0.2, 0.4, 0.4]])
    points = torch.tensor([[[0.6, 0.55], [0.6, 0.65], [0.9, 0.5]], [[0.1, 0.3], [0.2, 0.2], [0.41, 0.2]]])
    assert measures.is_inside(boxes, points).tolist() == [[True, False, False], [True, True, False]]
    # Offsets of the first box: (0.5, 0.5), (0.5, 1.5), (2, 0); of the second (-0.5, 0.5), (0, 0), (1.05, 0).
    saturated, edge = measures.edge_distance(boxes, points)
    torch.testing.assert_close(saturated, torch.tensor([2 / 6, 1 / 6]))
    torch.testing.assert_close(edge, torch.tensor([(0.5 - 0.5 - 1) / 3, (0.5 + 1 - 0.05) / 3]))


def test_similarity():
    content = torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]])  # two queries, two heads
    first, second = (
        torch.tensor([[3.0, 0.0], [0.0, -1.0], [1.0, 1.0]]),
        torch.tensor([[1.0, 1.0], [-1.0, -1.0], [2, 0]]),
    )
    features = torch.stack([first, torch.zeros(3, 2), second])  # the second image has no matched query
    # The heads' mean cosines with the three features of their image.
    expected = torch.tensor([[0.5, -0.5, 0.5**0.5], [1, -1, 0.5**0.5]])
    cosines = measures.similarity(content, features, torch.tensor([0, 2]))
    torch.testing.assert_close(cosines, expected)
    chosen = torch.tensor([[True, False, True], [True, True, False]])
    torch.testing.assert_close(measures.mean_of(cosines, chosen), torch.tensor([(0.5 + 0.5**0.5) / 2, 0]))
    assert measures.mean_of(cosines, torch.zeros_like(chosen)).isnan().all()


def test_attention_weights_are_those_of_the_operator():
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, 5, 8), torch.randn(2, 1, 12, 8)
    prior = SeparablePrior(torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 3))
    padding = torch.zeros(2, 12, dtype=torch.bool)
    padding[1, 9:] = True
    value = torch.eye(12).expand(2, 3, 12, 12)  # so that the output is the weights
    expected = plain_prior_attention(query, key, value, padding, *prior, 0.0)
    image, chosen = torch.tensor([0, 1, 1]), torch.tensor([2, 4, 0])
    one = SeparablePrior(*(part[image, :, chosen] for part in prior)).dense()
    found = measures.attention_weights(query[image, :, chosen], key, image, padding=padding[image], prior=one)
    torch.testing.assert_close(found, expected[image, :, chosen])


@pytest.mark.parametrize("network", [TINY, MULTISCALE, TINY_SAP, TINY_DEFORMABLE, [*TINY_DEFORMABLE, "--aligner"]])
def test_figures_of_a_network(network):
    """Everything that is computed again from a layer's arguments, against a whole pass; an image without objects."""
    torch.manual_seed(0)
    model, criterion = build_tiny(network=network)[0].eval(), criterion_of(network).eval()
    batch = pad_images([torch.randn(3, 64, 48), torch.randn(3, 96, 128)])
    objects = torch.tensor([[0.3, 0.4, 0.5, 0.6], [0.7, 0.6, 0.5, 0.5]])
    targets = [
        {"image_id": torch.tensor(7), "labels": torch.tensor([1, 2]), "boxes": objects},
        {"image_id": torch.tensor(9), "labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)},
    ]
    with measures.Measures(model, criterion) as seen, torch.no_grad():
        outputs = model(batch)
        criterion(outputs, targets)
    assert not [m for m in [*model.modules(), criterion] if m._forward_hooks]
    found = seen.summary()
    (match,) = criterion.matcher([outputs], targets)
    assert found["matches"] == {"7": {str(int(q)): int(t) for q, t in zip(match.query, match.target)}, "9": {}}
    assert found["objects"] == 1
    layers = found["layers"]
    assert len(layers) == len(outputs["aux_outputs"]) + 1
    assert all(0 < layer["area"] < 1 and 0 < layer["attention"] < 1 for layer in layers)
    # A layer's references are the boxes that the layer before predicted.
    if network is not TINY_SAP:
        before = outputs["aux_outputs"][0]["pred_boxes"][0, match.query]
        distance = (before - objects[match.target]).abs().sum(-1).mean()
        refines = isinstance(model.decoder, SAMDecoder)
        assert layers[1]["reference_l1"] == pytest.approx(float(distance), abs=1e-5) or not refines


def test_share_of_sampling_points_in_the_object():
    """Every head looks at its reference, weight 3 / 4, and 0.5 to the right of it; the box reaches 0.25 far."""
    attention = MSDeformAttn(hidden_dim=8, num_levels=1, num_heads=2, num_points=2)
    with torch.no_grad():
        attention.sampling_offsets.bias.copy_(torch.tensor([[0.0, 0.0], [4.0, 0.0]]).repeat(2, 1).flatten())
        attention.attention_weights.bias.copy_(torch.tensor([3.0, 1.0]).log().repeat(2))
    given = {"query": torch.randn(1, 3, 8), "reference": torch.full((1, 3, 1, 2), 0.4), "level_shapes": [(8, 8)]}
    boxes = torch.tensor([[0.4, 0.4, 0.5, 0.5]])
    image, query = torch.tensor([0]), torch.tensor([2])

    def share(padding):
        with torch.no_grad():
            return float(measures._deformable_share(attention, {**given, "padding": padding}, image, query, boxes))

    assert share(None) == pytest.approx(0.75)
    # Half of the map's width is image: the reference lies at 0.8 of it, the other point right of the image.
    padding = torch.zeros(1, 8, 8, dtype=torch.bool)
    padding[:, :, 4:] = True
    assert share(padding.flatten(1)) == 0


def test_queue():
    """The headline's seeds, then the first seed of the others, then further seeds of all."""
    order = convergence.queue(["off", "average", "smca", "sap"], [1, 2, 3, 4])
    assert order[:6] == [("off", 1), ("smca", 1), ("off", 2), ("smca", 2), ("off", 3), ("smca", 3)]
    assert order[6:10] == [("average", 1), ("sap", 1), ("average", 2), ("sap", 2)]
    assert order[12:] == [("off", 4), ("average", 4), ("smca", 4), ("sap", 4)]


def results(output):
    return {path.name: path.stat().st_mtime_ns for path in (output / "results").iterdir()}


def test_interrupted_runs_go_on_and_finished_ones_are_not_repeated(tmp_path, monkeypatch, capsys):
    """A run that is stopped in its second epoch, beside one without interruption and without measures."""
    plain, output = tmp_path / "plain", tmp_path / "output"
    words = [*SMALL, "--rows", "smca"]
    assert convergence.main(["--output", str(plain), *words, "--no_measures"]) == 0
    steps, after_step = 0, convergence.loop.Trainer._after_step

    def stop_at_step_6(self):
        nonlocal steps
        steps += 1
        if steps == 6:
            os.kill(os.getpid(), signal.SIGTERM)
            while not self.signals.received:
                time.sleep(0.01)
        after_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(convergence.loop.Trainer, "_after_step", stop_at_step_6)
        assert convergence.main(["--output", str(output), *words]) == 75
    assert not results(output)
    assert convergence.main(["--output", str(output), *words]) == 0
    assert not [*(output / "runs").iterdir()]
    before = results(output)
    assert len(before) == 1
    one, other = (json.loads((folder / "results" / next(iter(before))).read_text()) for folder in (output, plain))
    for with_measures, without in zip(one["epochs"], other["epochs"], strict=True):
        assert without.items() <= with_measures.items()  # AP and losses to the last bit
    assert [epoch["instability"] is None for epoch in one["epochs"]] == [True, False]
    assert 0 <= one["epochs"][1]["instability"] <= 2 * one["epochs"][1]["objects"]

    assert convergence.main(["--output", str(output), *words]) == 0
    assert results(output) == before
    assert convergence.main(["--output", str(output), *words, "--lr", "1e-3"]) == 2
    assert "other settings (--lr 0.0006, now 0.001)" in capsys.readouterr().err
    assert "| aligner + SMCA | 1 |" in (output / "report.md").read_text()


def test_processes_share_the_queue(tmp_path, capsys):
    """While another process has the first run, one takes the next run and does not touch the first."""
    words = ["--output", str(tmp_path), *SMALL, "--epochs", "1", "--no_measures", "--rows", "off", "aligner"]
    with FolderLock(tmp_path / "locks/shapes-64px-16i-1e-off-s1"):
        assert convergence.main(words) == 0
        assert "another process is at it" in capsys.readouterr().out
        assert list(results(tmp_path)) == ["shapes-64px-16i-1e-aligner-s1.json"]
    assert not (tmp_path / "locks").exists()
    assert convergence.main(words) == 0
    assert len(results(tmp_path)) == 2


def test_rows_and_flags_that_are_not_known(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(convergence.ROWS, "new", "--no_such_flag 5")
    words = ["--output", str(tmp_path / "output"), *SMALL, "--rows", "new", "smca", "--budget", "0"]
    assert convergence.main(words) == 0
    said = capsys.readouterr().out
    assert "new: left out, main.py: error: --no_such_flag is no flag" in said
    assert "the runs that are left: 1" in said
    assert convergence.main(["--output", str(tmp_path / "output"), "--report"]) == 2
    with pytest.raises(SystemExit) as end:
        convergence.main([*words, "--no_such_flag", "5"])
    assert end.value.code == 2
    assert convergence.main([*words, "--patience", "3"]) == 2
    assert convergence.main([*words, "--val_images", "8"]) == 2
    assert convergence.main([*words, "--coco_path", str(tmp_path / "gone")]) == 2
    said = capsys.readouterr().err
    assert "--patience: every run needs all epochs" in said
    assert said.count("gone does not exist; set --coco_path") == 1
    assert "is not a complete set of these settings" in said
    (tmp_path / "output/results/shapes-64px-16i-2e-smca-s1.json").write_text("{")
    assert convergence.main(words) == 2
    assert "smca-s1.json is no result of a run; delete it" in capsys.readouterr().err


def made_up(row, seed, ap, instability=(None, 1.0, 0.5)):
    layers = [
        {"reference_l1": 0.5, "area": 0.2, "attention": 0.25},
        {"area": 0.2, "attention": 0.75, "cosine_inside": 0.5, "cosine_outside": 0.25},
    ]
    epochs = [
        {
            "ap": [a, *[0.5] * 11],
            "cpu_seconds": 60.0,
            "seconds": 0.6,
            "instability": i,
            "objects": 2.0,
            "layers": layers,
        }
        for a, i in zip(ap, instability)
    ]
    setting = {"data": "shapes", "size": 64, "images": 16, "number_of_epochs": 3}
    setting |= {"processor": "a fast one", "commit": f"c{seed}", "versions": {"torch": "9.0"}}
    return {**setting, "row": row, "seed": seed, "command": [], "epochs": epochs}


def test_report(tmp_path):
    """Baseline: 0.1, 0.2, 0.3 and 0, 0.1, 0.1: final AP 0.2 and 90 % of it 0.18, reached by the first run alone, after
    2 and 1.8 epochs. Areas: (0.05 + 0.15 + 0.25) / 3 = 0.15, (0 + 0.05 + 0.1) / 3 = 0.05."""
    (tmp_path / "results").mkdir()
    runs = [
        made_up("off", 1, (0.1, 0.2, 0.3)),
        made_up("off", 2, (-1, 0.1, 0.1)),
        made_up("smca-dropout", 1, (0.4, 0.4, 0.5)),
        made_up("off-denoising", 1, (0.1, 0.2, 0.2)),
        made_up("off-dropout", 1, (0.1, 0.2, 0.2)),
        made_up("average", 1, (0.1, 0.2, 0.2)),
    ]
    for run in runs:
        (tmp_path / "results" / f"{run['row']}-{run['seed']}.json").write_text(json.dumps(run))
    assert convergence.main(["--output", str(tmp_path), "--report"]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "| row | seeds | AP, epoch 1 | AP, epoch 3 | area | epochs to AP 0.200 | epochs to AP 0.180 |" in text
    baseline = "0.050 ± 0.071 | 0.200 ± 0.141 | 0.100 ± 0.071 | 2.0 (1 of 2) | 1.8 (1 of 2) | 3.0 ± 0.0"
    assert f"| no aligner | 2 | {baseline} |" in text
    assert (
        "| aligner + SMCA, dropout 0.1 | 1 | 0.400 | 0.500 | 0.350 | 0.5 | 0.5 | 3.0 |" in text
    )  # halfway to 0.4; 0.45
    # Of the first layer no cosine; IS 1 and 0.5 of at most 4.
    assert "| no aligner | - | - | 0.25, 0.75 | - | - | 0.50 ± 0.00 | 0.25 ± 0.00 | 0.12 ± 0.00 |" in text
    assert "Measuring took 1.0% of the processor time. a fast one, torch 9.0, commit c1; a fast one, " in text
    names = [line.split(" | ")[0] for line in text.split("\n\n")[1].splitlines()[2:]]
    changes = ["| no aligner, dropout 0.1", "| no aligner, denoising", "| aligner + SMCA, dropout 0.1"]
    assert names == ["| no aligner", "| average of the box", *changes]
    name = "shapes-64px-16i-3e"
    assert {p.name for p in tmp_path.glob("*.png")} == {f"{name}{k}.png" for k in ("", "-ap", "-others", "-changes")}
    assert report.epochs_to(0.5, [0.2, 0.4]) is None
