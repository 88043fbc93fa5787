"""SAP-DETR from the command line: train, evaluate, resume, two processes, official files, drawing, bad input."""

import argparse
import copy
import os
import re
import shlex
from pathlib import Path

import pytest
import torch
from helpers import (
    TINY_SAP,
    build_tiny,
    call_main,
    command,
    criterion_of,
    error_line,
    evaluate,
    read_json,
    read_log,
    run_main,
    settings,
)
from official import sap_detr as to_official
from torch import nn

from samdetr import demo, hubconf
from samdetr.engine import train_one_epoch
from samdetr.models.checkpoints import read_checkpoint
from samdetr.training.optim import learning_rate_factor
from samdetr.training.update import Update
from samdetr.util.padded_images import pad_images
from samdetr.util.targets import TargetBatch

TWO_EPOCHS = shlex.split("--epochs 2 --lr_drop 1 --lr 1e-3")
SAME = {"rtol": 0, "atol": 0}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def small_boxes(*flags: str, network: list[str] = TINY_SAP):
    """As build_tiny, but boxes are a quarter of the image wide instead of all of it, so that some fit objects."""
    detector, settings = build_tiny(*flags, network=network)
    detector.decoder.distances.data -= 2
    return detector, settings


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A file of such a network's weights."""
    detector, settings = small_boxes()
    file = tmp_path_factory.mktemp("sap") / "start.pth"
    torch.save({"model": detector.state_dict(), "settings": settings}, file)
    return file


@pytest.fixture(scope="module")
def trained_sap(shapes, start) -> Path:
    """Output folder of two epochs from there; do not write into it."""
    output = start.parent / "output"
    run_main(shapes, "--resume", str(start), *TWO_EPOCHS, "--output_dir", str(output), network=TINY_SAP)
    return output


# ---- Training, evaluation, resume


def test_training_writes_the_official_terms(trained_sap):
    assert sorted(os.listdir(trained_sap)) == [
        "checkpoint.pth", "checkpoint0000.pth", "checkpoint0001.pth", "checkpoint_best.pth", "curves.png", "log.txt",
        "settings.json", "times.txt",
    ]  # fmt: skip
    weights = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2, "loss_ce_obj": 1, "loss_inner": 2}
    terms = {f"{name}{layer}" for name in weights for layer in ("", "_0", "_1")}
    expected = {"loss", "class_error", *terms} | {f"{name}_unscaled" for name in terms | {"class_error"}}
    first, last = read_log(trained_sap)
    names = {f"train_{name}" for name in expected | {"lr", "bad_steps"}} | {
        f"test_{name}" for name in expected | {"coco_eval_bbox"}
    }
    assert last.keys() == names | {"epoch", "n_parameters"}
    for name in terms:
        weight = weights[name.rstrip("_01")]
        assert last[f"train_{name}"] == pytest.approx(weight * last[f"train_{name}_unscaled"], rel=1e-5)
    assert last["train_loss_ce"] < first["train_loss_ce"]
    settings = read_json(trained_sap / "settings.json")
    network = {"model": "sap_detr", "num_queries": 16, "sdg": True, "newconvinit": True, "input_proj_norm": "none"}
    assert {name: settings[name] for name in network} == network


def test_evaluation_rebuilds_the_network(trained_sap, shapes, tmp_path):
    figures, detections = evaluate(shapes, trained_sap / "checkpoint.pth", tmp_path / "eval")
    assert figures == read_log(trained_sap)[-1]["test_coco_eval_bbox"]
    assert figures[8] > 0  # AR100
    # 16 queries x 6 outputs are fewer than --num_select, but no detection is of the two classes that do not exist.
    assert len(detections) == 7 * 16 * 4
    _, fewer = evaluate(shapes, trained_sap / "checkpoint.pth", tmp_path / "fewer", "--num_select", "5")
    assert len(fewer) <= 7 * 5


def test_resumed_run_equals_the_uninterrupted_one(trained_sap, shapes, tmp_path):
    first = str(trained_sap / "checkpoint0000.pth")
    flags = [*TWO_EPOCHS, "--warmup_iters", "0", "--output_dir", str(tmp_path)]
    run_main(shapes, "--resume", first, *flags, network=[])
    resumed, straight = (torch.load(folder / "checkpoint.pth") for folder in (tmp_path, trained_sap))
    torch.testing.assert_close(resumed["model"], straight["model"], **SAME)
    torch.testing.assert_close(resumed["optimizer"]["state"], straight["optimizer"]["state"], **SAME)
    assert read_log(tmp_path)[0] == read_log(trained_sap)[1]


