"""Deformable DETR: what predictions depend on, proposals, how it starts and trains, and real command lines."""

import argparse
import math
import shlex
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    REPOSITORY,
    TINY,
    TINY_DEFORMABLE,
    build_tiny,
    call_main,
    error_line,
    evaluate,
    from_flags,
    read_json,
    read_log,
    run_main,
    settings,
)
from official import deformable_detr as to_official
from torch import Tensor, nn

from samdetr import demo, hubconf
from samdetr.models.deformable_detr.queries import initial_boxes
from samdetr.models.feature_levels import FeatureLevel, InputProjection
from samdetr.training.optim import parameter_groups
from samdetr.util.padded_images import pad_images

# One level, several, refined, two-stage.
VARIANTS = {
    "one level": "--num_feature_levels 1",
    "plain": "",
    "refined": "--with_box_refine",
    "two-stage": "--with_box_refine --two_stage",
}


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def build(flags: str = ""):
    """Detector (frozen norms, random weights everywhere, float64, evaluation mode) and criterion."""
    flags = [*TINY_DEFORMABLE, "--backbone_norm", "frozen", "--dropout", "0", *flags.split()]
    detector, criterion, _ = from_flags(flags)
    with torch.no_grad():
        for name, parameter in detector.named_parameters():
            parameter += 0.1 * torch.randn_like(parameter) * (not name.startswith("backbone"))
    return detector.double().eval(), criterion


def image(height: int, width: int) -> Tensor:
    return torch.randn(3, height, width, dtype=torch.float64)


def layers_of(outputs: dict) -> list[dict[str, Tensor]]:
    return [*outputs["aux_outputs"], outputs, *([outputs["enc_outputs"]] if "enc_outputs" in outputs else [])]


def objects(*labels: int) -> dict[str, Tensor]:
    boxes = 0.2 + 0.4 * torch.rand(len(labels), 4, dtype=torch.float64)
    return {"labels": torch.tensor(labels, dtype=torch.int64), "boxes": boxes}


