"""Two and four processes (gloo, CPU) compute what one computes with the joint batch, and end together."""

import os
import re
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers import (
    MULTISCALE,
    TINY,
    TINY_DEFORMABLE,
    TINY_SAP,
    build_tiny,
    command,
    criterion_of,
    damage,
    environment,
    evaluate,
    in_processes,
    read_json,
    read_log,
    run_process,
)
from PIL import Image

from benchmarks.soak import free_port
from samdetr.training.parallel import parallel
from samdetr.util.distributed import get_world_size, init_distributed, shutdown
from samdetr.util.padded_images import PaddedImages, pad_images

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
LAUNCH = ["-m", "torch.distributed.launch", "--nproc_per_node=2", "--use_env"]
FILES = ["checkpoint.pth", "checkpoint0000.pth", "checkpoint_best.pth", "curves.png", "log.txt", "settings.json"]
FILES += ["times.txt"]

NO_NOISE = ["--denoising", "2", "--denoising_box_noise", "0", "--denoising_label_noise", "0"]
# By the number of processes: objects in each of four images, which they share, and network and flags.
CASES = {
    2: [
        ((1, 4, 0, 0), TINY),
        ((3, 0, 1, 2), [*TINY, "--no_aux_loss"]),
        ((1, 4, 0, 0), MULTISCALE),
        ((3, 0, 1, 2), TINY_DEFORMABLE),
        ((1, 4, 0, 0), [*TINY_DEFORMABLE, "--with_box_refine", "--two_stage"]),
        ((3, 0, 1, 2), TINY_SAP),
        # Copies without noise, so that they do not depend on the random numbers of the processes.
        ((3, 0, 1, 3), [*TINY, *NO_NOISE]),
    ],
    # Copies see those that fill up images with fewer objects, so each image has all or none.
    4: [
        ((3, 3, 0, 0), [*TINY, *NO_NOISE, "--no_aux_loss"]),
        ((3, 0, 3, 3), [*TINY_DEFORMABLE, *NO_NOISE]),
        ((3, 0, 1, 2), [*TINY_SAP, "--no_aux_loss"]),
    ],
}


def batch(counts, part: slice):
    """Some of four images, two of them padded, and their targets."""
    torch.manual_seed(1)
    images = [torch.randn(3, *size, dtype=torch.float64) for size in [(64, 96), (48, 96), (64, 80), (64, 96)]]
    targets = []
    for count in counts:
        centres, sizes = (
            torch.rand(count, 2, dtype=torch.float64),
            0.1 + 0.4 * torch.rand(count, 2, dtype=torch.float64),
        )
        targets.append({"labels": torch.randint(6, (count,)), "boxes": torch.cat([0.3 + 0.4 * centres, sizes], 1)})
    whole = pad_images(images)
    return PaddedImages(whole.images[part], whole.padding[part]), targets[part]


def losses_and_gradients(counts, network, part: slice):
    """The losses of a part of the batch, and the gradients of two backward passes, as with `--accumulate`."""
    flags = [*network, "--backbone_norm", "frozen", "--dropout", "0"]
    network = build_tiny(network=flags)[0].double().to(memory_format=torch.channels_last).train()
    criterion = criterion_of(flags).train()
    images, targets = batch(counts, part)
    alone = get_world_size() == 1
    model = network if alone else parallel(network, criterion, sync_buffers=False)
    for waits in (True, False):
        with model.no_sync() if waits and not alone else nullcontext():
            losses = criterion.weighted(criterion(model(images, criterion.noised(targets)), targets))
            sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, gradients


