"""SAP-DETR's recipes: the published flags under torchrun on one node and on several, under SLURM, and in evaluation."""

import os
import re
import shlex
import subprocess

import pytest
import torch
from helpers import settings
from test_recipes import REPOSITORY, run

from samdetr.models.build import build_model
from samdetr.training.settings import RunSettings

# Backbone, DC5, GPUs, images a step, the published AP and GFLOPs, all parameters
RECIPES = {
    "sap_r50": ("resnet50", False, 4, 16, "43.1", "92", 50_391_687),
    "sap_r50_dc5": ("resnet50", True, 8, 8, "46.0", "197", 50_391_687),
    "sap_r101": ("resnet101", False, 4, 16, "44.4", "158", 69_331_591),
    "sap_r101_dc5": ("resnet101", True, 8, 8, "46.9", "266", 69_331_591),
}
PUBLISHED = {
    "model": "sap_detr", "num_queries": 306, "num_select": 300, "meshgrid_refpoints_xy": True, "newconvinit": True,
    "sdg": True, "bbox_embed_diff_each_layer": True, "transformer_activation": "relu", "epochs": 50, "lr_drop": 40,
    "lr": 1e-4, "lr_backbone": 1e-5, "warmup_iters": 1000, "weight_decay": 1e-4, "clip_max_norm": 0.1, "dropout": 0,
    "enc_layers": 6, "dec_layers": 6, "point_reference": "late", "head_cell": "published",
    "objectness_target": "attached", "lr_schedule": "step", "input_proj_norm": "none", "legacy_no_zero_grad": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in os.environ:
        if name.startswith(("SLURM_", "MASTER_", "NODE")) or name == "GPUS_PER_NODE":
            monkeypatch.delenv(name)


def parsed(printed: str) -> tuple[list[str], dict]:
    """How main.py is started, and its settings."""
    launch, _, flags = printed.partition(" main.py ")
    return launch.split(), settings(shlex.split(flags)).flat()


def test_every_script_is_tested():
    for folder, names in (("scripts", [*RECIPES, *(f"{n}_test" for n in RECIPES)]), ("scripts_slurm", RECIPES)):
        assert {path.stem for path in (REPOSITORY / folder).glob("sap_*.sh")} == set(names)


@pytest.mark.parametrize("name", RECIPES)
def test_training(name, tmp_path):
    backbone, dc5, gpus, images, ap, gflops, total = RECIPES[name]
    script = REPOSITORY / "scripts" / f"{name}.sh"
    launch, settings = parsed(run(script, "--seed", "7", "--legacy_no_zero_grad", cwd=tmp_path))
    assert launch == ["torchrun", "--standalone", f"--nproc_per_node={gpus}"]
    assert {key: settings[key] for key in PUBLISHED} == PUBLISHED | {"legacy_no_zero_grad": True}
    assert (settings["backbone"], settings["dilation"], settings["seed"]) == (backbone, dc5, 7)
    assert settings["batch_size"] * gpus == images
    assert settings["output_dir"] == f"output/{name}"
    with torch.device("meta"):
        found = RunSettings.from_flat(settings)
        network = build_model(found.trunk, found.family)[0]
    assert sum(parameter.numel() for parameter in network.parameters()) == total
    trainable = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)

    text = script.read_text()
    assert f"published: {ap};" in text
    assert float(re.search(rf"published: {gflops}; counted: (.*)\n", text)[1]) == pytest.approx(float(gflops), rel=0.04)
    assert f" {trainable / 1e6:.2f} M (all: {total / 1e6:.2f} M;" in text
    assert re.search(rf"{gpus} GPUs x {images // gpus} image", text)