# ---- What predictions depend on


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_images_of_a_batch_do_not_see_each_other(flags):
    detector, _ = build(flags)
    images = [image(64, 96) for _ in range(3)]
    together = detector(pad_images(images))
    for index, alone in enumerate(detector(pad_images([one])) for one in images):
        for joint, single in zip(layers_of(together), layers_of(alone), strict=True):
            for name in ("pred_logits", "pred_boxes"):
                torch.testing.assert_close(joint[name][[index]], single[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("flags", ["", "--with_box_refine"])
def test_permuted_queries_permute_the_outputs(flags):
    detector, _ = build(flags)
    batch = pad_images([image(64, 96), image(96, 50)])
    before = layers_of(detector(batch))
    order = torch.randperm(10)
    with torch.no_grad():
        embedding = detector.decoder.queries.embedding
        embedding.copy_(embedding[order].clone())
    for old, new in zip(before, layers_of(detector(batch)), strict=True):
        for name in ("pred_logits", "pred_boxes"):
            torch.testing.assert_close(new[name], old[name][:, order], rtol=0, atol=1e-10)
            assert (old[name][:, 1:] - old[name][:, :1]).abs().amax((0, 2)).min() > 1e-3  # the queries do differ


def test_padding_is_never_attended():
    """Behind the projection. The shares of the maps that are image are float32 numbers, and exact here: a half."""
    detector, _ = build("--with_box_refine --num_feature_levels 2")
    features = torch.randn(1, 32, 4, 6, dtype=torch.float64)

    def predict(scale: int) -> dict[str, Tensor]:
        """Of 4 x 6 and 2 x 3 cells in maps `scale` times as large, the rest being random."""
        levels = []
        for content in (features, features[:, :, ::2, ::2]):
            height, width = content.shape[2:]
            padded = torch.randn(1, 32, scale * height, scale * width, dtype=torch.float64)
            position = torch.randn_like(padded)
            padding = torch.ones(1, *padded.shape[2:], dtype=torch.bool)
            padded[..., :height, :width] = position[..., :height, :width] = content
            padding[..., :height, :width] = False
            levels.append(FeatureLevel(padded, padding, position))
        return detector.decoder(detector.encoder(levels))[-1]

    alone, padded = predict(1), predict(2)
    for name in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(padded[name], alone[name], rtol=0, atol=1e-10)


# ---- Levels


def test_levels_beyond_the_backbone():
    """The first from the last backbone map as it is, the next ones from the level before, each at half its size."""
    projection = InputProjection(in_channels=[5, 7], hidden_dim=32, norm=True, extra_levels=3, xavier=True)
    maps = [torch.randn(2, 5, 20, 13), torch.randn(2, 7, 10, 7)]
    padding = torch.zeros(2, 160, 104, dtype=torch.bool)
    padding[1, 80:] = True
    levels = projection(maps, padding)
    assert [tuple(level.features.shape[2:]) for level in levels] == [(20, 13), (10, 7), (5, 4), (3, 2), (2, 1)]
    assert [level.padding[1].sum().item() for level in levels] == [130, 35, 8, 2, 1]  # nearest neighbour
    source = maps[1]
    for level, (convolution, norm) in zip(levels[2:], projection.levels[2:]):
        wanted = norm(F.conv2d(source, convolution.weight, convolution.bias, stride=2, padding=1))
        torch.testing.assert_close(level.features, wanted)
        source = level.features
    difference = levels[3].position[0, :, 0, 0] - projection.level_embedding[3]
    assert difference.abs().max() <= 1 + 1e-6  # sines
    assert InputProjection(in_channels=[5], hidden_dim=32, norm=False).level_embedding is None


@pytest.mark.parametrize(
    ("flags", "strides", "extra"),
    [
        ("--num_feature_levels 1", [32], 0),
        ("--num_feature_levels 1 --dilation", [16], 0),
        ("--num_feature_levels 2", [16, 32], 0),
        ("", [8, 16, 32], 1),
        ("--num_feature_levels 6", [8, 16, 32], 3),
        ("--backbone_level 4", [8, 16], 2),
        ("--backbone_level 3 --num_feature_levels 1", [8], 0),
    ],
)
def test_which_stages_are_used(flags, strides, extra):
    with torch.device("meta"):
        detector, _, _ = from_flags(["--model", "deformable_detr", *flags.split()])
    assert detector.backbone.strides == strides
    assert len(detector.projection.levels) == len(strides) + extra
    assert detector.projection.level_embedding.shape == (len(strides) + extra, 256)


# ---- Proposals


def test_initial_boxes_by_hand():
    """A box in the middle of each cell, relative to the image; none within 0.01 of the border, nor on padding."""
    features = torch.zeros(2, 32, 2, 120)
    padding = torch.zeros(2, 2, 120, dtype=torch.bool)
    padding[1, :, 60:] = True
    padding[1, 1] = True
    levels = [FeatureLevel(features, padding, features), FeatureLevel(features, padding, features)]
    logits, usable = initial_boxes(levels)
    assert logits.shape == (2, 2 * 240, 4)
    assert (logits[~usable] == torch.inf).all()
    usable = usable.view(2, 2, 2, 120)
    boxes = logits.sigmoid().view(2, 2, 2, 120, 4)  # image, level, row, column
    assert torch.equal(usable[:, 0], usable[:, 1])
    # 120 columns: the first centre is at 0.5 / 120 = 0.004, the second at 0.0125. 60 columns: the first at 0.0083.
    assert usable[0, 0].sum() == 2 * 118
    assert usable[1, 0].sum() == 58
    torch.testing.assert_close(boxes[0, 0, 1, 1], torch.tensor([1.5 / 120, 0.75, 0.05, 0.05]))
    torch.testing.assert_close(boxes[1, 1, 0, 58], torch.tensor([58.5 / 60, 0.5, 0.1, 0.1]))
    # Sides double with each level: from the sixth on, boxes are larger than the image.
    assert not initial_boxes(levels * 3)[1].view(2, 6, -1)[:, 5].any()
    assert initial_boxes(levels * 3)[1].view(2, 6, -1)[:, 4].any()


def test_positions_without_a_box_propose_the_whole_corner():
    """1, 1, 1, 1, as in the reference, with finite gradients; and they may be chosen."""
    detector, criterion = build(f"{VARIANTS['two-stage']} --num_queries 100")
    detector.train()
    outputs = detector(pad_images([image(64, 64), image(16, 40)]))
    boxes = outputs["enc_outputs"]["pred_boxes"]
    assert boxes.shape == (2, 64 + 16 + 4, 4)
    none = (boxes == 1).all(-1)
    assert none.sum(1).tolist() == [0, 84 - (2 * 5 + 1 * 3 + 1 * 2)]
    terms = criterion(outputs, [objects(3, 5), objects(1)])
    sum(criterion.weighted(terms).values()).backward()
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("sizes", [[(32, 32)], [(1333, 64)], [(32, 32), (64, 333)]])
@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_small_and_long_images(flags, sizes):
    """Two-stage models have no more queries than positions: 4 x 4 + 2 x 2 + 1 for an image of 32 x 32."""
    detector, criterion = build(f"{flags} --num_queries 30")
    detector.train()
    outputs = detector(pad_images([image(*size) for size in sizes]))
    queries = 21 if "two_stage" in flags and sizes == [(32, 32)] else 30
    for layer in layers_of(outputs)[:2]:
        assert layer["pred_boxes"].shape == (len(sizes), queries, 4)
        assert torch.isfinite(layer["pred_logits"]).all()
    loss = sum(criterion.weighted(criterion(outputs, [objects(3)] * len(sizes))).values())
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in detector.parameters() if p.requires_grad)


# ---- Start and training


def start(flags: str = ""):
    flags = f"--model deformable_detr --backbone resnet18 {flags}"
    return from_flags(flags.split())


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_initialisation(flags):
    detector, _, _ = start(flags)
    decoder, projection = detector.decoder, detector.projection

    def is_xavier(weight: Tensor) -> bool:
        fan = (weight.shape[0] + weight.shape[1]) * weight[0][0].numel()
        bound = math.sqrt(6 / fan)
        return (0.98 * bound < weight.abs().max() <= bound) and abs(weight.std() / (bound / 3**0.5) - 1) < 0.05

    def is_normal(values: Tensor) -> bool:
        return abs(values.mean()) < 0.2 and abs(values.std() - 1) < 0.15 and values.abs().max() > 2

    for convolution, _ in projection.levels:
        assert is_xavier(convolution.weight)
        assert (convolution.bias == 0).all()
    assert is_normal(projection.level_embedding)
    for layer in decoder.layers:
        assert is_xavier(layer.self_attention.in_proj_weight)
        assert is_xavier(layer.feed_forward.linear1.weight)
        assert layer.feed_forward.linear1.bias.abs().max() > 0.05  # up to 1 / 16
        assert (layer.cross_attention.sampling_offsets.weight == 0).all()
        assert layer.cross_attention.sampling_offsets.bias.abs().max() == 4
        assert is_xavier(layer.cross_attention.value_proj.weight)
    assert not torch.equal(*(layer.feed_forward.linear1.weight for layer in decoder.layers[:2]))

    # Heads: equal, classes at 1 %, no movement; where a reference is a point, a box of sigmoid(-2) on each side.
    two_stage, refined = "two_stage" in flags, "refine" in flags
    class_heads, box_heads = [*decoder.class_heads], [*decoder.box_heads]
    assert len(class_heads) == len(box_heads) == (6 if refined else 1)
    if two_stage:
        class_heads.append(decoder.queries.class_head)
        box_heads.append(decoder.queries.box_head)
        for linear in (decoder.queries.memory_projection, decoder.queries.box_projection):
            assert is_xavier(linear.weight)
            assert linear.bias.abs().max() > 0
    else:
        assert is_normal(decoder.queries.embedding)
        assert (decoder.queries.reference_points.bias == 0).all()
        assert 0.1 < decoder.queries.reference_points.weight.abs().max() <= math.sqrt(6 / 258)
    for head in class_heads:
        torch.testing.assert_close(head.bias.sigmoid(), torch.full((91,), 0.01))
        assert torch.equal(head.weight, class_heads[0].weight)
        assert 0.06 < head.weight.abs().max() <= 1 / 16
    for index, head in enumerate(box_heads):
        assert torch.equal(head.layers[0].weight, box_heads[0].layers[0].weight)
        assert (head.layers[-1].weight == 0).all()
        assert head.layers[-1].bias.tolist() == ([0, 0, -2, -2] if index == 0 and not two_stage else [0] * 4)


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_learning_rates(flags):
    """References and sampling offsets, of encoder and decoder, at a tenth of the rest; the published rates."""
    words = ["--model", "deformable_detr", "--backbone", "resnet18", *flags.split()]
    found = settings(words).optimisation
    detector, _, _ = from_flags(words)
    names = {parameter: name for name, parameter in detector.named_parameters()}
    groups = {
        group["name"]: (group["lr"], {names[parameter] for parameter in group["params"]})
        for group in parameter_groups(
            detector,
            lr=found.lr,
            lr_backbone=found.lr_backbone,
            lr_linear_proj_names=found.lr_linear_proj_names,
            lr_linear_proj_mult=found.lr_linear_proj_mult,
        )
    }
    slow = {
        f"{layer}.sampling_offsets.{kind}"
        for i in range(6)
        for layer in (f"encoder.layers.{i}.self_attention", f"decoder.layers.{i}.cross_attention")
        for kind in ("weight", "bias")
    }
    if "two_stage" not in flags:
        slow |= {f"decoder.queries.reference_points.{kind}" for kind in ("weight", "bias")}
    assert groups["linear_proj"] == (pytest.approx(2e-5), slow)
    assert groups["main"][0] == 2e-4
    assert groups["backbone"][0] == 2e-5
    assert all(name.startswith("backbone.") for name in groups["backbone"][1])


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_a_tiny_network_learns_its_batch(flags):
    detector, criterion = build(flags)
    losses = train(detector, criterion, steps=25)
    assert losses[-1] < 0.8 * losses[0]


def train(detector, criterion, *, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3)
    batch, targets = pad_images([image(64, 64), image(64, 80)]), [objects(3, 5), objects(90)]
    detector.train()
    losses = []
    for _ in range(steps):
        loss = sum(criterion.weighted(criterion(detector(batch), targets)).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 0.1)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("labels", [((3, 5), ()), ((), ())], ids=["one empty", "all empty"])
@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_images_without_objects_train(flags, labels):
    """A finite loss, and a finite gradient for every parameter: DistributedDataParallel waits for each of them."""
    detector, criterion = build(flags)
    detector.train()
    terms = criterion(detector(pad_images([image(64, 64), image(48, 80)])), [objects(*each) for each in labels])
    sum(criterion.weighted(terms).values()).backward()
    assert all(torch.isfinite(term) for term in terms.values())
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


def test_the_loss_on_proposals():
    """Counts with and without auxiliary losses; labels do not matter to it."""
    detector, criterion = build(VARIANTS["two-stage"])
    outputs = detector(pad_images([image(64, 64), image(48, 80)]))
    targets = [objects(3, 5), objects(90)]
    terms = criterion(outputs, targets)
    renamed = criterion(outputs, [target | {"labels": (target["labels"] + 1) % 91} for target in targets])
    for name, weight in (("loss_ce", 2), ("loss_bbox", 5), ("loss_giou", 2)):
        assert criterion.weighted(terms)[f"{name}_enc"] == weight * terms[f"{name}_enc"] > 0
        assert renamed[f"{name}_enc"] == terms[f"{name}_enc"]
    assert renamed["loss_ce"] != terms["loss_ce"]
    criterion.auxiliary = False
    assert criterion(outputs, targets).keys() == {name for name in terms if not name.endswith("_0")}


# ---- Command lines


TWO_STAGE = [*TINY_DEFORMABLE, "--with_box_refine", "--two_stage"]


@pytest.fixture(scope="module")
def trained_two_stage(shapes, tmp_path_factory):
    """Output folder of two epochs, the learning rate falling to a tenth after the first."""
    output = tmp_path_factory.mktemp("run") / "output"
    run_main(shapes, "--epochs", "2", "--lr_drop", "1", "--lr", "1e-3", "--output_dir", str(output), network=TWO_STAGE)
    return output


def test_training_writes_the_official_terms(trained_two_stage):
    terms = {f"{name}{of}" for name in ("loss_ce", "loss_bbox", "loss_giou") for of in ("", "_0", "_enc")}
    extra = {"cardinality_error", "cardinality_error_0", "cardinality_error_enc", "class_error"}
    for line in read_log(trained_two_stage):
        found = {name.removeprefix("train_") for name in line if name.startswith("train_")}
        assert found == terms | {f"{name}_unscaled" for name in terms | extra} | {
            "loss", "class_error", "lr", "bad_steps",
        }  # fmt: skip
        assert line["train_loss"] == pytest.approx(sum(line[f"train_{name}"] for name in terms), rel=1e-5)
    first, last = read_log(trained_two_stage)
    assert last["train_loss"] < first["train_loss"]
    settings = read_json(trained_two_stage / "settings.json")
    resolved = {
        "model": "deformable_detr", "num_feature_levels": 3, "two_stage": True, "input_proj_norm": "group",
        "lr_backbone": 2e-5, "lr_linear_proj_names": ["reference_points", "sampling_offsets"], "num_classes": 6,
    }  # fmt: skip
    assert {name: settings[name] for name in resolved} == resolved


def test_evaluation_and_demo_rebuild_the_network(trained_two_stage, shapes, tmp_path):
    checkpoint = trained_two_stage / "checkpoint.pth"
    figures, detections = evaluate(shapes, checkpoint, tmp_path / "eval")
    assert figures == read_log(trained_two_stage)[-1]["test_coco_eval_bbox"]
    assert len(detections) == 7 * 10 * 4  # images, queries, classes that the data set names
    flags = ["--resume", str(checkpoint), "--images", str(shapes / "val2017"), "--output", str(tmp_path / "drawn")]
    assert demo.main([*flags, "--threshold", "0", "--limit", "2", "--device", "cpu"]) == 0
    assert len([*(tmp_path / "drawn").glob("det_res_*")]) == 2
    assert demo.main([*flags, "--salient_points"]) == 2  # there are none


def test_resumed_run_equals_the_uninterrupted_one(trained_two_stage, shapes, tmp_path):
    """Bit by bit, and without a word about the network."""
    flags = ["--epochs", "2", "--lr_drop", "1", "--lr", "1e-3", "--output_dir", str(tmp_path)]
    run_main(shapes, "--resume", str(trained_two_stage / "checkpoint0000.pth"), *flags, network=[])
    resumed, straight = (torch.load(folder / "checkpoint.pth") for folder in (tmp_path, trained_two_stage))
    torch.testing.assert_close(resumed["model"], straight["model"], rtol=0, atol=0)
    torch.testing.assert_close(resumed["optimizer"]["state"], straight["optimizer"]["state"], rtol=0, atol=0)
    assert read_log(tmp_path)[0] == read_log(trained_two_stage)[1]


# What an official file says about its network, and a little more.
OFFICIAL_FLAGS = shlex.split(
    "lr lr_backbone batch_size epochs lr_drop num_feature_levels with_box_refine two_stage backbone dilation "
    "position_embedding enc_layers dec_layers dim_feedforward hidden_dim dropout nheads num_queries dec_n_points "
    "enc_n_points aux_loss coco_path output_dir device seed"
)


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_official_file_gives_the_figures_of_ours(flags, shapes, tmp_path):
    # Flags without official counterparts keep their defaults: C5, frozen norms.
    network = shlex.split(f"{' '.join(TINY_DEFORMABLE)} --backbone_level 5 --backbone_norm frozen {flags}")
    detector, settings = build_tiny(network=network)
    state = detector.state_dict()
    saved = argparse.Namespace(**{name: settings[name] for name in OFFICIAL_FLAGS})
    torch.save({"model": state, "settings": settings}, tmp_path / "ours.pth")
    official = {"model": to_official(state), "optimizer": {}, "lr_scheduler": {}, "epoch": 0, "args": saved}
    torch.save(official, tmp_path / "official.pth")
    ours = evaluate(shapes, tmp_path / "ours.pth", tmp_path / "ours")
    assert evaluate(shapes, tmp_path / "official.pth", tmp_path / "official") == ours
    assert len(ours[1]) > 0
    resolved = read_json(tmp_path / "official" / "eval.json")["settings"]
    assert (resolved["model"], resolved["num_classes"]) == ("deformable_detr", 6)
    assert resolved["lr_linear_proj_names"] == ["reference_points", "sampling_offsets"]


def test_training_goes_on_from_an_official_file(shapes, tmp_path, capsys):
    network = [*TINY_DEFORMABLE, "--backbone_level", "5", "--backbone_norm", "frozen"]
    detector, settings = build_tiny(network=network)
    saved = argparse.Namespace(**{name: settings[name] for name in OFFICIAL_FLAGS})
    content = {"model": to_official(detector.state_dict()), "optimizer": {}, "epoch": 0, "args": saved}
    torch.save(content, tmp_path / "official.pth")
    flags = ["--resume", str(tmp_path / "official.pth"), "--epochs", "2", "--output_dir", str(tmp_path / "output")]
    run_main(shapes, *flags, network=[])
    assert "at epoch 1" in capsys.readouterr().out
    (line,) = read_log(tmp_path / "output")
    assert line["train_lr"] == pytest.approx(2e-4)


@pytest.mark.parametrize(
    ("network", "flags", "expected"),
    [
        (TINY_DEFORMABLE, "--two_stage", ["--two_stage", "--with_box_refine"]),
        (TINY_DEFORMABLE, "--num_feature_levels 0", ["--num_feature_levels 0", "at least 1"]),
        (TINY_DEFORMABLE, "--dec_n_points 0", ["--dec_n_points 0", "at least 1"]),
        (TINY_DEFORMABLE, "--hidden_dim 36", ["not 36", "--input_proj_norm none"]),
        (TINY_DEFORMABLE, "--hidden_dim 64 --nheads 5", ["--hidden_dim 64", "--nheads 5"]),
        (TINY_DEFORMABLE, "--smca", ["--smca has no effect on --model deformable_detr"]),
        (TINY_DEFORMABLE, "--multiscale", ["--multiscale"]),
        (TINY_DEFORMABLE, "--aligner --sam_points 1", ["--sam_points has no effect on --model deformable_detr"]),
        (TINY, "--no_aligner", ["--smca", "--sam_resample off"]),
        (TINY, "--num_feature_levels 3", ["--num_feature_levels has no effect on --model sam_detr"]),
        (TINY, "--two_stage --with_box_refine", ["--two_stage has no effect on --model sam_detr"]),
    ],
)
def test_bad_input(network, flags, expected, shapes, tmp_path, capsys):
    output = tmp_path / "output"
    assert call_main(shapes, *shlex.split(flags), "--output_dir", str(output), network=network) == 2
    line = error_line(capsys.readouterr().err)
    for part in expected:
        assert part in line
    assert not output.exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--model sam_detr", "--model sam_detr does not fit the checkpoint, a deformable_detr"),
        ("--num_feature_levels 2", "does not fit the network: missing "),
        ("--smca", "--smca has no effect on --model deformable_detr"),
    ],
)
def test_flags_that_contradict_the_checkpoint(flags, expected, trained_two_stage, shapes, capsys):
    checkpoint = str(trained_two_stage / "checkpoint.pth")
    assert call_main(shapes, "--eval", "--resume", checkpoint, *shlex.split(flags), network=[]) == 2
    assert expected in error_line(capsys.readouterr().err)


