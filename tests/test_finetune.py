"""--pretrained takes what fits of another detector, --freeze keeps it; what is taken is worked out from the files."""

import json

import pytest
import torch
from helpers import (
    OFFICIAL_TINY,
    TINY,
    TINY_DEFORMABLE,
    TINY_SAP,
    build_tiny,
    call_main,
    evaluate,
    from_flags,
    read_json,
    read_log,
    run_main,
    save,
    settings,
)  # fmt: skip

from samdetr.datasets.categories import COCO, Categories
from samdetr.training.finetune import Pretrained
from samdetr.training.run import freeze

ONE_STEP = ("--epochs", "1", "--lr", "0", "--lr_backbone", "0")


def classes(*names: str, first: int = 1) -> Categories:
    return Categories.from_annotations([{"id": i, "name": name} for i, name in enumerate(names, first)])


def donate(tmp_path, network, *flags, num_classes=6, names=None, **options):
    """A file of random weights; returns its path and state dict."""
    detector, values = build_tiny(*flags, network=network, num_classes=num_classes)
    path = tmp_path / "source.pth"
    save(detector, values, path, **options)
    if names:
        content = torch.load(path, weights_only=True)
        torch.save({**content, "categories": names.to_list()}, path)
    return path, detector.state_dict()


def start(path, categories, *typed):
    """The network that a run with these flags starts from, its state dict before and after taking weights."""
    given = settings([*typed]).flat() if typed else {}
    given = {name: given[name] for name in (word.removeprefix("--") for word in typed) if name in given}
    pretrained = Pretrained.read(str(path))
    found = pretrained.applied(settings([*typed, "--backbone_weights", "none"]), given)
    found = found.replace(num_classes=categories.num_classes)
    torch.manual_seed(1)
    from samdetr.models.build import build_model

    network = build_model(found.trunk, found.family)[0]
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    whole = pretrained.load_into(network, categories)
    return before, network.state_dict(), whole


def test_the_same_classes_give_the_sources_figures(shapes, trained, tmp_path, capsys):
    source = trained / "checkpoint.pth"
    figures, detections = evaluate(shapes, source, tmp_path / "eval")
    output = tmp_path / "run"
    flags = ("--pretrained", str(source), "--output_dir", str(output), *ONE_STEP)
    run_main(shapes, *flags, "--freeze", "backbone", "--lr_schedule", "cosine", network=[])
    (line,) = read_log(output)
    assert line["epoch"] == 0
    # Its learned norms would follow the batches, were they not frozen with their scales.
    assert line["test_coco_eval_bbox"] == figures
    assert evaluate(shapes, output / "checkpoint.pth", tmp_path / "again")[1] == detections
    assert "left out" in capsys.readouterr().out
    saved = read_json(output / "settings.json")
    assert (saved["pretrained"], saved["hidden_dim"], saved["freeze"]) == (str(source), 32, ["backbone"])


def test_classes_of_the_same_name_keep_their_rows(own_shapes, trained, tmp_path):
    for split in ("train2017", "val2017"):
        file = own_shapes / "annotations" / f"instances_{split}.json"
        content = read_json(file)
        for category in content["categories"]:
            category["id"] += 3
            category["name"] = {"star": "Star ", "ellipse": "egg"}.get(category["name"], category["name"])
        for annotation in content["annotations"]:
            annotation["category_id"] += 3
        file.write_text(json.dumps(content))
    assert call_main(own_shapes, "--resume", str(trained / "checkpoint.pth"), network=[]) == 2
    run_main(own_shapes, "--pretrained", str(trained / "checkpoint.pth"), "--output_dir", str(tmp_path), *ONE_STEP,
             network=[])  # fmt: skip
    old, new = (torch.load(f / "checkpoint.pth", weights_only=True) for f in (trained, tmp_path))
    label = {row["name"]: row["label"] for row in old["categories"]}
    for row in new["categories"]:
        for part in ("weight", "bias"):
            name = f"decoder.class_heads.1.{part}"
            for other in label.values():
                same = torch.equal(new["model"][name][row["label"]], old["model"][name][other])
                assert same == (row["name"] != "egg" and label.get(row["name"].strip().lower()) == other)


def test_an_official_file_on_one_of_its_classes(tmp_path):
    path, theirs = donate(tmp_path, OFFICIAL_TINY, num_classes=91, official=True)
    before, after, whole = start(path, classes("Toothbrush", first=0))
    assert whole
    row = COCO.label_of[90]
    for name, weight in after.items():
        if "class_heads" in name:
            assert torch.equal(weight, theirs[name][[row]])
        else:
            assert torch.equal(weight, theirs[name]), name
    before, after, _ = start(path, classes("raccoon"))
    heads = [name for name in after if "class_heads" in name]
    assert len(heads) == 4
    assert all(torch.equal(after[name], before[name]) for name in heads)


