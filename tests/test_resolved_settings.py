"""Command lines and checkpoints give the settings that they gave before the settings became dataclasses.

resolved_settings.json.gz was recorded at commit 1cccaad: for each family all settings that it has by default; for each
command line (recipes, the tests' networks, benchmarks, parity figures) and each checkpoint what differs from them.
"""

import argparse
import gzip
import json
from pathlib import Path

import pytest
import torch
from parity import cases

from samdetr.cli import parse
from samdetr.models.build import FAMILIES
from samdetr.models.checkpoints import read_checkpoint

RECORDED = json.loads(gzip.decompress(Path(__file__).with_name("resolved_settings.json.gz").read_bytes()))
# Settings that came later, with their defaults, and defaults that were changed on purpose.
ADDED: dict[str, object] = {"allow_outside": False, "plugin": "", "overwrite": False, "verbose": False}
ADDED |= {"data_format": "auto", "train_images": "", "train_annotations": "", "val_images": "", "val_annotations": ""}
ADDED |= {"val_fraction": 0.0, "split": "val", "size_buckets": 0, "ops": "auto", "cuda_graphs": False}
ADDED |= {"pretrained": "", "freeze": [], "set_cost_alpha": 0.25, "allow_nonfinite": False, "allow_http": False}
ADDED |= {"detections": "", "annotations": "", "track": [], "compare": ""}
ADDED |= {"preset": "none", "scale_lr": False, "overfit": 0}
ADDED |= {"denoising": 0, "denoising_box_noise": 0.4, "denoising_label_noise": 0.2, "contrastive": False}
ADDED |= {"class_loss": "focal", "class_cost": "focal", "relation": False}
OF_FAMILY: dict[str, dict[str, object]] = {"sap_detr": {"set_cost_alpha": None}}
# Users' runs keep the last checkpoints and the best; recipes pass `--keep -1`, all epochs, as published.
CHANGED: dict[str, object] = {"keep": 1}


def resolved(argv: list[str]) -> dict:
    """What a command line says, flat. Raises ValueError for flags that only another family has."""
    command = parse(argv)
    command.settings.check_family(command.given)
    return command.settings.flat()


def resolved_with(argv: list[str], checkpoint: Path) -> dict:
    """The same with a checkpoint that it resumes, which decides on the network."""
    command = parse(argv)
    return command.settings.with_checkpoint(read_checkpoint(str(checkpoint))["settings"], command.given).flat()


def convert_official(family: str, state: dict) -> dict:
    return FAMILIES[family].convert_official(state)


def write_checkpoint(family: str, variant: str, kind: str, path: Path) -> Path:
    """A file with the names and shapes of a parity figure's model.

    `kind`: official with the flags that it was made with, official without any, ours with these flags.
    """
    facts, _ = cases.read_figures(variant, family=family)
    # One number a tensor: views are saved with what they are views of.
    state = {name: torch.zeros(()).expand(shape) for name, shape in facts["state_dict"].items()}
    content = {"model": state, "optimizer": {}, "lr_scheduler": {}, "epoch": 0}
    saved = RECORDED["families"][family] | RECORDED["commands"][f"parity {family} {variant}"]["differs"]
    if kind == "official":
        content["args"] = argparse.Namespace(**{name: saved[name] for name in RECORDED["official_flags"][family]})
    elif kind == "ours":
        content = {"model": convert_official(family, state), "settings": saved}
    torch.save(content, path)
    return path


def expected(recorded: dict) -> dict:
    return (
        RECORDED["families"][recorded["family"]]
        | CHANGED
        | recorded["differs"]
        | ADDED
        | OF_FAMILY.get(recorded["family"], {})
    )


def assert_same(found: dict, wanted: dict) -> None:
    """Types, too: 1, 1.0 and True are not the same in a checkpoint."""
    found = json.loads(json.dumps(found))
    assert {name: repr(value) for name, value in found.items()} == {name: repr(v) for name, v in wanted.items()}


@pytest.mark.parametrize("name", RECORDED["commands"])
def test_command_line(name):
    recorded = RECORDED["commands"][name]
    assert_same(resolved(recorded["argv"]), expected(recorded))


@pytest.mark.parametrize("name", RECORDED["checkpoints"])
def test_checkpoint(name, tmp_path):
    recorded = RECORDED["checkpoints"][name]
    path = write_checkpoint(*recorded["file"], tmp_path / "checkpoint.pth")
    assert_same(resolved_with(recorded["argv"], path), expected(recorded))
