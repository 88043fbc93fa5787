"""The programs that time data loading and evaluation run, and what they report is true of what they ran."""

import json
import os

import pytest
from helpers import run_process


def report(program, tmp_path, *flags: str) -> dict:
    result = run_process([f"benchmarks/{program}.py", *flags, "--rounds", "1", "--json", str(tmp_path / "report.json")])
    assert result.returncode == 0, result.stderr
    assert os.listdir(tmp_path) == ["report.json"]
    content = json.loads((tmp_path / "report.json").read_text())
    assert {"python", "torch", "device", "threads", "load", "load_after"} <= content.keys()
    for name in ("torch", "threads"):
        assert f"{name} {content[name]}" in result.stdout
    return content


def test_evaluator(tmp_path):
    content = report("evaluator", tmp_path, "--images", "60", "--detections", "30", "--categories", "7")
    assert content["largest_difference"] < 1e-9
    assert content["figures"]["ours"] == pytest.approx(content["figures"]["pycocotools"], abs=1e-9)
    assert all(0 < value < 1 for value in content["figures"]["ours"].values())
    median = content["median_s"]
    assert content["ratio"]["total"] == pytest.approx(median["pycocotools"]["total"] / median["ours"]["total"])


@pytest.mark.slow
def test_loader(tmp_path, shapes):
    content = report("loader", tmp_path, "--coco_path", str(shapes), "--images", "4", "--num_workers", "1")
    routes, loaders = content["routes"], content["loaders"]
    assert routes["PIL"]["ratio"] == 1
    assert routes["PIL"]["largest_difference"] == 0
    assert routes["tensor, uint8"]["largest_difference"] <= 2
    assert routes["tensor, uint8"]["share_different"] < 0.02 < routes["tensor, float"]["share_different"]
    for split in ("train", "val"):
        rows = loaders[split]
        assert rows["ours"]["ratio"] == pytest.approx(rows["ours"]["images_per_s"] / rows["PIL"]["images_per_s"])