def test_the_published_command_parses():
    """As it stands, and as torch.distributed.launch without --use_env hands it on."""
    flags = (
        "--local-rank=3 -m sap_detr --batch_size 1 --dilation --backbone resnet101 --num_workers 10 --epochs 50 "
        "--lr_drop 40 --enc_layers 6 --dec_layers 6 --transformer_activation relu --num_select 300 --num_queries 306 "
        "--warmup_iters 1000 --coco_path coco --meshgrid_refpoints_xy --bbox_embed_diff_each_layer --newconvinit --sdg "
        "--output_dir outputs/r101-dc-50epoch/"
    )
    _, settings = parsed(f" main.py {flags}")
    assert {key: settings[key] for key in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize("name", RECIPES)
def test_several_nodes_share_the_same_batch(name, tmp_path):
    *_, images, _, _, _ = RECIPES[name]
    variables = {"NODES": "2", "GPUS_PER_NODE": "4", "NODE_RANK": "1", "MASTER_ADDR": "first"}
    launch, settings = parsed(run(REPOSITORY / "scripts" / f"{name}.sh", cwd=tmp_path, **variables))
    meeting = ["--nnodes=2", "--node_rank=1", "--master_addr=first", "--master_port=29500"]
    assert launch == ["torchrun", *meeting, "--nproc_per_node=4"]
    assert 8 * settings["batch_size"] == images
    # The published multi-node scripts have 4 images on each of 8 GPUs, DC5 or not.
    printed = run(REPOSITORY / "scripts" / f"{name}.sh", "--batch_size", "4", cwd=tmp_path, **variables)
    assert 8 * parsed(printed)[1]["batch_size"] == 32


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"NODES": "3"}, "NODES=3 GPUS_PER_NODE=4: 16 images a step cannot be shared out evenly"),
        ({"GPUS_PER_NODE": "0"}, "NODES=1 GPUS_PER_NODE=0: 16 images a step"),
        ({"NODES": "2"}, "NODE_RANK: NODES=2: set it to the number of this node, from 0"),
        ({"NODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR: NODES=2: set it to the name of the first node"),
    ],
)
def test_nodes_that_do_not_fit(variables, expected, tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as error:
        run(REPOSITORY / "scripts" / "sap_r50.sh", cwd=tmp_path, **variables)
    assert expected in error.value.stderr


@pytest.mark.parametrize("name", RECIPES)
def test_evaluation(name, tmp_path):
    backbone, dc5, gpus, images, *_ = RECIPES[name]
    script = REPOSITORY / "scripts" / f"{name}_test.sh"
    launch, settings = parsed(run(script, cwd=tmp_path, COCO_PATH="/sets/coco"))
    assert launch == ["torchrun", "--standalone", "--nproc_per_node=1"]
    assert {key: settings[key] for key in PUBLISHED} == PUBLISHED
    assert (settings["backbone"], settings["dilation"], settings["batch_size"]) == (backbone, dc5, images // gpus)
    assert (settings["eval"], settings["resume"]) == (True, f"output/{name}/checkpoint0049.pth")
    assert (settings["coco_path"], settings["output_dir"]) == ("/sets/coco", f"output/{name}/eval")
    assert parsed(run(script, "--resume", "x.pth", cwd=tmp_path))[1]["resume"] == "x.pth"


@pytest.mark.parametrize("name", RECIPES)
def test_slurm(name, tmp_path):
    *_, gpus, images, _, _, _ = RECIPES[name]
    script = REPOSITORY / "scripts_slurm" / f"{name}.sh"
    text = script.read_text()
    head = dict(re.findall(r"^#SBATCH --([\w-]+)=(.+)$", text, re.MULTILINE))
    assert (head["job-name"], head["nodes"]) == (name, "1")
    assert (head["ntasks-per-node"], head["gres"]) == (str(gpus), f"gpu:{gpus}")
    assert text.index("#SBATCH") < text.index("\nhere=")  # sbatch stops reading at the first command
    for nodes, tasks in ((1, gpus), (2, 4)):
        job = {"SLURM_NNODES": str(nodes), "SLURM_NTASKS_PER_NODE": str(tasks), "SLURM_CPUS_PER_TASK": "4"}
        launch, settings = parsed(run(script, "--eval", cwd=tmp_path, **job))
        assert launch == ["srun", "--kill-on-bad-exit=1", "--cpus-per-task=4", "python"]
        assert settings["batch_size"] * nodes * tasks == images
        assert settings["eval"] is True

    copy = tmp_path / "slurm_script"  # what sbatch executes
    copy.write_text(text)
    assert run(copy, cwd=tmp_path, SLURM_SUBMIT_DIR=str(REPOSITORY)).split()[0] == "srun"
