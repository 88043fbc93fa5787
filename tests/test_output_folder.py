"""A run's output folder: whose files are in it, who writes into it, what stays, what it was made with."""

import hashlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    REPOSITORY,
    TINY,
    call_main,
    call_program,
    command,
    environment,
    error_line,
    read_json,
    read_log,
    run_main,
)
from test_two_processes import TORCHRUN

from samdetr.training.cluster.folder_lock import FolderLock

FAST = ["--epochs", "1", "--backbone_level", "3"]


@pytest.fixture
def finished(shapes, tmp_path) -> Path:
    """The folder of a run of one epoch."""
    run_main(shapes, *FAST, "--output_dir", str(tmp_path / "output"))
    return tmp_path / "output"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("elsewhere", [False, True], ids=["fresh", "from a file elsewhere"])
def test_another_runs_files_are_not_touched(elsewhere, finished, trained, shapes, capsys):
    before = contents(finished)
    flags = ["--resume", str(trained / "checkpoint.pth"), "--epochs", "3"] if elsewhere else FAST
    network = [] if elsewhere else TINY
    assert call_main(shapes, *flags, "--output_dir", str(finished), network=network) == 2
    line = error_line(capsys.readouterr().err)
    for part in (f"--output_dir {finished} holds a run (checkpoint.pth,", "--resume auto", "--overwrite"):
        assert part in line
    assert contents(finished) == before


def test_overwrite_moves_them_to_a_subfolder(finished, shapes, capsys):
    before = contents(finished)
    (finished / "mine.txt").write_text("stays")
    run_main(shapes, *FAST, "--seed", "1", "--output_dir", str(finished), "--overwrite")
    (aside,) = [path for path in finished.iterdir() if path.is_dir()]
    assert aside.name.startswith("replaced-20")
    assert contents(aside) == before
    assert f"the files of the run in {finished} are now in {aside}" in capsys.readouterr().out
    after = contents(finished)
    assert after.pop("mine.txt") == b"stays"
    assert after.keys() == before.keys()
    assert after["log.txt"] != before["log.txt"]
    assert len(read_log(finished)) == 1


def test_overwrite_contradicts_continuing(finished, shapes, capsys):
    before = contents(finished)
    assert call_main(shapes, *FAST, "--output_dir", str(finished), "--overwrite", "--resume", "auto") == 2
    assert "--overwrite starts anew, --resume auto continues" in error_line(capsys.readouterr().err)
    assert contents(finished) == before


def test_a_run_continues_from_a_file_of_its_folder(finished, shapes):
    checkpoint = str(finished / "checkpoint0000.pth")
    run_main(shapes, *FAST, "--epochs", "2", "--resume", checkpoint, "--output_dir", str(finished))
    assert [line["epoch"] for line in read_log(finished)] == [0, 1]


def wait_for(text: str, process: subprocess.Popen) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} was not printed")