@pytest.mark.parametrize(
    ("network", "heads"),
    [
        ([*TINY_DEFORMABLE, "--two_stage", "--with_box_refine"], ["queries.class_head", "class_heads.1"]),
        (TINY_SAP, ["class_heads.0.layers.2", "class_heads.1.layers.2", "class_heads.2.layers.2"]),
    ],
)
def test_heads_of_other_families(network, heads, tmp_path):
    # As many classes as the hidden layers of SAP-DETR's heads have units: only the last layer has rows of classes.
    names = classes(*(f"c{i}" for i in range(32)), first=0)
    path, theirs = donate(tmp_path, network, num_classes=32, names=names)
    before, after, _ = start(path, classes("new", "c7", first=0))
    for head in heads:
        for part in ("weight", "bias"):
            name = f"decoder.{head}.{part}"
            assert torch.equal(after[name][1], theirs[name][7])
            assert torch.equal(after[name][0], before[name][0])
    for name in after.keys() - {f"decoder.{head}.{part}" for head in heads for part in ("weight", "bias")}:
        if "class_heads.0" not in name:
            assert torch.equal(after[name], theirs[name]), name


def test_other_numbers_of_queries_layers_and_levels(tmp_path):
    path, theirs = donate(tmp_path, TINY, names=classes("a", "b", "c", "d", "e"))
    ours = classes("a", "b", "c", "d", "e")
    _, after, _ = start(path, ours, "--num_queries", "4", "--dec_layers", "1")
    assert torch.equal(after["decoder.reference_boxes"], theirs["decoder.reference_boxes"][[0, 3, 6, 9]])
    before, after, _ = start(path, ours, "--num_queries", "13", "--dec_layers", "3")
    assert torch.equal(after["decoder.reference_boxes"][:10], theirs["decoder.reference_boxes"])
    assert torch.equal(after["decoder.reference_boxes"][10:], before["decoder.reference_boxes"][10:])
    layer = "decoder.layers.{}.feed_forward.linear1.weight"
    assert torch.equal(after[layer.format(1)], theirs[layer.format(1)])
    assert torch.equal(after[layer.format(2)], before[layer.format(2)])
    before, after, whole = start(path, ours, "--dim_feedforward", "48", "--backbone_level", "5")
    assert not whole  # C5 is new
    assert torch.equal(after[layer.format(1)], before[layer.format(1)])
    norm = "encoder.layers.0.norm1.weight"
    assert torch.equal(after[norm], theirs[norm])

    path, theirs = donate(tmp_path, TINY_DEFORMABLE, names=ours)
    _, after, _ = start(path, ours, "--num_feature_levels", "4")
    assert torch.equal(after["projection.level_embedding"][:3], theirs["projection.level_embedding"])


def test_nothing_but_the_backbone(trained, tmp_path, capsys):
    source = trained / "checkpoint.pth"
    start(source, classes("a"), "--model", "sap_detr", "--hidden_dim", "48", "--nheads", "4")
    assert "nothing but the backbone fits" in capsys.readouterr().out
    with pytest.raises(ValueError, match="nothing fits this network"):
        start(source, classes("a"), "--model", "sap_detr", "--hidden_dim", "48", "--nheads", "4",
              "--backbone", "resnet34")  # fmt: skip


def test_backbone_weights_of_a_detector(trained):
    detector = from_flags([*TINY])[0]
    from samdetr.models.checkpoints import load_backbone_weights

    load_backbone_weights(detector, str(trained / "checkpoint.pth"))
    theirs = torch.load(trained / "checkpoint.pth", weights_only=True)["model"]
    ours = detector.state_dict()
    assert all(torch.equal(ours[n], w) for n, w in theirs.items() if n.startswith("backbone."))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--pretrained", "FILE", "--eval", "--resume", "FILE"], "--pretrained has no effect with --eval"),
        (["--pretrained", "FILE", "--resume", "FILE"], "--resume auto"),
        (["--pretrained", "missing.pth"], "--pretrained missing.pth: no such file"),
        (["--pretrained", "FILE", "--freeze", "encoder", "neck"], "--freeze neck"),
        (["--pretrained", "FILE", "--freeze", "backbone", "projection", "encoder", "decoder"], "nothing to train"),
    ],
)
def test_bad_input(flags, words, shapes, trained, capsys):
    flags = [str(trained / "checkpoint.pth") if word == "FILE" else word for word in flags]
    assert call_main(shapes, *flags, network=[]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_resume_auto_prefers_the_run_itself(shapes, trained, tmp_path, capsys):
    flags = ("--pretrained", str(trained / "checkpoint.pth"), "--resume", "auto", "--output_dir", str(tmp_path))
    run_main(shapes, *flags, "--epochs", "1", network=[])
    assert "numbers of weights" in capsys.readouterr().out
    run_main(shapes, *flags, "--epochs", "2", network=[])
    shown = capsys.readouterr().out
    assert "numbers of weights" not in shown
    assert "resuming from" in shown
    assert [line["epoch"] for line in read_log(tmp_path)] == [0, 1]


def test_frozen_modules_keep_their_values():
    network, _, _ = from_flags([*TINY])
    freeze(network, ["backbone", "decoder.box_heads"])
    trainable = {name for name, weight in network.named_parameters() if weight.requires_grad}
    assert not any(name.startswith(("backbone.", "decoder.box_heads.")) for name in trainable)
    assert any(name.startswith("decoder.class_heads.") for name in trainable)
    network.train()
    before = {name: value.clone() for name, value in network.backbone.state_dict().items()}
    with torch.no_grad():
        network.backbone(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(value, before[name]) for name, value in network.backbone.state_dict().items())