def test_hub_entry_points(tmp_path):
    """All five build; one loads an official file, and refuses that of another model."""
    entries = [name for name in vars(hubconf) if name.startswith("deformable")]
    assert len(entries) == 5
    load = partial(torch.hub.load, str(REPOSITORY), source="local")
    detectors = {name: load(name, num_classes=7) for name in entries}
    assert not any(detector.training for detector in detectors.values())
    state = detectors["deformable_detr_r50_refine"].state_dict()
    torch.save({"model": to_official(state), "args": argparse.Namespace(lr=1)}, tmp_path / "official.pth")
    again = load("deformable_detr_r50_refine", checkpoint=str(tmp_path / "official.pth")).state_dict()
    torch.testing.assert_close(again, state, rtol=0, atol=0)
    with pytest.raises(ValueError, match="missing"):
        load("deformable_detr_r50_refine_two_stage", checkpoint=str(tmp_path / "official.pth"))


# ---- The Semantics Aligner in front of the cross-attention


def test_which_networks_have_an_aligner(capsys):
    """--aligner and --no_aligner say the same as --sam_resample, which alone is kept."""
    cases = {
        "--model sam_detr": "points",
        "--model sam_detr --no_aligner": "off",
        "--model sam_detr --sam_resample off --aligner": "points",
        "--model sam_detr --aligner --sam_resample off": "points",
        "--model sam_detr --aligner --sam_resample average": "average",
        "--model deformable_detr": "off",
        "--model deformable_detr --aligner": "points",
        "--aligner --model deformable_detr --sam_resample maximum": "maximum",
    }
    for flags, resample in cases.items():
        words = [*flags.split(), "--backbone", "resnet18"]
        assert settings(words).family.sam_resample == resample, flags
        with torch.device("meta"):
            layers = from_flags(words)[0].decoder.layers
        assert [layer.aligner is not None for layer in layers] == [resample != "off"] * 6, flags
    with pytest.raises(SystemExit):
        settings(["--aligner", "--no_aligner"])
    assert "not allowed with" in capsys.readouterr().err


