"""`--preset`, `--scale_lr`, and the warning about a learning rate of other numbers of images a step."""

import re
import shlex

import pytest
import torch
from helpers import REPOSITORY, call_program, from_flags, settings

from samdetr.models.build import FAMILIES
from samdetr.training import learning_rate
from samdetr.training.presets import PRESETS

RECIPES = sorted(
    path for path in (REPOSITORY / "scripts").glob("*.sh") if "source scripts/nodes.sh" in path.read_text()
)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_no_warning_for_recipes(path):
    """With the batch of one of several nodes as on one."""
    text = path.read_text()
    images = int((re.search(r"^images=(\d+)", text, re.MULTILINE) or [0, "32"])[1])
    flags = re.search(r"main\.py(.*?)--coco_path", text, re.DOTALL)[1].replace("\\\n", " ").replace('"$batch"', "1")
    assert learning_rate.warning(settings(flags), images) is None
    assert learning_rate.warning(settings(flags), images // 2) is not None


@pytest.mark.parametrize(
    ("flags", "processes", "rates"),
    [
        ("--batch_size 2", 1, (1.25e-5, 1.25e-6)),
        ("--batch_size 2 --accumulate 8", 1, None),
        ("--batch_size 4 --accumulate 2", 4, (2e-4, 2e-5)),
        ("-m deformable_detr --batch_size 4", 2, (5e-5, 5e-6)),
        ("--batch_size 2 --lr 2e-5", 1, None),  # chosen for this run
        ("--preset tiny --batch_size 1", 1, (1e-4, 1e-4)),
        ("--preset tiny --batch_size 1 --lr 2e-4", 1, None),
        ("--preset small", 1, None),
    ],
)
def test_the_rate_in_the_warning_is_that_of_scale_lr_and_silences_it(flags, processes, rates):
    found = settings(flags)
    line = learning_rate.warning(found, processes)
    assert (line is None) == (rates is None)
    if line is None:
        return
    how = learning_rate.scaled(found, processes).optimisation
    assert (how.lr, how.lr_backbone) == pytest.approx(rates)
    assert "\n" not in line
    named = [float(number) for number in re.search(r"pass `lr` (\S+) and `lr_backbone` (\S+)", line).groups()]
    assert named == pytest.approx(rates)
    assert learning_rate.warning(settings([*shlex.split(flags), "--lr", f"{named[0]:g}"]), processes) is None


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "none"])
@pytest.mark.parametrize("model", FAMILIES)
def test_presets_build_every_family_and_typed_flags_win(model, preset):
    flags = f"-m {model} --preset {preset} --nheads 8"
    assert settings(flags).trunk.nheads == 8
    assert settings(flags).optimisation.lr == 4e-4
    assert sum(weight.numel() for weight in from_flags(flags)[0].parameters()) < 6e6


def test_a_preset_leaves_the_network_of_a_checkpoint_alone(shapes, trained, tmp_path, capsys):
    """Resumed, evaluated, or of an official file that does not say what it is."""
    checkpoint, output = str(trained / "checkpoint.pth"), tmp_path / "more"
    data = ["--coco_path", str(shapes), "--device", "cpu", "--num_workers", "0"]
    small = ["--preset", "tiny", "--train_sizes", "64", "--batch_size", "2", "--scale_lr", "--epochs", "3"]
    assert call_program(*data, "--resume", checkpoint, "--output_dir", str(output), *small) == 0
    shown = capsys.readouterr().out
    saved = torch.load(output / "checkpoint.pth", weights_only=True)["settings"]
    assert (saved["hidden_dim"], saved["eval_size"], saved["lr_schedule"]) == (32, 64, "onecycle")
    assert saved["lr"] == pytest.approx(4e-4 * 2 / 4)
    row = next(line for line in shown.splitlines() if line.startswith("preset"))
    assert "--lr_schedule onecycle" in row
    assert "--hidden_dim" not in row
    assert "--batch_size" not in row
    assert "--lr 0.0002" in shown
    assert call_program(*data, "--resume", checkpoint, "--eval", "--preset", "tiny") == 0
    assert "note: --preset has no effect with --eval" in capsys.readouterr().out
    official = settings("--preset tiny").with_checkpoint({"model": "sam_detr", "num_classes": 91}, {"preset": "tiny"})
    assert (official.trunk.backbone, official.data.eval_size, official.optimisation.lr) == ("resnet50", 800, 4e-4)


def test_an_unknown_preset_is_refused(shapes, capsys):
    with pytest.raises(SystemExit) as ended:
        call_program("--coco_path", str(shapes), "--preset", "huge")
    assert ended.value.code == 2
    assert "small, tiny" in capsys.readouterr().err.replace("'", "")