def share(rank: int, ports: list[int], folder: str) -> None:
    """In two processes, then in these and two more."""
    torch.set_num_threads(1)
    for (size, cases), port in zip(CASES.items(), ports):
        if rank >= size:
            continue
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        init_distributed(device="cpu")
        part = slice(4 // size * rank, 4 // size * (rank + 1))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # also those of C++
            results = [losses_and_gradients(*case, part) for case in cases]
        torch.save(results, Path(folder) / f"{size}_{rank}.pth")
        shutdown()


def test_losses_and_gradients_are_those_of_the_joint_batch(tmp_path):
    in_processes(share, ([free_port(), free_port()], str(tmp_path)), 4)
    exact = {"rtol": 1e-9, "atol": 1e-12}
    for size, cases in CASES.items():
        parts = [torch.load(tmp_path / f"{size}_{rank}.pth") for rank in range(size)]
        for case, *found in zip(cases, *parts):
            losses, gradients = losses_and_gradients(*case, slice(4))
            means = {name: sum(part[0][name] for part in found) / size for name in losses}
            torch.testing.assert_close(means, losses, **exact)
            for _, exchanged in found:
                torch.testing.assert_close(exchanged, gradients, **exact)
            assert losses["loss_bbox"] > 0, case
            assert gradients["backbone.body.layer2.0.conv1.weight"].abs().max() > 1e-6
        assert parts[-1][0][0]["loss_bbox"] == 0  # this process has no object in this case


def test_torchrun_trains_and_launch_evaluates(server, shapes, tmp_path):
    """With learned norms, whose statistics differ between the processes until they evaluate. Batches of one image,
    because convolutions round by the size of their batch."""
    output, again = tmp_path / "output", tmp_path / "again"
    flags = ["--epochs", "1", "--lr", "1e-3", "--batch_size", "1", "--output_dir", str(output)]
    run = run_process([*TORCHRUN, *command(shapes, *flags)])
    assert (run.returncode, run.stderr) == (0, "")  # and no warning
    assert sorted(os.listdir(output)) == FILES
    assert Image.open(output / "curves.png").width > 1000
    assert read_json(output / "settings.json")["world_size"] == 2
    steps = re.findall(r"^(\w.*\d/\d),", run.stdout, re.MULTILINE)
    assert steps == ["epoch 0: 8/8", "evaluation: 4/4"]  # 16 images; 7 images, of which the second process has 3
    (line,) = read_log(output)

    checkpoint = output / "checkpoint.pth"
    url = f"http://127.0.0.1:{server.server_port}/output/checkpoint.pth"
    flags = ["--eval", "--resume", url, "--batch_size", "1", "--output_dir", str(again)]
    run = run_process([*LAUNCH, *command(shapes, *flags, network=[])])
    assert run.returncode == 0, run.stderr
    assert server.requests == 1  # one process fetched it, the other waited
    figures, detections = evaluate(shapes, checkpoint, tmp_path / "one", "--batch_size", "1")
    assert figures[8] > 0  # AR100
    assert line["test_coco_eval_bbox"] == figures
    assert read_json(again / "eval.json")["coco_eval_bbox"] == figures
    assert read_json(again / "detections.json") == detections


@pytest.mark.slow  # gradients are compared above; test_distributed.py meets under the variables of slurm
@pytest.mark.parametrize("network", [TINY, MULTISCALE], ids=["one scale", "three scales"])
def test_slurm_starts_training(network, shapes, tmp_path):
    """Without auxiliary losses, where some parameters get no gradient."""
    output = tmp_path / "output"
    flags = ["--epochs", "1", "--batch_size", "2", "--no_aux_loss", "--output_dir", str(output)]
    step = {
        "SLURM_NTASKS": "2",
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_NODELIST": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, *command(shapes, *flags, network=network)],
            env=environment(**step, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "2 process(es) on cpu" in outputs[0][0]
    assert outputs[1][0] == ""
    assert outputs[0][1] + outputs[1][1] == ""
    assert sorted(os.listdir(output)) == FILES
    (line,) = read_log(output)
    assert "train_loss_ce" in line
    assert "train_loss_ce_0" not in line


# In one process: the launcher takes ten seconds; test_bad_images.py stops two processes without it.
@pytest.mark.parametrize("fault", ["before training", pytest.param("in one process", marks=pytest.mark.slow)])
def test_bad_input_ends_all_processes(fault, own_shapes, forks, tmp_path):
    image = own_shapes / "train2017" / "000000000001.jpg"
    if fault == "before training":
        image.write_bytes(image.read_bytes()[:-100])
    else:
        damage(image)  # seen when it is decoded; the processes tell each other at the end of the epoch
    program, *words = command(own_shapes, "--batch_size", "2", "--output_dir", str(tmp_path / "output"))
    if fault == "before training":
        assert forks.main(words, tmp_path / "printed", ranks=2) == [2, 2]
        said = forks.err(0) + forks.err(1)
    else:  # the launcher ends the other process
        run = run_process([*TORCHRUN, program, *words])
        assert run.returncode != 0
        said = run.stderr
    assert f"{image} (image id 1) cannot be used" in said
    assert os.listdir(tmp_path / "output") == ["bad_images.txt"]


@pytest.mark.slow  # twenty seconds, most of them the launcher's
def test_the_same_error_in_all_processes_is_shown(shapes, tmp_path):
    """The launcher ends all processes as soon as one has ended: the first must not end before another has said why."""
    plugin = tmp_path / "faulty.py"
    plugin.write_text(
        "import os, time\n"
        "from samdetr import engine\n"
        "def fails(*_, **__):\n"
        "    time.sleep(int(os.environ['RANK']))\n"
        "    raise RuntimeError('the same in both')\n"
        "engine.compute_losses = fails\n"
    )
    flags = ["--batch_size", "2", "--plugin", str(plugin), "--backbone_norm", "frozen", "--output_dir", str(tmp_path)]
    run = run_process([*TORCHRUN, *command(shapes, *flags)])
    assert run.returncode != 0
    assert "RuntimeError: the same in both" in run.stderr