def test_the_published_flags_are_the_defaults_of_the_family():
    args = argparse.Namespace(**settings(["-m", "sap_detr"]).flat())
    published = {
        "lr": 1e-4, "lr_backbone": 1e-5, "weight_decay": 1e-4, "clip_max_norm": 0.1, "epochs": 50, "lr_drop": 40,
        "warmup_iters": 1000, "dropout": 0, "num_queries": 306, "num_select": 300, "input_proj_norm": "none",
        "transformer_activation": "relu", "meshgrid_refpoints_xy": True, "set_cost_class": 2, "set_cost_bbox": 5,
        "set_cost_giou": 2, "cls_loss_coef": 1, "bbox_loss_coef": 5, "giou_loss_coef": 2, "obj_loss_coef": 1,
        "inner_loss_coef": 2, "focal_alpha": 0.25, "dim_feedforward": 2048, "nheads": 8, "hidden_dim": 256,
        "point_reference": "late", "head_cell": "published", "objectness_target": "attached",
        "legacy_no_zero_grad": False, "newconvinit": False, "sdg": False, "bbox_embed_diff_each_layer": False,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in published} == published
    assert settings().trunk.num_queries == 300  # of the other family


def test_warm_up_is_the_published_one():
    """Linear from 0.001 at iteration 0 to 1 at the last, times a tenth after the drop, that within the warm-up too."""
    for step in range(40):
        wanted = (0.001 * (1 - step / 10) + step / 10 if step < 10 else 1) * (0.1 if step >= 25 else 1)
        factor = learning_rate_factor(step, schedule="step", total_steps=40, drop_step=25, warmup_steps=10)
        assert factor == pytest.approx(wanted, rel=1e-12)


# ---- Gradients that are never zeroed


def steps_of(number: int) -> list:
    """Batches as a loader gives them."""
    torch.manual_seed(5)
    batches = []
    for _ in range(number):
        images = [torch.randn(3, 64, 96), torch.randn(3, 48, 80)]
        targets = [
            {"labels": torch.randint(6, (n,)), "boxes": 0.25 + 0.5 * torch.rand(n, 4), "image_id": torch.tensor(n)}
            for n in (3, 1)
        ]
        batches.append((pad_images(images), TargetBatch.pack(targets)))
    return batches


@pytest.mark.parametrize("clip", [0.1, 0])
def test_legacy_loop_against_one_by_hand(clip):
    """Bit by bit: each step's gradient is the batch's plus the last step's, clipped together."""
    start = build_tiny(network=TINY_SAP)[0].train()
    criterion = criterion_of(TINY_SAP).train()
    batches = steps_of(4)

    by_hand = copy.deepcopy(start)
    weights = [weight for weight in by_hand.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    kept = [torch.zeros_like(weight) for weight in weights]
    for images, targets in batches:
        loss = sum(criterion.weighted(criterion(by_hand(images), targets.unpack())).values())
        new = torch.autograd.grad(loss, weights)
        for weight, old, fresh in zip(weights, kept, new):
            weight.grad = old + fresh
        if clip:
            nn.utils.clip_grad_norm_(weights, clip)
        kept = [weight.grad.clone() for weight in weights]
        optimizer.step()

    results = {}
    for zero_grad in (False, True):
        network = copy.deepcopy(start)
        optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-3)
        constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        train_one_epoch(
            model=network,
            criterion=criterion,
            loader=batches,
            update=Update(network, optimizer, constant, clip_max_norm=clip, keep_gradients=not zero_grad),
            device=torch.device("cpu"),
            epoch=0,
            print_every=100,
        )
        results[zero_grad] = dict(network.named_parameters())
    for name, weight in by_hand.named_parameters():
        assert torch.equal(results[False][name], weight), name
        if weight.requires_grad:
            assert not torch.equal(results[True][name], weight), name


def test_legacy_run_resumes_bit_by_bit(start, trained_sap, shapes, tmp_path):
    legacy = [*TWO_EPOCHS, "--warmup_iters", "0", "--legacy_no_zero_grad"]
    run_main(shapes, *legacy, "--resume", str(start), "--output_dir", str(tmp_path / "straight"), network=[])
    first = str(tmp_path / "straight" / "checkpoint0000.pth")
    run_main(shapes, *legacy, "--resume", first, "--output_dir", str(tmp_path / "resumed"), network=[])
    resumed, straight = (torch.load(tmp_path / name / "checkpoint.pth") for name in ("resumed", "straight"))
    torch.testing.assert_close(resumed["model"], straight["model"], **SAME)
    torch.testing.assert_close(resumed["gradients"], straight["gradients"], **SAME)
    usual = torch.load(trained_sap / "checkpoint.pth")
    assert "gradients" not in usual
    assert not torch.equal(usual["model"]["decoder.distances"], straight["model"]["decoder.distances"])


# ---- Official files

