"""The bias of Relation-DETR: one number at a time, what does not change it, and a network with it."""

import math

import pytest
import torch
from helpers import MULTISCALE, TINY, build_tiny, call_main, error_line, evaluate, read_log, run_main

from samdetr.models.relations import RelationBias
from samdetr.util.padded_images import pad_images

EXACT = {"rtol": 0, "atol": 1e-12}


def boxes(seed: int, queries: int = 3) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return 0.1 + 0.4 * torch.rand(2, queries, 4, generator=random, dtype=torch.float64)


def bias(num_heads: int = 2) -> RelationBias:
    torch.manual_seed(0)
    return RelationBias(num_heads=num_heads).double()


def test_one_number_at_a_time():
    module, rows, columns = bias(), boxes(1), boxes(2)
    weight, constant = module.weights.weight.tolist(), module.weights.bias.tolist()
    found = module(rows, columns)
    assert found.shape == (2, 2, 3, 3)
    assert 0 < (found == 0).sum() < found.numel()  # some are cut off, not all
    for image in range(2):
        for row in range(3):
            for column in range(3):
                x, y, w, h = rows[image, row].tolist()
                x2, y2, w2, h2 = columns[image, column].tolist()
                values = [math.log(abs(x - x2) / (w + 1e-5) + 1), math.log(abs(y - y2) / (h + 1e-5) + 1)]
                values += [math.log((w + 1e-5) / (w2 + 1e-5)), math.log((h + 1e-5) / (h2 + 1e-5))]
                encoded = []
                for value in values:
                    for pair in range(8):
                        angle = 100 * value / 10000 ** (2 * pair / 16)
                        encoded += [math.sin(angle), math.cos(angle)]
                for head in range(2):
                    wanted = max(0, constant[head] + sum(w * e for w, e in zip(weight[head], encoded)))
                    # The periods are float32.
                    assert found[image, head, row, column].item() == pytest.approx(wanted, abs=1e-5)


def test_the_place_and_the_size_of_the_whole_do_not_matter():
    module, rows, columns = bias(), boxes(1), boxes(2)
    moved = [torch.cat([each[..., :2] + 0.3, each[..., 2:]], -1) for each in (rows, columns)]
    torch.testing.assert_close(module(*moved), module(rows, columns), rtol=0, atol=1e-9)
    assert not torch.equal(module(columns, rows), module(rows, columns).mT)  # in units of the row's box
    # But for what keeps sizes from 0.
    torch.testing.assert_close(module(1e3 * rows, 1e3 * columns), module(1e6 * rows, 1e6 * columns), rtol=0, atol=1e-4)


def test_boxes_get_no_gradient_and_weights_do():
    module, rows = bias(), boxes(1).requires_grad_()
    module(rows, rows).sum().backward()
    assert rows.grad is None
    assert module.weights.weight.grad.abs().max() > 0


def images() -> object:
    random = torch.Generator().manual_seed(2)
    return pad_images([torch.randn(3, *size, generator=random, dtype=torch.float64) for size in [(64, 96), (48, 64)]])


@pytest.mark.parametrize("network", [TINY, MULTISCALE], ids=["one scale", "three scales"])
def test_from_the_second_layer_on(network):
    """With a bias of 0 it is the network without; the first layer never has one."""
    network = [*network, "--dropout", "0", "--backbone_norm", "frozen"]
    without = build_tiny(network=network)[0].double()
    with_it = build_tiny("--relation", network=network)[0].double()
    missing = with_it.load_state_dict(without.state_dict(), strict=False)
    assert missing.missing_keys == ["decoder.relation.weights.weight", "decoder.relation.weights.bias"]
    with torch.no_grad():
        wanted, found = without.train()(images()), with_it.train()(images())
        first, *_ = wanted["aux_outputs"]
        torch.testing.assert_close(found["aux_outputs"][0]["pred_logits"], first["pred_logits"], **EXACT)
        assert (found["pred_logits"] - wanted["pred_logits"]).abs().max() > 1e-6
        for parameter in with_it.decoder.relation.parameters():
            parameter.zero_()
        torch.testing.assert_close(with_it(images())["pred_logits"], wanted["pred_logits"], **EXACT)


def test_compiles_in_one_piece():
    torch._dynamo.reset()
    detector = build_tiny("--relation")[0].eval()
    batch = pad_images([torch.randn(3, 64, 96)])
    with torch.no_grad():
        wanted = detector(batch)
        detector.compile(fullgraph=True, backend="eager")
        torch.testing.assert_close(detector(batch)["pred_boxes"], wanted["pred_boxes"], rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_a_run_with_it_evaluates_without_a_word(shapes, tmp_path):
    """With 16 bits and denoising, whose mask is joined with it; the file knows that there is a bias."""
    flags = ["--relation", "--denoising", "2", "--amp", "bf16", "--epochs", "1", "--lr", "1e-3"]
    run_main(shapes, *flags, "--output_dir", str(tmp_path / "run"))
    checkpoint = tmp_path / "run" / "checkpoint.pth"
    weights = torch.load(checkpoint)["model"]
    assert weights["decoder.relation.weights.weight"].shape == (4, 64)
    figures, _ = evaluate(shapes, checkpoint, tmp_path / "eval")
    assert figures == read_log(tmp_path / "run")[0]["test_coco_eval_bbox"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dec_layers", "1"], "--relation works from the second decoder layer on, --dec_layers is 1"),
        (["-m", "deformable_detr"], "--relation has no effect on -m deformable_detr; leave it out"),
    ],
)
def test_where_it_has_no_effect_it_is_refused(flags, said, shapes, capsys):
    assert call_main(shapes, *flags, "--relation", network=["--backbone_weights", "none"]) == 2
    assert said in error_line(capsys.readouterr().err)
