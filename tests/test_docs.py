"""README and the manual are right: each command in them is run from the text itself, parsed, or listed here with the
reason why neither is possible; each flag, file and link that they name exists."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torchvision
from helpers import MULTISCALE, REPOSITORY, TINY, TINY_DATA, environment

from samdetr import cli, console
from samdetr.models.build import FAMILIES

# docs/log.md is a dated log, whose commands were right on their day.
PAGES = ["README.md", "CONTRIBUTING.md"]
PAGES += sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md") if path.name != "log.md")

# Commands that are neither run nor parsed, and why not.
NOT_RUN = {
    "bash scripts/quickstart.sh": "minutes: test_quick_start, which is slow, runs it",
    "bash scripts/test.sh": "runs all tests, these included",
    "bash scripts/test.sh tests/test_losses.py -x": "runs tests",
    "bash scripts/typecheck.sh": "a part of scripts/test.sh",
    "python -m pytest": "runs tests",
    "python -m pytest -m slow": "runs tests",
    "source .venv/bin/activate": "changes the shell",
    "bash scripts/setup.sh": "downloads PyTorch",
    "bash scripts/setup.sh requirements-dev.txt": "downloads PyTorch",
    "pip install .": "downloads",
    "pip install '.[dev]'": "downloads",
    "pip install pre-commit && pre-commit install": "downloads",
    "sbatch scripts_slurm/r50_smca_e12_4gpu.sh": "needs SLURM; test_recipes.py runs all of scripts_slurm/ without it",
    "sbatch --nodes=2 scripts_slurm/deformable_r50.sh": "needs SLURM",
    "bash models/ops/make.sh cpu": "compiles for half a minute; test_ops.py runs it",
    "bash models/ops/make.sh cuda": "half a minute; test_ops_cuda.py compiles the kernels",
    "python main.py --coco_path my_data --preset tiny --overfit 8": "minutes; test_start_helpers.py runs it smaller",
    "python models/ops/test.py": "minutes; test_ops.py runs its checks",
    "bash scripts/gpu_check.sh output/gpu_check": "minutes; test_gpu_check.py runs it",
    "bash scripts/gpu_check.sh output/gpu_check --part speed": "the same",
    "python benchmarks/gpu_report.py output/gpu_check/report.json": "needs a GPU's report; changes a page",
    "python benchmarks/soak.py --seed 1": "half an hour; test_long_runs.py tests the same faults",
    "python benchmarks/model.py --config R50_SMCA --batch 1": "minutes; measures",
    "python benchmarks/ms_deform_attn.py": "minutes; measures",
    "pip install '.[export]'": "downloads",
    "pip install '.[track]'": "downloads",
    "python main.py --coco_path my_data --preset small --output_dir output/mine --track tensorboard csv": (
        "needs TensorBoard; test_trackers.py does the same"
    ),
    "tensorboard --logdir output/mine/track/tensorboard": "another program",
    "python export.py --resume output/quickstart/checkpoint.pth": "half a minute; test_export.py does the same",
    "python export.py --resume output/quickstart/checkpoint.pth --format onnx": "the same",
    "python export.py --resume output/quickstart/checkpoint.pth --format openvino --size 640 864": "the same",
    "python export.py --resume output/quickstart/checkpoint.pth --format torch_export --output detector.pt2": "too",
    "python benchmarks/convergence.py --output output/convergence": "hours; test_convergence.py runs it smaller",
    "python benchmarks/convergence.py --output output/convergence --size 160 --rows off aligner smca": "hours",
    "python benchmarks/convergence.py --output output/convergence --rows off aligner smca --seeds 4 5": "half an hour",
    "python benchmarks/convergence.py --output output/convergence --rows off aligner smca --images 150 --epochs 80": (
        "an hour"
    ),
    "python benchmarks/convergence.py --output output/convergence --rows off aligner smca --images 375 --epochs 32": (
        "an hour"
    ),
    "python benchmarks/convergence.py --output output/cells --coco_path bccd --rows off aligner smca --size 128 "
    "--epochs 16 --num_queries 64 --batch_size 4 --lr 4e-4 --lr_backbone 4e-4": "an hour",
    "python benchmarks/convergence.py --output output/convergence --report": "needs the hours before",
}
# Smaller, to be quick.
REPLACED = {
    "--num_train 2000 --num_val 300": "--num_train 8 --num_val 4",
    "--lr 2e-5 --epochs 12": "--lr 2e-5 --epochs 2",
    "--size 640 864": "--size 64 96 --backbone resnet18",
    "--latency 3": "--latency 1 --size 64 96",
}
# These come before the flags of the text, which therefore win.
SMALL = [*(flag for flag in TINY if flag != "--smca"), *TINY_DATA, "--epochs", "1"]
# Flags of other programs.
FOREIGN = {
    "tensorboard": ["--logdir"],
    "torchrun": ["--nproc_per_node", "--use_env", "--max-restarts"],
    "SLURM": ["--ntasks", "--nodes", "--partition"],
}
# Files that runs write, which are named like those of the repository.
WRITTEN = {"log.txt", "times.txt", "bad_images.txt", "labelmap.txt", "track/", "step.csv", "epoch.csv"}


class Block(NamedTuple):
    """Fenced text of a page."""

    page: str
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """Of a bash block: its lines, continued ones joined, without comments."""
        lines = re.sub(r"\s*\\\n\s*", " ", self.text).splitlines()
        return [line for line in (re.sub(r"(^|\s+)#.*", "", line).strip() for line in lines) if line]


def read(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    return [Block(page, *found) for found in re.findall(r"^```(\w*)\n(.*?)^```$", read(page), re.MULTILINE | re.DOTALL)]


def prose(page: str) -> str:
    """The text outside of fenced blocks."""
    return re.sub(r"^```\w*\n.*?^```$", "", read(page), flags=re.MULTILINE | re.DOTALL)


def split_command(command: str) -> tuple[dict[str, str], list[str]]:
    """Variables that are set in front of a command, and its words."""
    variables, words = {}, shlex.split(command)
    while words and re.match(r"[A-Z_]+=", words[0]):
        name, variables[name] = words[0].split("=", 1)[0], words[0].split("=", 1)[1]
        words = words[1:]
    return variables, words


def launched(command: str) -> list[str] | None:
    """The flags of main.py in a command that starts it in several processes or in a loop, else None."""
    if not command.startswith(("torchrun ", "srun ", "python -m torch.distributed.launch ", "until ")):
        return None
    return shlex.split(command.split(" main.py ")[1].split(";")[0])


def program(words: list[str]) -> Callable[..., int | None] | None:
    """The function that runs these words in this process, if any; it takes the flags."""
    if words[0] == "samdetr":
        return console.main
    if words[0] != "python":
        return None
    if words[1] in ("main.py", "demo.py"):
        return import_module(f"samdetr.{words[1].removesuffix('.py')}").main
    if words[1] == "-m" and words[2].startswith(("datasets.", "models.")):
        name = f"samdetr.{words[2]}"
        return import_module(f"{name}.__main__" if name.endswith(".check") else name).main
    return None


def flags_of(words: list[str]) -> list[str]:
    """The words after the program, small settings before them if they start a training."""
    if words[0] == "samdetr":
        return words[1:]
    flags = words[3:] if words[1] == "-m" else words[2:]
    if words[1] != "main.py":
        return flags
    return [*(["--device", "cpu", "--num_workers", "0"] if {"--eval", "--replay"} & {*flags} else SMALL), *flags]


def is_recipe(words: list[str]) -> bool:
    """Whether a command runs a script that starts main.py, which DRY_RUN=1 shows instead."""
    return (
        words[0] == "bash"
        and words[1].startswith("scripts/")
        and Path(words[1]).stem not in ("gpu_check", "quickstart", "setup", "test", "typecheck")
    )


def all_commands() -> list[str]:
    return [
        command for page in PAGES for block in blocks(page) if block.language == "bash" for command in block.commands
    ]


def test_every_command_is_run_or_listed():
    commands = all_commands()
    assert len(commands) > 50  # the expressions above find them
    for command in commands:
        words = split_command(command)[1]
        ways = [launched(command) is not None, is_recipe(words), command in NOT_RUN or program(words) is not None]
        assert sum(ways) == 1, f"{command!r} is neither run by this test nor listed in NOT_RUN with the reason"
    assert not NOT_RUN.keys() - {*commands}, "no page has these commands any more"
    assert {block.language for page in PAGES for block in blocks(page)} == {"", "bash", "python", "bibtex"}


@pytest.mark.parametrize("command", [c for c in all_commands() if launched(c) is not None])
def test_flags_of_launched_runs_are_understood(command):
    flags = launched(command)
    settings = cli.parse(flags).settings
    assert settings.run.output_dir
    assert settings.optimisation.epochs == (12 if "--epochs 12" in command else 50)


@pytest.mark.parametrize("command", [c for c in all_commands() if is_recipe(split_command(c)[1])])
def test_recipes_start_with_understood_flags(command):
    variables, words = split_command(command)
    run = subprocess.run(
        words,
        cwd=REPOSITORY,
        env=environment(**{**variables, "DRY_RUN": "1"}),
        capture_output=True,
        text=True,
        check=True,
    )
    started = shlex.split(run.stdout)
    settings = cli.parse(started[started.index("main.py") + 1 :]).settings
    assert settings.data.coco_path == variables.get("COCO_PATH", "data/coco")
    given = words[2:]
    assert started[len(started) - len(given) :] == given  # further flags pass through


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder with all that the pages assume: small data, small trained networks, images."""
    folder = tmp_path_factory.mktemp("docs")
    main = import_module("samdetr.main").main
    with at(folder):
        shapes = import_module("samdetr.datasets.shapes").main
        assert shapes(["--output", "data/shapes", "--num_train", "8", "--num_val", "4", "--size", "64"]) in (0, None)
        for name in ("data/coco", "my_data"):
            shutil.copytree("data/shapes", name)
        for name, network in {"quickstart": TINY, "multiscale": MULTISCALE}.items():
            flags = ["--coco_path", "my_data", *TINY_DATA, *network, "--epochs", "1", "--lr_drop", "50"]
            assert main([*flags, "--output_dir", f"output/{name}"]) == 0
        # Steps so large that the second loss is not finite: the run stops and leaves replay.pth.
        flags = ["--coco_path", "my_data", *SMALL, "--lr", "1e30", "--clip_max_norm", "0", "--max_bad_steps", "1"]
        assert main([*flags, "--output_dir", "diverged"]) == 2
        Path("output/mine").mkdir()
        shutil.move("diverged/replay.pth", "output/mine/replay.pth")
        shutil.rmtree("diverged")
        Path("output/r50_smca_e12").mkdir()
        shutil.copy("output/quickstart/checkpoint.pth", "output/r50_smca_e12/checkpoint.pth")
        shutil.copy("output/quickstart/checkpoint.pth", "pretrained.pth")
        torch.save(torchvision.models.resnet18(weights=None).state_dict(), "resnet50.pth")
    shutil.copytree(REPOSITORY / "images", folder / "images")
    shutil.copy(REPOSITORY / "images/shapes_2002.jpg", folder / "photo.jpg")
    shutil.copy(REPOSITORY / "hubconf.py", folder)
    (folder / "docs").mkdir()
    shutil.copy(REPOSITORY / "docs/example_family.py", folder / "docs")
    return folder


