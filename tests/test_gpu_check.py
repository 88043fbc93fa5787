"""The check of a GPU: report and table of costs from a made-up result; what is done stays; the whole on a CPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import REPOSITORY

from benchmarks import gpu_check, gpu_report


def made_up() -> dict:
    """R50 at 4 images: 118,287 images at 32.9 a second are 0.999 hours an epoch."""

    def row(mode: str, speed: float) -> dict:
        task = {"images_s": speed, "peak_mib": 4321.4}
        hours = {str(n): n * 118_287 / speed / 3600 for n in (12, 50)}
        share = {"forward": 0.25, "backward": 0.75}
        return {
            "config": "R50_SMCA",
            "mode": mode,
            "batch": 4,
            "train": task,
            "evaluate": task,
            "hours": hours,
            "share": share,
        }

    broken = {"config": "SAP_R50", "mode": "bf16 + compile", "batch": 4, "error": "OutOfMemoryError: no | room"}
    ops = {"a": {"ok": True, "text": "error 1e-7"}, "b": {"ok": False, "text": "error 1"}}
    times = {"device_ms": 0.5, "clock_ms": 0.75}
    operator = {"shape": "encoder", "dtype": "bfloat16", "path": "compiled", "forward": times, "both": times}
    return {
        "environment": {"device": "cuda", "name": "Made-up GPU"},
        "parts": {
            "ops": {"checks": ops, "seconds": 3},
            "parity": {"error": "took more than 240 s", "seconds": 240},
            "speed": {
                "operators": [operator],
                "models": [row("plain float32", 10.0), row("bf16 + compile", 32.9), broken],
                "seconds": 500,
            },
        },
    }


def test_the_report(tmp_path):
    gpu_report.write_all(tmp_path, made_up())
    lines = (tmp_path / "report.md").read_text().splitlines()
    for line in (
        "| ops | 1 faults in 3 s; the first: b: error 1 |",
        "| parity | 1 faults in 240 s; the first: took more than 240 s |",
        "| b | FAILED | error 1 |",
        "| encoder | bfloat16 | compiled | 0.500 (0.750) | 0.500 (0.750) |",
        "| R50_SMCA, batch 4 | bf16 + compile | 32.9 (3.29x) | 32.9 (3.29x) | 4321 | 12.0 | "
        "forward 25%, backward 75% |",
        r"| SAP_R50, batch 4 | bf16 + compile | OutOfMemoryError: no \| room |  |  |  |  |",
    ):
        assert line in lines
    assert json.loads((tmp_path / "report.json").read_text())["parts"] == made_up()["parts"]


def test_the_table_of_costs(tmp_path, monkeypatch, capsys):
    """Without a report the page says so; from one, the rows that were measured are filled, and nothing else changes."""
    text = (REPOSITORY / "docs/published.md").read_text()
    before, rest = text.split(gpu_report.MARKS[0])
    assert rest.split(gpu_report.MARKS[1])[0] == gpu_report.cost(None)
    page, report = tmp_path / "published.md", tmp_path / "report.json"
    page.write_text(text)
    monkeypatch.setattr(gpu_report, "PAGE", page)
    report.write_text(json.dumps(made_up()))
    assert gpu_report.main([str(report)]) == 0
    new = page.read_text()
    assert "| SAM-DETR R50 + SMCA | 12 | 50 | 32.9 | 4321 MiB, batch 4 |" in new
    unknown = " | ".join(4 * ["not yet measured"])
    assert f"| SAP-DETR R50 | {unknown} |" in new
    assert (new.split(gpu_report.MARKS[0])[0], new.split(gpu_report.MARKS[1])[1]) == (
        before,
        text.split(gpu_report.MARKS[1])[1],
    )
    on_cpu = made_up()
    on_cpu["environment"]["device"] = "cpu"
    for wrong, reason in ((on_cpu, "without a GPU says nothing"), ([], "no report of"), ({"a": 1}, "no report of")):
        report.write_text(json.dumps(wrong))
        assert gpu_report.main([str(report)]) == 2
        assert reason in capsys.readouterr().err
    assert gpu_report.main([str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err.endswith("none.json: No such file or directory; scripts/gpu_check.sh writes one\n")
    assert page.read_text() == new


def _runs(stat: Path) -> bool:
    """Whether a process is there and is no zombie."""
    try:
        return stat.read_text().split(") ")[1][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_is_done_stays_and_what_failed_is_repeated(tmp_path, monkeypatch, capsys):
    """Of another machine, or broken, it is not done. A part that hangs is ended with what it started."""
    calls, about = [], {"device": "cpu", "name": "here"}

    def run(name: str, out, about: dict) -> dict:
        calls.append(name)
        result = {"checks": {}, "environment": about, "seconds": 1}
        if name == "step" and len(calls) == 3:
            return {"error": "exit status 1: made up", "environment": about, "seconds": 1}
        (out / "parts" / f"{name}.json").write_text(json.dumps(result))
        return result

    real = gpu_check.run_part
    monkeypatch.setattr(gpu_check, "run_part", run)
    monkeypatch.setattr(gpu_check, "environment", lambda device: about)
    assert gpu_check.main([str(tmp_path)]) == 1
    assert "step: 1 faults in 1 s; the first: exit status 1: made up" in capsys.readouterr().out
    assert gpu_check.main([str(tmp_path)]) == 0
    (tmp_path / "parts" / "ops.json").write_text('{"environment"')
    assert gpu_check.main([str(tmp_path), "--part", "resume"]) == 0
    assert calls == [*gpu_check.LIMITS, "step", "resume"]
    rest = [name for name in gpu_check.LIMITS if name != "ops"]
    assert list(json.loads((tmp_path / "report.json").read_text())["parts"]) == rest
    about["name"] = "elsewhere"
    assert gpu_check.main([str(tmp_path)]) == 0
    assert calls[-len(gpu_check.LIMITS) :] == list(gpu_check.LIMITS)
    script = tmp_path / "hangs.sh"
    script.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {tmp_path}/child\nwait\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setitem(gpu_check.LIMITS, "ops", 3)
    assert real("ops", tmp_path, about)["error"] == "took more than 3 s"
    child = Path("/proc", (tmp_path / "child").read_text().strip(), "stat")
    until = time.monotonic() + 20
    while _runs(child):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert not (tmp_path / "parts" / "ops.json").exists()
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main([str(script / "below")])
    assert "name another folder" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in full on a GPU")
def test_the_whole_check_small_on_a_cpu(tmp_path):
    command = ["bash", str(REPOSITORY / "scripts/gpu_check.sh"), str(tmp_path / "a b")]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "a b" / "report.json").read_text())
    assert list(report["parts"]) == list(gpu_check.LIMITS)
    assert "shows that the check runs, and nothing about a GPU" in (tmp_path / "a b" / "report.md").read_text()