OFFICIAL_FLAGS = shlex.split(
    "lr lr_backbone batch_size epochs lr_drop backbone dilation position_embedding enc_layers dec_layers hidden_dim "
    "dim_feedforward dropout nheads num_queries num_select transformer_activation meshgrid_refpoints_xy newconvinit "
    "sdg bbox_embed_diff_each_layer aux_loss warmup_iters coco_path output_dir device seed"
)
# Flags without official counterparts keep their defaults here: C5, frozen norms.
OFFICIAL_TINY = shlex.split(
    "-m sap_detr --backbone resnet18 --hidden_dim 32 --nheads 4 --dim_feedforward 64 --enc_layers 1 --dec_layers 3 "
    "--num_queries 16 --newconvinit --sdg --bbox_embed_diff_each_layer"
)


def official_file(detector, settings, path: Path, *, with_flags: bool = True) -> Path:
    state = {to_official(name): weight for name, weight in detector.state_dict().items()}
    assert None not in state
    aliases = ("ref_point_head.", "ref_bbox_head.", "bbox_embed.", "point_embed.")
    state |= {f"transformer.decoder.{name}": weight for name, weight in state.items() if name.startswith(aliases)}
    content = {"model": state, "optimizer": {}, "lr_scheduler": {}, "epoch": 0}
    if with_flags:
        content["args"] = argparse.Namespace(
            **{name: settings[name] for name in OFFICIAL_FLAGS}, modelname="sap_detr", amp=False, set_cost_obj=2
        )
    torch.save(content, path)
    return path


@pytest.mark.parametrize("without", ["nothing", "--sdg", "--newconvinit", "--bbox_embed_diff_each_layer"])
def test_official_file_gives_the_figures_of_ours(without, shapes, tmp_path):
    flags = ["--transformer_activation", "prelu"] if without == "--sdg" else []
    network = [word for word in OFFICIAL_TINY if word != without]
    detector, settings = small_boxes(*flags, network=network)
    torch.save({"model": detector.state_dict(), "settings": settings}, tmp_path / "ours.pth")
    ours = evaluate(shapes, tmp_path / "ours.pth", tmp_path / "ours")
    assert ours[0][8] > 0  # AR100
    file = official_file(detector, settings, tmp_path / "official.pth")
    assert evaluate(shapes, file, tmp_path / "official") == ours
    resolved = read_json(tmp_path / "official" / "eval.json")["settings"]
    assert (resolved["model"], resolved["num_queries"], resolved["num_classes"]) == ("sap_detr", 16, 6)

    # Files of the same weights without a word about the network tell what its sizes do not.
    bare = read_checkpoint(str(official_file(detector, settings, tmp_path / "bare.pth", with_flags=False)))
    names = ("model", "sdg", "newconvinit", "transformer_activation", "num_classes")
    assert {name: bare["settings"][name] for name in names} == {name: settings[name] for name in names}
    if settings["bbox_embed_diff_each_layer"]:
        assert bare["settings"]["bbox_embed_diff_each_layer"] is True


def test_training_goes_on_from_an_official_file(shapes, tmp_path, capsys):
    detector, settings = build_tiny(network=OFFICIAL_TINY)
    file = official_file(detector, settings, tmp_path / "official.pth")
    run_main(shapes, "--resume", str(file), "--epochs", "2", "--output_dir", str(tmp_path / "output"), network=[])
    assert "resuming from" in capsys.readouterr().out
    (line,) = read_log(tmp_path / "output")
    assert line["epoch"] == 1
    # Iterations 4 to 7 of a warm-up over 1000; the log holds their mean.
    assert line["train_lr"] == pytest.approx(1e-4 * (0.001 + 0.999 * 5.5 / 1000), rel=1e-6)
    after = torch.load(tmp_path / "output" / "checkpoint.pth")
    torch.testing.assert_close(after["model"]["decoder.points"], detector.state_dict()["decoder.points"], **SAME)
    assert after["settings"]["model"] == "sap_detr"


# ---- Two processes


def test_gradients_are_zeroed_with_amp(start, shapes, tmp_path):
    """As in the published loop: there is nothing to carry on."""
    flags = ["--amp", "bf16", "--epochs", "1", "--warmup_iters", "0", "--resume", str(start)]
    weights = []
    for extra in ([], ["--legacy_no_zero_grad"]):
        run_main(shapes, *flags, *extra, "--output_dir", str(tmp_path / str(len(weights))), network=[])
        checkpoint = torch.load(tmp_path / str(len(weights)) / "checkpoint.pth")
        assert "gradients" not in checkpoint
        weights.append(checkpoint["model"])
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_two_processes_train_without_zeroing(start, shapes, forks, tmp_path):
    """With learned norms and batches of one image; both processes save and go on with the same gradients."""
    output = tmp_path / "output"
    flags = ["--legacy_no_zero_grad", "--epochs", "1", "--warmup_iters", "0", "--batch_size", "1"]
    flags += ["--resume", str(start), "--output_dir", str(output)]
    words = command(shapes, *flags, network=[])[1:]
    assert forks.main(words, tmp_path / "printed", ranks=2) == [0, 0], forks.err()
    (line,) = read_log(output)
    assert torch.load(output / "checkpoint.pth")["gradients"].keys()
    figures, _ = evaluate(shapes, output / "checkpoint.pth", tmp_path / "one", "--batch_size", "1")
    assert figures[8] > 0  # AR100
    assert line["test_coco_eval_bbox"] == figures


