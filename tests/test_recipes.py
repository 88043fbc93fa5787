"""Every recipe, under torchrun and under SLURM, says what the published result was trained with."""

import os
import re
import shlex
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from helpers import from_flags, settings

REPOSITORY = Path(__file__).parents[1]

# GPUs, images a GPU, epochs, epochs before the drop, switches; the published AP, trainable parameters and GFLOPs
RECIPES = {
    "r50_e12_4gpu": (4, 4, 12, 10, [], "33.1", "58.07 M", "100"),
    "r50_e50_4gpu": (4, 4, 50, 40, [], "39.8", "58.07 M", "100"),
    "r50_smca_e12_4gpu": (4, 4, 12, 10, ["--smca"], "36.0", "58.12 M", "100"),
    "r50_smca_e50_4gpu": (4, 4, 50, 40, ["--smca"], "41.8", "58.12 M", "100"),
    "r50_dc5_e12_8gpu": (8, 1, 12, 10, ["--dilation"], "38.3", "58.07 M", "210"),
    "r50_dc5_e50_8gpu": (8, 1, 50, 40, ["--dilation"], "43.3", "58.07 M", "210"),
    "r50_dc5_smca_e12_8gpu": (8, 1, 12, 10, ["--dilation", "--smca"], "40.6", "58.12 M", "210"),
    "r50_dc5_smca_e50_8gpu": (8, 1, 50, 40, ["--dilation", "--smca"], "45.0", "58.12 M", "210"),
    "r50_ms_e12_8gpu": (8, 2, 12, 10, ["--multiscale"], "41.1", "54.97 M", "203"),
    "r50_ms_e50_8gpu": (8, 2, 50, 40, ["--multiscale"], "46.1", "54.97 M", "203"),
    "r50_ms_smca_e12_8gpu": (8, 2, 12, 10, ["--multiscale", "--smca"], "42.8", "55.02 M", "203"),
    "r50_ms_smca_e50_8gpu": (8, 2, 50, 40, ["--multiscale", "--smca"], "47.1", "55.02 M", "203"),
}
# SAM-DETR++, as far as secondary sources tell.
PLUS = {
    "r50_pp_e12_4gpu": (4, 4, 12, 10, ["--smca", "--dropout 0"], "37.0", "58.12 M", "100"),
    "r50_pp_e50_4gpu": (4, 4, 50, 40, ["--smca", "--dropout 0"], "42.7", "58.12 M", "100"),
    "r50_pp_ms_e12_8gpu": (8, 2, 12, 10, ["--multiscale", "--smca", "--dropout 0"], "43.2", "55.02 M", "203"),
    "r50_pp_ms_dn_e12_8gpu": (
        8, 2, 12, 10, ["--multiscale", "--smca", "--dropout 0", "--denoising 5"], "44.8", "55.04 M", "203",
    ),
    "r50_pp_ms_dn_e50_8gpu": (
        8, 2, 50, 40, ["--multiscale", "--smca", "--dropout 0", "--denoising 5"], "49.1", "55.04 M", "203",
    ),
}  # fmt: skip
RECIPES |= PLUS

# Deformable DETR, 32 images a step, 50 epochs, drop after 40: switches; the published AP, parameters that train, and
# all; the published GFLOPs; strides of the backbone's maps
DEFORMABLE = {
    "deformable_r50_single_scale": ("--num_feature_levels 1", "39.4", 33_844_193, 34_066_593, "78", [32]),
    "deformable_r50_single_scale_dc5": (
        "--num_feature_levels 1 --dilation", "41.5", 33_844_193, 34_066_593, "128", [16],
    ),
    "deformable_r50": ("", "44.5", 39_847_265, 40_069_665, "173", [8, 16, 32]),
    "deformable_r50_refine": ("--with_box_refine", "46.2", 40_627_260, 40_849_660, "173", [8, 16, 32]),
    "deformable_r50_refine_two_stage": (
        "--with_box_refine --two_stage", "46.9", 40_959_129, 41_181_529, "173", [8, 16, 32],
    ),
}  # fmt: skip
# Of a launcher or a cluster that may surround the tests.
VARIABLES = (
    "LAUNCH",
    "COCO_PATH",
    "SLURM_CPUS_PER_TASK",
    "SLURM_NNODES",
    "SLURM_NTASKS_PER_NODE",
    "GPUS_PER_NODE",
    "NODES",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_RESTART_COUNT",
    "SLURM_JOB_ID",
)


def run(script: Path, *flags: str, cwd: Path, **variables: str) -> str:
    inherited = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    environ = inherited | {"DRY_RUN": "1"} | variables
    return subprocess.run(
        ["bash", str(script), *flags], cwd=cwd, env=environ, check=True, capture_output=True, text=True
    ).stdout


