"""What a run shows: a block at the start, a line per epoch, 12 metrics at the end, notes on flags without effect."""

import re
import shlex
import subprocess

import pytest
from helpers import REPOSITORY, call_program, command, read_log, run_main

from samdetr.cli import parse
from samdetr.training.console import notes


def notes_of(words: list[str]) -> list[str]:
    found = parse(words)
    return [found.with_flags(line) for line in notes(found.settings, found.given)]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--raw_weights", ["--raw_weights has no effect without --eval or --pretrained"]),
        (
            "--keep 3 --save_every_minutes 5",
            [f"--{n} has no effect without --output_dir" for n in ("keep", "save_every_minutes")],
        ),
        ("--lr_schedule cosine --lr_drop 3", ["--lr_drop has no effect with --lr_schedule cosine"]),
        (
            "--resume x.pth --backbone_weights none",
            ["--backbone_weights has no effect with --resume, whose file has them"],
        ),
        ("--resume x.pth --eval --patience 3", ["--patience has no effect with --eval"]),
        ("--resume auto --output_dir o --backbone_weights none", []),  # if there is no checkpoint yet, it has
        ("--keep 3 --output_dir o --lr_drop 3", []),
    ],
)
def test_flags_without_effect(flags, expected):
    assert notes_of(shlex.split(flags)) == [f"note: {text}" for text in expected]


@pytest.mark.parametrize("script", sorted(path.name for path in (REPOSITORY / "scripts").glob("*r*_*.sh")))
def test_published_command_lines_are_silent(script):
    printed = subprocess.run(
        ["bash", str(REPOSITORY / "scripts" / script)], env={"PATH": "/usr/bin:/bin", "DRY_RUN": "1", "LAUNCH": "run"},
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert notes_of(printed[printed.index("main.py") + 1 :]) == []


def test_start_and_epochs(shapes, forks, tmp_path):
    output = tmp_path / "output"
    flags = ["--epochs", "2", "--eval_every_epoch", "2", "--accumulate", "2", "--output_dir", str(output)]
    assert forks.main(command(shapes, *flags)[1:], tmp_path / "printed") == [0], forks.err()
    printed = forks.out()
    assert printed.startswith(
        f"data     {shapes}: 16 images to train on, 7 images to evaluate on\n"
        "classes  4: ellipse, triangle, rectangle, star\n"
        "model    sam_detr, resnet18, 10 queries, 2,900,076 trainable parameters\n"
        "weights  random; backbone: none\n"
        f"output   {output}\n"
        "device   1 process(es) on cpu\n"
        "epochs   0 to 1, each of 2 steps of 8 images (1 x 4 x 2)\n"
    )
    first, second = read_log(output)
    lines = re.findall(r"^epoch \d: loss .*", printed, re.MULTILINE)
    terms = [
        ", ".join(f"{n} {line[f'train_loss_{n}']:.4g}" for n in ("ce", "bbox", "giou")) for line in (first, second)
    ]
    assert re.fullmatch(
        rf"epoch 0: loss {first['train_loss']:.4g} \({re.escape(terms[0])}\), about 0:\d\d:\d\d left", lines[0]
    )
    ap, ap50 = second["test_coco_eval_bbox"][:2]
    assert lines[1] == (
        f"epoch 1: loss {second['train_loss']:.4g} ({terms[1]}), AP {ap:.4f}, AP50 {ap50:.4f}, "
        f"best {ap:.4f} of epoch 1 in {output}/checkpoint_best.pth"
    )
    assert printed.count("Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all") == 1  # at the end
    assert printed.index("Average Precision") > printed.index("epoch 1: loss")


def test_tables_of_every_evaluation(shapes, capsys):
    run_main(shapes, "--epochs", "2", "--verbose", "--ema", "0.9")
    out = capsys.readouterr().out
    assert out.count("Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all") == 4
    assert out.count("and with averaged weights:") == 2
    assert out.index("Average Precision") < out.index("epoch 0: loss")
    assert "output   nowhere: nothing will be kept; pass --output_dir FOLDER\n" in out


def test_evaluation_shows_its_table(trained, shapes, capsys):
    words = ["--coco_path", str(shapes), "--device", "cpu", "--num_workers", "0", "--eval"]
    assert call_program(*words, "--resume", str(trained / "checkpoint.pth")) == 0
    out = capsys.readouterr().out
    assert f"weights  {trained}/checkpoint.pth\n" in out
    assert "nothing will be kept" not in out
    assert out.count("Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all") == 1