# ---- Drawing, torch.hub, bad input


def test_hub_entries_take_checkpoints(tmp_path):
    """Of the published models, their class head for six classes; the file knows it."""
    detector = hubconf.sap_detr_r50(num_classes=6)
    detector.decoder.distances.data += 1
    file = official_file(detector, settings(OFFICIAL_TINY).flat(), tmp_path / "r50.pth")
    loaded = hubconf.sap_detr_r50_dc5(checkpoint=str(file))
    assert not loaded.training
    assert loaded.backbone.strides == [16]  # the flags decide, where a file does not tell by its shapes
    assert torch.equal(loaded.decoder.distances, detector.decoder.distances)
    with pytest.raises(ValueError, match="does not fit the network: missing"):
        hubconf.sap_detr_r101(checkpoint=str(file))
    with torch.device("meta"):
        sizes = {name: getattr(hubconf, f"sap_detr_{name}")() for name in ("r50", "r50_dc5", "r101", "r101_dc5")}
    wanted = {"r50": 50_391_687, "r50_dc5": 50_391_687, "r101": 69_331_591, "r101_dc5": 69_331_591}
    assert {name: sum(p.numel() for p in net.parameters()) for name, net in sizes.items()} == wanted
    assert [net.backbone.strides for net in sizes.values()] == [[32], [16], [32], [16]]


def test_detections_are_drawn(trained_sap, shapes, tmp_path):
    flags = ["--resume", str(trained_sap / "checkpoint.pth"), "--images", str(shapes / "val2017"), "--limit", "2"]
    assert demo.main([*flags, "--output", str(tmp_path / "drawn"), "--threshold", "0", "--device", "cpu"]) == 0
    assert len(list((tmp_path / "drawn").glob("det_res_*.jpg"))) == 2


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--num_queries 300", "--num_queries 300 makes no grid of points: it must be 306 (18 x 17) or a square number"),
        ("--num_select 0", "--num_select 0 must be at least 1"),
        ("--obj_loss_coef -1", "--obj_loss_coef -1.0 must be at least 0"),
        ("--inner_loss_coef nan", "--inner_loss_coef nan must be at least 0"),
        ("--hidden_dim 48", "--newconvinit normalises in 32 groups, which do not divide --hidden_dim 48"),
        ("--smca", "--smca has no effect on -m sap_detr; leave it out, or choose another model"),
        ("--sam_range image", "--sam_range has no effect on -m sap_detr; leave it out"),
        ("-m sam_detr", "--bbox_embed_diff_each_layer has no effect on -m sam_detr"),
    ],
)
def test_bad_settings(flags, expected, shapes, tmp_path, capsys):
    output = tmp_path / "output"
    assert call_main(shapes, *shlex.split(flags), "--output_dir", str(output), network=TINY_SAP) == 2
    assert expected in error_line(capsys.readouterr().err)
    assert not output.exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("-m sam_detr", "-m sam_detr does not fit the checkpoint, a sap_detr; leave the flag out"),
        ("--num_queries 25", "of another shape 2 (decoder.distances (16, 4) in the file, (25, 4) here, decoder.points"),
        ("--dec_layers 2", "missing 0; unexpected 64 (decoder.class_heads.2.layers.0.bias, "),
    ],
)
def test_flags_that_contradict_the_checkpoint(flags, expected, trained_sap, shapes, tmp_path, capsys):
    fixed = ["--eval", "--resume", str(trained_sap / "checkpoint.pth"), "--output_dir", str(tmp_path / "output")]
    assert call_main(shapes, *fixed, *shlex.split(flags), network=[]) == 2
    assert expected in error_line(capsys.readouterr().err)
    assert not (tmp_path / "output").exists()


def test_more_objects_than_queries(shapes, tmp_path, capsys):
    """Trains, as officially, with a warning."""
    flags = ["--num_queries", "1", "--epochs", "1", "--output_dir", str(tmp_path / "output")]
    assert call_main(shapes, *flags, network=TINY_SAP) == 0
    assert re.search(r"data, train: warning: .*\d objects, 1 queries", capsys.readouterr().out)