def watch(detector) -> list[dict]:
    """What goes into and comes out of each layer's aligner, and the reference that its cross-attention gets."""
    seen = [{} for _ in detector.decoder.layers]
    for layer, own in zip(detector.decoder.layers, seen):

        def see_aligner(module, inputs, output, own=own):
            own.update(
                boxes=inputs[1], features=inputs[2], points=output.points, query=output.content + output.position
            )

        def see_attention(module, inputs, own=own):
            own.update(where=inputs[0], reference=inputs[1])

        layer.aligner.register_forward_hook(see_aligner)
        layer.cross_attention.register_forward_pre_hook(see_attention)
    return seen


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_an_aligner_makes_query_and_reference(flags):
    """Resampled content and position become the query, the salient point in the query's latest box its reference."""
    detector, _ = build(f"{flags} --aligner --dec_layers 4")
    seen = watch(detector)
    batch = pad_images([image(64, 128), image(64, 64)])  # half of every level
    outputs = detector(batch)
    levels = detector.encoder(detector.projection(detector.backbone(batch.images), batch.padding))
    given = detector.decoder.queries(levels).reference
    if given.shape[-1] == 2:  # the first layer looks into the box that its head makes of the content
        offset = detector.decoder.box_heads[0](detector.decoder.queries(levels).content)
        first = (offset + F.pad((given / (1 - given)).log(), (0, 2))).sigmoid()
    else:
        first = given
    boxes = [first, *(layer["pred_boxes"] for layer in outputs["aux_outputs"])]
    coarse_to_fine = {1: [0, 0, 0, 0], 3: [2, 2, 1, 0]}[len(levels)]
    ratios = torch.tensor([[1, 1], [0.5, 1]])
    for index, (own, wanted, level) in enumerate(zip(seen, boxes, coarse_to_fine)):
        torch.testing.assert_close(own["boxes"], wanted)
        assert not own["boxes"].requires_grad
        torch.testing.assert_close(own["features"], levels[level].features)
        assert torch.equal(own["where"], own["query"].squeeze(2))
        reach = (own["points"].squeeze(2) - own["boxes"][..., :2]).abs() / own["boxes"][..., 2:]
        assert reach.max() <= 0.5 + 1e-9
        reference = own["reference"]  # (B, Q, levels, 2 or 4), relative to the padded map
        point = own["points"] * ratios[:, None, None]
        torch.testing.assert_close(reference[..., :2], point.expand(-1, -1, len(levels), -1))
        has_size = "two_stage" in flags or ("refine" in flags and index > 0)
        assert reference.shape[-1] == (4 if has_size else 2)
        if has_size:
            size = wanted[:, :, None, 2:] * ratios[:, None, None]
            torch.testing.assert_close(reference[..., 2:], size.expand(-1, -1, len(levels), -1))