def test_two_runs_in_one_folder(shapes, tmp_path, capsys):
    """The second is refused while the first runs, and not after the first was killed, with workers that live on."""
    output = tmp_path / "output"
    flags = [*FAST, "--epochs", "999", "--num_workers", "1", "--output_dir", str(output)]
    first = subprocess.Popen(
        [sys.executable, "-u", *command(shapes, *flags)], env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        wait_for("epoch 1: ", first)  # the log has a line by then
        for more in ([], ["--resume", "auto"], ["--overwrite"]):
            assert call_main(shapes, *FAST, "--output_dir", str(output), *more) == 2
            line = error_line(capsys.readouterr().err)
            holder = f"process {first.pid} on {socket.gethostname()} since 20"
            assert f"another run is writing into --output_dir {output} ({holder}" in line
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    epochs = str(len(read_log(output)) + 2)
    run_main(shapes, *FAST, "--output_dir", str(output), "--resume", "auto", "--epochs", epochs)
    assert not (output / ".lock").exists()


def test_lock_on_a_file_where_folders_have_none(tmp_path, monkeypatch):
    """As on NFS, where an exclusive lock needs a file that is open for writing."""
    real = os.open
    refused = []

    def flock(descriptor, operation, flock=FolderLock._lock.__globals__["fcntl"].flock):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            refused.append(descriptor)
            raise OSError(9, "Bad file descriptor")
        return flock(descriptor, operation)

    monkeypatch.setattr("samdetr.training.cluster.folder_lock.fcntl.flock", flock)
    with FolderLock(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / ".lock").exists()
        with pytest.raises(ValueError, match="another run is writing"), FolderLock(tmp_path / "a" / "b"):
            pass
    assert refused
    assert os.open is real
    with FolderLock(tmp_path / "a" / "b"):
        pass


def test_nothing_is_left_of_a_folder_that_stays_empty(tmp_path):
    with FolderLock(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a").exists()


def test_last_and_best_are_kept(shapes, tmp_path):
    """And the one before the last, for a last one that is damaged."""
    run_main(shapes, *FAST, "--epochs", "4", "--eval_every_epoch", "4", "--output_dir", str(tmp_path / "own"))
    kept = sorted(path.name for path in (tmp_path / "own").glob("*.pth"))
    assert kept == ["checkpoint.pth", "checkpoint0002.pth", "checkpoint0003.pth", "checkpoint_best.pth"]
    flags = [*FAST, "--epochs", "3", "--eval_every_epoch", "3", "--keep", "-1"]
    run_main(shapes, *flags, "--output_dir", str(tmp_path / "all"))
    assert len(list((tmp_path / "all").glob("checkpoint00*.pth"))) == 3


def test_settings_say_what_the_run_was_made_with(shapes, tmp_path, monkeypatch):
    words = command(shapes, *FAST, "--output_dir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", words)
    assert call_program(*words[1:]) == 0
    about = read_json(tmp_path / "settings.json")["about"]
    assert about["command"] == shlex.join(["main.py", *words[1:]])
    assert about["versions"]["torch"] == torch.__version__
    assert about["device"].startswith("cpu, ")
    files = sorted((shapes / "annotations").iterdir())
    assert about["annotations_sha256"] == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    git = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    assert about["commit"] == (head or None)
    assert about["changed"] in ((True, False) if head else (None,))


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_repeats_the_figures_of_training(processes, shapes, forks, tmp_path):
    """To the bit, without a word about the batch: figures depend on how images are padded and rounded together."""
    output = tmp_path / "output"
    flags = [
        "--batch_size",
        "3",
        "--pad_to_multiple",
        "48",
        "--amp",
        "bf16",
        "--lr",
        "1e-3",
        "--output_dir",
        str(output),
    ]
    words = command(shapes, "--epochs", "1", *flags)[1:]
    assert forks.main(words, tmp_path / "printed", ranks=processes) == [0] * processes, forks.err()
    fixed = ["--coco_path", str(shapes), "--device", "cpu", "--num_workers", "0", "--eval"]
    fixed += ["--resume", str(output / "checkpoint.pth")]
    found = {}
    for name, more in {"same": [], "others": ["--pad_to_multiple", "1"]}.items():
        assert call_program(*fixed, "--output_dir", str(tmp_path / name), *more) == 0
        found[name] = read_json(tmp_path / name / "eval.json")["coco_eval_bbox"]
    wanted = read_log(output)[0]["test_coco_eval_bbox"]
    assert found["same"] == wanted
    assert found["others"] != wanted
    assert wanted[8] > 0  # AR100


def test_interrupted_before_training_and_without_a_folder(shapes):
    """Ctrl-C while Python still imports, and in training that keeps nothing: no traceback, no checkpoint."""
    flags = [*FAST, "--epochs", "999"]
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", *command(shapes, *flags)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.endswith(" torch.types\n") or "torch." in line:
            break
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait() == -signal.SIGINT
    assert "Traceback" not in rest
    process = subprocess.Popen(
        [sys.executable, "-u", *command(shapes, *flags, "--num_workers", "1")],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for("epoch 0: ", process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the workers too
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out.endswith("interrupted; nothing was saved\n")
    assert err == ""


@pytest.mark.slow  # test_long_runs.py interrupts two processes without the launcher
def test_interrupted_under_torchrun(shapes, tmp_path):
    """A terminal interrupts torchrun and the processes, and torchrun the processes once more. It shows a traceback of
    itself; none is ours."""
    output = tmp_path / "output"
    flags = [*FAST, "--epochs", "999", "--batch_size", "2", "--num_workers", "1", "--output_dir", str(output)]
    process = subprocess.Popen(
        [sys.executable, "-u", *TORCHRUN, *command(shapes, *flags)],
        env=environment(PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for("epochs ", process)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "--resume auto resumes" in out
    assert "main.py" not in err
    assert (output / "checkpoint.pth").exists() or "if any" in out
