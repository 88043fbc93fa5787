"""Runs main.py in forks of a process that has imported it, and interrupts them at chosen places.

Reads jobs from stdin, one a line of JSON: {"argv": [...], "ranks": 1, "port": 0, "faults": [...], "folder": path}. A
fault is {"at": place, "number": n, "do": what, "rank": r}: in process r, when the place is passed for the n-th time.
The output of the processes goes to folder/0.out, folder/0.err, ... Answers with exit statuses, negative for a signal.
"""

import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import torch

if __name__ == "__main__":  # started by its path: find the packages from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from samdetr.datasets.coco import CocoDetection
from samdetr.datasets.coco_eval import CocoEvaluator
from samdetr.models.criterion import SetCriterion
from samdetr.training import checkpoints, loop
from samdetr.util import checkpoint

loop.plot_training_curves = lambda lines, path: path.write_text(str(len(lines)))  # which takes longer than a run
checkpoint.torch = SimpleNamespace(**vars(torch))  # so that its use alone can be disturbed
main = import_module("samdetr.main").main
REAL_SAVE, REAL_LINE = torch.save, checkpoints.append_json_line


def half_a_file(content, file):
    REAL_SAVE(content, file)
    file.truncate(file.tell() // 2)


def half_a_line(path, record):
    REAL_LINE(path, record)
    size = path.stat().st_size
    os.truncate(path, size - 100)


# Places of faults: an object, the name of a function of it, and what is done just before, if anything.
PLACES = {
    "step": (loop.Trainer, "_after_step", None),
    "save": (checkpoint.torch, "save", half_a_file),  # of files alone
    "rename": (checkpoints, "_also_name", None),
    "evaluation": (CocoEvaluator, "update", None),
    "log": (checkpoints, "append_json_line", half_a_line),
    "curves": (loop, "plot_training_curves", None),
    "loss": (SetCriterion, "forward", None),
    "image": (CocoDetection, "read_image", None),
}


def act(what: str, arguments: tuple) -> None:
    if what == "hang":
        time.sleep(600)
    elif what == "raise":
        raise ValueError("made up")
    elif what == "fill the disk":  # a limit to the size of files fails as a full disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    elif what == "lose the folder":
        shutil.rmtree(arguments[0].folder.path)
    elif what == "kill a worker":
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)
        time.sleep(1)  # until the data loader has seen it
    elif what.endswith(" to all"):  # this process and its workers, from another one
        name = what.removesuffix(" to all").removeprefix("SIG")
        subprocess.run(["kill", f"-{name}", "--", f"-{os.getpgrp()}"], start_new_session=True, check=True)
        time.sleep(0.2)
    else:
        for name in what.split(", "):
            os.kill(os.getpid(), getattr(signal, name))
            # Until the thread that waits for signals has seen it, and no longer takes two for one.
            time.sleep(1.2 if what == "SIGINT, SIGINT" else 0.2)


def arm(fault: dict) -> None:
    owner, name, before = PLACES[fault["at"]]
    real, passed = getattr(owner, name), 0

    def watched(*args, **kwargs):
        nonlocal passed
        passed += fault["at"] != "loss" or args[0].training
        if passed == fault["number"]:
            if before:
                before(*args, **kwargs)
            if fault["do"] == "nan":
                return {term: value / 0 * 0 for term, value in real(*args, **kwargs).items()}
            act(fault["do"], args)
        return real(*args, **kwargs)

    setattr(owner, name, watched)


def child(job: dict, rank: int) -> int:
    os.setpgrp()
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(job["folder"]) / f"{rank}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if job["ranks"] > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["ranks"]))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job["port"]))
    for fault in job["faults"]:
        if fault["rank"] == rank:
            arm(fault)
    return main(job["argv"])


def run(job: dict) -> list[int]:
    processes = []
    for rank in range(job["ranks"]):
        process = os.fork()
        if process == 0:
            status = 1
            try:
                status = child(job, rank)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        processes.append(process)
    statuses = {}
    for _ in processes:
        process, status = os.wait()
        statuses[process] = os.waitstatus_to_exitcode(status)
        for rank in {fault["rank"] for fault in job["faults"] if fault["do"] in ("hang", "SIGSTOP")}:
            with contextlib.suppress(ProcessLookupError):  # it would stay for ever
                os.kill(processes[rank], signal.SIGKILL)
    return [statuses[process] for process in processes]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