def flags_of(name: str, coco_path: str = "data/coco") -> list[str]:
    _, batch, epochs, drop, switches, *_ = RECIPES[name]
    return shlex.split(
        f"--batch_size {batch} {' '.join(switches)} --epochs {epochs} --lr_drop {drop} "
        f"--coco_path {coco_path} --keep -1 --output_dir output/{name}"
    )


def test_every_script_is_tested():
    for folder in ("scripts", "scripts_slurm"):
        found = {path.stem for path in (REPOSITORY / folder).glob("*r50*.sh") if not path.stem.startswith("sap_")}
        assert found == {*RECIPES, *DEFORMABLE}, folder


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name, tmp_path):
    gpus, batch, *_, ap, parameters, gflops = RECIPES[name]
    script = REPOSITORY / "scripts" / f"{name}.sh"
    launch = ["torchrun", "--standalone", f"--nproc_per_node={gpus}", "main.py"]
    assert run(script, cwd=tmp_path).split() == launch + flags_of(name)
    on_two = run(script, cwd=tmp_path, NODES="2", NODE_RANK="1", MASTER_ADDR="first")
    assert on_two.startswith("torchrun --nnodes=2 --node_rank=1 --master_addr=first ")
    per_node, images = (int(re.search(rf"--{flag}[= ](\d+)", on_two)[1]) for flag in ("nproc_per_node", "batch_size"))
    assert 2 * per_node * images == gpus * batch  # a step
    # a flag given again wins in argparse, so what the user adds has to come last
    added = ["--resume", "x.pth", "--epochs", "1"]
    got = run(script, *added, cwd=tmp_path, COCO_PATH="/sets/coco").split()
    assert got == launch + flags_of(name, "/sets/coco") + added

    text = script.read_text()
    assert re.search(rf"{gpus} GPUs x {batch} image", text)
    assert f"published: {ap} (" in text
    assert re.search(rf"trainable parameters +{parameters}\n", text)
    counted = re.search(rf"GFLOPs +published: (?:about )?{gflops}; counted: (.*)\n", text)
    assert float(counted[1]) == pytest.approx(float(gflops), rel=0.02)
    assert text.count("measured by us: not yet") == 1
    assert ("Our reading of the recipe, from secondary sources" in text) == (name in PLUS)