@contextmanager
def at(folder: Path) -> Iterator[None]:
    """Inside, this process works in a folder, on one thread."""
    before, threads = Path.cwd(), torch.get_num_threads()
    os.chdir(folder)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        os.chdir(before)
        torch.set_num_threads(threads)


@pytest.fixture
def no_plugins() -> Iterator[None]:
    """Families that a page registers are gone afterwards."""
    before, modules = dict(FAMILIES), {*sys.modules}
    yield
    FAMILIES.clear()
    FAMILIES.update(before)
    for name in [name for name in sys.modules if name.startswith("samdetr_plugin_") and name not in modules]:
        del sys.modules[name]


def run_bash(command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    for text, smaller in REPLACED.items():
        command = command.replace(text, smaller)
    variables, words = split_command(command)
    call = program(words)
    assert call is not None
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", sys.argv)
        for name, value in variables.items():
            patch.setenv(name, value)
        try:
            flags = flags_of(words)
            return (call(flags) if flags else call()) or 0
        except SystemExit as end:
            return int(end.code or 0)


RUN = [page for page in PAGES if any(b.language in ("bash", "python") for b in blocks(page))]
RUN.remove("docs/export.md")  # its program needs an exported file: test_export.py runs it


@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import of package:RuntimeWarning")  # by runpy
@pytest.mark.parametrize("page", RUN)
def test_commands_and_programs_of_a_page_run_one_after_another(page, prepared, tmp_path, monkeypatch, no_plugins):
    folder = tmp_path / "work"
    shutil.copytree(prepared, folder)
    with at(folder):
        for block in blocks(page):
            if block.language == "python":
                exec(compile(block.text, page, "exec"), {"__name__": "__main__"})
            elif block.language == "bash":
                for command in block.commands:
                    _, words = split_command(command)
                    if command not in NOT_RUN and launched(command) is None and not is_recipe(words):
                        status = run_bash(command, monkeypatch)
                        # A replayed step that is not finite here either ends with 1.
                        assert status == (1 if "--replay" in words else 0), command


def test_first_success_draws_a_picture(prepared, tmp_path):
    """README's three lines of Python, after its quick start."""
    folder = tmp_path / "work"
    shutil.copytree(prepared, folder)
    (program,) = [block for block in blocks("README.md") if block.language == "python"]
    assert len([line for line in program.text.splitlines() if line]) == 3
    with at(folder):
        exec(compile(program.text, "README.md", "exec"), {})
    assert (folder / "drawn.jpg").stat().st_size > 1000


@pytest.mark.slow
def test_quick_start(tmp_path):
    """scripts/quickstart.sh as README has it, one epoch, in a copy whose .venv is this environment."""
    copy = tmp_path / "copy"
    leave_out = shutil.ignore_patterns(".git", ".venv", "data", "output", "tests", "__pycache__", ".*_cache")
    shutil.copytree(REPOSITORY, copy, ignore=leave_out)
    (copy / ".venv/bin").mkdir(parents=True)
    python = copy / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    shutil.copy(copy / "requirements.txt", copy / ".venv/installed-requirements.txt")
    command = blocks("README.md")[0].commands[0]
    assert command == "bash scripts/quickstart.sh"
    variables = environment(PYTHONPATH=str(copy))
    subprocess.run([*shlex.split(command), "--epochs", "1"], cwd=copy, env=variables, check=True, timeout=1200)
    assert list((copy / "output/quickstart/pictures").glob("det_res_*"))
    assert (copy / "output/quickstart/eval/eval.json").is_file()


def known_flags() -> set[str]:
    """Of all programs of the project."""
    found = {*cli.build_parser()._option_string_actions, *(flag for flags in FOREIGN.values() for flag in flags)}
    for path in REPOSITORY.rglob("*.py"):
        if not {".venv", "output", "data"} & {*path.relative_to(REPOSITORY).parts[:1]}:
            for call in re.findall(r"add_argument\((.*?)\)", path.read_text(encoding="utf-8"), re.DOTALL):
                found |= set(re.findall(r'"(--[\w-]+)"', call))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_that_is_named_exists(page):
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", read(page)))
    wrong = named - known_flags() - {"--version"}
    if page == "docs/training.md":
        assert "--epoch" in wrong  # the page's example of a misspelled flag
        wrong.remove("--epoch")
    assert not wrong


def anchors(page: Path) -> set[str]:
    """Of headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(str(page.relative_to(REPOSITORY))), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    here = REPOSITORY / page
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (here.parent / file).resolve() if file else here
        assert path.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(path), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_exists(page):
    for name in re.findall(r"`([\w./-]+(?:\.(?:py|sh|md|toml|txt|yml)|/))`", prose(page)):
        if (
            name in WRITTEN or name.startswith(("train2017", "val2017", "annotations")) or re.search(r"[A-Z]{4,}", name)
        ):  # scripts/NAME.sh
            continue
        layouts = [f"tests/layouts/{layout}" for layout in ("roboflow", "yolo", "voc")]  # of users' data
        folders = ("", "docs", "models", "models/ops", "datasets", "training", *layouts)
        assert any((REPOSITORY / folder / name).exists() for folder in folders), f"{page}: {name}"


@pytest.mark.parametrize("file", [".pre-commit-config.yaml", ".github/workflows/tests.yml"])
def test_what_hooks_and_workflows_call_exists(file):
    called = re.findall(r"(?:tests|scripts)/\w+\.(?:py|sh)", read(file))
    assert called
    assert all((REPOSITORY / name).is_file() for name in called)


def test_readme_is_a_page():
    assert len(read("README.md").splitlines()) <= 150
