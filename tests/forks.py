"""Runs main.py over and over in forks of one process that has imported it, and interrupts them at chosen places.

Reads jobs from stdin, one a line of JSON: {"argv": [...], "ranks": 1, "port": 0, "faults": [...], "folder": path}. A fault
is {"at": place, "number": n, "do": what, "rank": r}: in process r, when the place is passed for the n-th time. What the
processes print goes to folder/0.out, folder/0.err, ... Answers with their exit statuses, negative for a signal.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

import main
import training
from datasets.coco_eval import CocoEvaluator
from util import checkpoint, checkpoint_folder

REAL_SAVE, REAL_LINE = torch.save, checkpoint_folder.append_json_line


def half_a_file(content, file):
    REAL_SAVE(content, file)
    file.truncate(file.tell() // 2)


def half_a_line(path, record):
    REAL_LINE(path, record)
    size = path.stat().st_size
    os.truncate(path, size - 100)


# Where a fault may strike: an object, the name of a function of it, and what is done just before, if anything.
PLACES = {
    "step": (training.Trainer, "_after_step", None),
    "batch": (training.Trainer, "_wish", None),
    "save": (checkpoint.torch, "save", half_a_file),
    "rename": (checkpoint_folder, "_also_name", None),
    "evaluation": (CocoEvaluator, "update", None),
    "log": (checkpoint_folder, "append_json_line", half_a_line),
    "curves": (training, "plot_training_curves", None),
    "image": (main.build_dataset.__globals__["CocoDetection"], "read_image", None),
}


def arm(fault: dict) -> None:
    owner, name, before = PLACES[fault["at"]]
    real, passed = getattr(owner, name), 0

    def watched(*args, **kwargs):
        nonlocal passed
        passed += 1
        if passed == fault["number"]:
            if before:
                before(*args, **kwargs)
            if fault["do"] == "sleep":
                time.sleep(600)
            elif fault["do"] == "error":
                raise ValueError("made up")
            else:
                os.kill(os.getpid(), getattr(signal, fault["do"]))
                time.sleep(0.05)  # until the thread that waits for signals has it
        return real(*args, **kwargs)

    setattr(owner, name, watched)


def child(job: dict, rank: int) -> int:
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(job["folder"]) / f"{rank}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if job["ranks"] > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["ranks"]))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job["port"]))
    for fault in job["faults"]:
        if fault.get("rank", 0) == rank:
            arm(fault)
    main.checkpoint = None
    return main.main(job["argv"])


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
    while len(statuses) < len(processes):
        process, status = os.wait()
        if process in processes:
            statuses[process] = os.waitstatus_to_exitcode(status)
            if len(statuses) == len(processes) - 1:  # what was stopped is of no further use, and would stay for ever
                for other in set(processes) - statuses.keys():
                    if any(fault["do"] == "SIGSTOP" or fault["do"] == "sleep" for fault in job["faults"]):
                        os.kill(other, signal.SIGKILL)
    return [statuses[process] for process in processes]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