# What the published results were trained with beside the flags above, and what every recipe therefore leaves alone.
PUBLISHED_DEFAULTS = {
    "lr": 1e-4, "lr_backbone": 1e-5, "weight_decay": 1e-4, "clip_max_norm": 0.1, "lr_schedule": "step",
    "warmup_iters": 0, "lr_linear_proj_names": [], "backbone": "resnet50", "backbone_level": 5,
    "backbone_norm": "frozen", "backbone_weights": "imagenet", "position_embedding": "sine", "enc_layers": 6,
    "dec_layers": 6, "dim_feedforward": 2048, "hidden_dim": 256, "dropout": 0.1, "nheads": 8, "num_queries": 300,
    "sam_resample": "points", "sam_points": None, "sam_range": "box", "sam_reweight": True, "aux_loss": True,
    "set_cost_class": 2, "set_cost_bbox": 5, "set_cost_giou": 2, "cls_loss_coef": 2, "bbox_loss_coef": 5,
    "giou_loss_coef": 2, "focal_alpha": 0.25, "class_loss": "focal", "class_cost": "focal", "denoising": 0,
    "denoising_box_noise": 0.4, "denoising_label_noise": 0.2, "contrastive": False,
    "train_sizes": [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
    "eval_size": 800, "max_size": 1333, "crop_augmentation": True, "seed": 42, "eval": False, "resume": "",
}  # fmt: skip

# Trainable parameters: SMCA adds 8 heads x 2 scales x (512 + 1) in each of 6 layers; a schedule below 25 epochs the
# scales and shifts of 256 channels behind the input projection.
SIZES = {(False, 50): 58_073_546, (False, 12): 58_074_058, (True, 50): 58_122_794, (True, 12): 58_123_306}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_builds_the_published_model(name, tmp_path):
    _, batch, epochs, drop, switches, *_ = RECIPES[name]
    printed = run(REPOSITORY / "scripts" / f"{name}.sh", cwd=tmp_path)
    words = printed.partition(" main.py ")[2]
    args = Namespace(**settings(words).flat())
    assert (args.batch_size, args.epochs, args.lr_drop) == (batch, epochs, drop)
    for switch in ("smca", "dilation", "multiscale"):
        assert getattr(args, switch) is (f"--{switch}" in switches), switch
    denoising = "--denoising 5" in switches
    own = ({"dropout": 0.0} if name in PLUS else {}) | ({"denoising": 5} if denoising else {})
    assert {key: getattr(args, key) for key in PUBLISHED_DEFAULTS} == PUBLISHED_DEFAULTS | own

    with torch.device("meta"):  # the shapes alone
        detector = from_flags(words)[0]
    trainable = sum(parameter.numel() for parameter in detector.parameters() if parameter.requires_grad)
    trainable -= denoising * 91 * 255  # the embedding of labels
    assert trainable == (
        {True: 55_021_546, False: 54_972_298}[args.smca] if args.multiscale else SIZES[args.smca, epochs]
    )
    assert detector.backbone.strides == ([8, 16, 32] if args.multiscale else [16 if args.dilation else 32])


@pytest.mark.parametrize("name", RECIPES)
def test_slurm_wrapper_runs_the_same_flags(name, tmp_path):
    gpus = RECIPES[name][0]
    script = REPOSITORY / "scripts_slurm" / f"{name}.sh"
    launch = ["srun", "--kill-on-bad-exit=1", "python", "main.py"]
    assert run(script, "--eval", cwd=tmp_path).split() == [*launch, *flags_of(name), "--eval"]
    launch.insert(2, "--cpus-per-task=6")
    assert run(script, cwd=tmp_path, SLURM_CPUS_PER_TASK="6").split() == launch + flags_of(name)

    text = script.read_text()
    head = dict(re.findall(r"^#SBATCH --([\w-]+)=(.+)$", text, re.MULTILINE))
    assert (head["job-name"], head["ntasks"], head["gres"]) == (name, str(gpus), f"gpu:{gpus}")
    assert {"time", "output"} <= set(head)
    assert text.index("#SBATCH") < text.index("\nhere=")  # sbatch stops reading at the first command

    copy = tmp_path / "slurm_script"  # what sbatch executes
    copy.write_text(text)
    assert run(copy, cwd=tmp_path, SLURM_SUBMIT_DIR=str(REPOSITORY)).split()[0] == "srun"


def deformable_flags(name: str, *, batch: int) -> list[str]:
    return (
        f"main.py --model deformable_detr --batch_size {batch} {DEFORMABLE[name][0]} --epochs 50 --lr_drop 40 "
        f"--coco_path data/coco --keep -1 --output_dir output/{name}"
    ).split()


@pytest.mark.parametrize("name", DEFORMABLE)
def test_deformable_recipe(name, tmp_path):
    """On one node and on two: 32 images a step either way."""
    script = REPOSITORY / "scripts" / f"{name}.sh"
    launch = ["torchrun", "--standalone", "--nproc_per_node=8"]
    assert run(script, "--resume", "x", cwd=tmp_path).split() == [
        *launch, *deformable_flags(name, batch=4), "--resume", "x",
    ]  # fmt: skip
    two = {"NODES": "2", "MASTER_ADDR": "first"}
    for rank in "01":
        launch = f"torchrun --nnodes=2 --node_rank={rank} --master_addr=first --master_port=29500 --nproc_per_node=8"
        wanted = [*launch.split(), *deformable_flags(name, batch=2)]
        assert run(script, cwd=tmp_path, NODE_RANK=rank, **two).split() == wanted

    _, ap, trainable, total, gflops, _ = DEFORMABLE[name]
    text = script.read_text()
    assert "8 GPUs x 4 images, or 2 nodes x 8 GPUs x 2 images" in text
    assert f"published: {ap};" in text
    assert f"{trainable / 1e6:.2f} M (all: {total / 1e6:.2f} M)\n" in text
    counted = re.search(rf"GFLOPs +published: {gflops}; counted: (.*)\n", text)
    assert float(counted[1]) == pytest.approx(float(gflops), rel=0.02)
    assert text.count("measured by us: not yet") == 1
    assert f"bash scripts/{name}.sh" in text


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"NODES": "3"}, "NODES=3 GPUS_PER_NODE=8: 32 images a step"),
        ({"GPUS_PER_NODE": "5"}, "GPUS_PER_NODE=5"),
        ({"NODES": "2", "MASTER_ADDR": "first"}, "NODE_RANK"),
        ({"NODES": "2", "NODE_RANK": "1"}, "MASTER_ADDR"),
    ],
)
def test_nodes_that_do_not_fit(variables, said, tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as failed:
        run(REPOSITORY / "scripts" / "deformable_r50.sh", cwd=tmp_path, **variables)
    assert said in failed.value.stderr
    assert failed.value.stderr.count("\n") == 1


@pytest.mark.parametrize("name", DEFORMABLE)
def test_deformable_recipe_builds_the_published_model(name, tmp_path):
    _, _, trainable, total, _, strides = DEFORMABLE[name]
    printed = run(REPOSITORY / "scripts" / f"{name}.sh", cwd=tmp_path)
    words = printed.partition(" main.py ")[2]
    args = Namespace(**settings(words).flat())
    published = PUBLISHED_DEFAULTS | {
        "lr": 2e-4, "lr_backbone": 2e-5, "lr_linear_proj_names": ["reference_points", "sampling_offsets"],
        "lr_linear_proj_mult": 0.1, "dim_feedforward": 1024, "input_proj_norm": "group", "enc_n_points": 4,
        "dec_n_points": 4, "epochs": 50, "lr_drop": 40, "batch_size": 4,
        "num_feature_levels": 4 if len(strides) > 1 else 1, "sam_resample": "off",
    }  # fmt: skip
    assert {key: getattr(args, key) for key in published} == published
    with torch.device("meta"):
        detector = from_flags(words)[0]
    assert sum(p.numel() for p in detector.parameters()) == total
    assert sum(p.numel() for p in detector.parameters() if p.requires_grad) == trainable
    assert detector.backbone.strides == strides


@pytest.mark.parametrize("name", DEFORMABLE)
def test_deformable_slurm_wrapper(name, tmp_path):
    """sbatch --nodes=2 is all that two nodes need: tasks are counted by node, and the batch follows."""
    script = REPOSITORY / "scripts_slurm" / f"{name}.sh"
    for variables, batch in (({}, 4), ({"SLURM_NNODES": "1"}, 4), ({"SLURM_NNODES": "2"}, 2)):
        launch = ["srun", "--kill-on-bad-exit=1", "python"]
        assert run(script, "--eval", cwd=tmp_path, **variables).split() == [
            *launch, *deformable_flags(name, batch=batch), "--eval",
        ]  # fmt: skip
    text = script.read_text()
    head = dict(re.findall(r"^#SBATCH --([\w-]+)=(.+)$", text, re.MULTILINE))
    assert head.keys() == {
        "job-name", "nodes", "ntasks-per-node", "gres", "cpus-per-task", "time", "output", "open-mode", "signal",
    }  # fmt: skip
    assert (head["job-name"], head["nodes"], head["ntasks-per-node"], head["gres"]) == (name, "1", "8", "gpu:8")
    assert text.index("#SBATCH") < text.index("\nhere=")


@pytest.mark.parametrize(
    ("status", "state", "requeued"),
    [(75, "RUNNING", True), (75, "CANCELLED", False), (0, "RUNNING", False), (1, "RUNNING", False)],
)
def test_preempted_job_goes_back_into_the_queue(status, state, requeued, tmp_path):
    """And only that one; with programs that stand for SLURM's."""
    for name, body in {
        "srun": f"exit {status}",
        "squeue": f"echo {state}",
        "scontrol": f'echo "$@" > {tmp_path / "asked"}',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    environ = {k: v for k, v in os.environ.items() if k not in VARIABLES} | {"PATH": path, "SLURM_JOB_ID": "12"}
    ended = subprocess.run(["bash", str(REPOSITORY / "scripts_slurm" / "r50_e12_4gpu.sh")], env=environ)
    assert ended.returncode == status
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else None) == ("requeue 12\n" if requeued else None)
    head = (REPOSITORY / "scripts_slurm" / "r50_e12_4gpu.sh").read_text()
    assert all(f"#SBATCH --{line}\n" in head for line in ("requeue", "signal=USR1@120", "open-mode=append"))


@pytest.mark.parametrize(
    ("flags", "resume"),
    [
        ("", ["--resume", "auto"]),
        ("--lr 1", ["--lr", "1", "--resume", "auto"]),
        ("--resume x.pth --lr 1", ["--lr", "1", "--resume", "auto:x.pth"]),
        ("--resume=auto:x.pth", ["--resume", "auto:x.pth"]),
        ("--overwrite --lr 1", ["--lr", "1", "--resume", "auto"]),
        ("--eval --resume x.pth", ["--eval", "--resume", "x.pth"]),
    ],
)
def test_restarted_job_goes_on(flags, resume, tmp_path):
    name = "r50_e12_4gpu"
    script = REPOSITORY / "scripts_slurm" / f"{name}.sh"
    printed = run(script, *shlex.split(flags), cwd=tmp_path, SLURM_RESTART_COUNT="1").split()
    assert printed == ["srun", "--kill-on-bad-exit=1", "python", "main.py", *flags_of(name), *resume]


def test_recipes_start_in_the_repository(tmp_path):
    script = REPOSITORY / "scripts" / "r50_e12_4gpu.sh"
    assert run(script, cwd=tmp_path, DRY_RUN="", LAUNCH="bash -c pwd").strip() == str(REPOSITORY)