ALIGNED = {
    **{f"deformable, {name}": [*TINY_DEFORMABLE, *flags.split()] for name, flags in VARIANTS.items()},
    "unaligned baseline": [flag for flag in TINY if flag != "--smca"] + ["--sam_resample", "off"],
}


@pytest.mark.parametrize("network", ALIGNED.values(), ids=ALIGNED)
def test_aligned_networks_train(network):
    """A few steps lower the loss, and every parameter of the aligners has a gradient."""
    detector, criterion, _ = from_flags([*network, "--backbone_norm", "frozen", "--dropout", "0", "--aligner"])
    losses = train(detector.double(), criterion, steps=10)
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < 0.97 * losses[0]
    aligners = [p for name, p in detector.named_parameters() if ".aligner." in name]
    assert len(aligners) == 2 * (2 * 4 + 2 + 4)  # layers; point head, reducing convolution, gates
    assert all(p.grad.abs().max() > 0 for p in aligners)


def test_aligned_checkpoint(shapes, tmp_path):
    """Evaluation and drawing, salient points included, rebuild it; --no_aligner does not fit it."""
    output = tmp_path / "output"
    run_main(shapes, "--aligner", "--epochs", "1", "--output_dir", str(output), network=TWO_STAGE)
    settings = read_json(output / "settings.json")
    assert settings["sam_resample"] == "points"
    assert "aligner" not in settings
    checkpoint = str(output / "checkpoint.pth")
    figures, _ = evaluate(shapes, checkpoint, tmp_path / "eval")
    assert figures == read_log(output)[-1]["test_coco_eval_bbox"]
    assert call_main(shapes, "--eval", "--resume", checkpoint, "--no_aligner", network=[]) == 2
    flags = ["--resume", checkpoint, "--images", str(shapes / "val2017"), "--output", str(tmp_path / "drawn")]
    assert demo.main([*flags, "--threshold", "0", "--limit", "1", "--device", "cpu", "--salient_points"]) == 0
    assert len([*(tmp_path / "drawn").glob("det_res_points_*")]) == 1
