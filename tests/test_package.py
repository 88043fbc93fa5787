"""The import name in every way to get the code: a bare copy, an installed wheel, an editable install, torch.hub.

Every test runs other processes, most of them outside the repository.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from textwrap import dedent

import pytest
from helpers import MULTISCALE, REPOSITORY, TINY_DATA, environment
from test_two_processes import TORCHRUN

NOT_COPIED = (".*", "data", "output", "build", "dist", "shared", "tests", "docs", "__pycache__", "*.egg-info")


def run(*words, folder: Path, path: Path | None = None, seconds: int = 120, **variables) -> subprocess.CompletedProcess:
    """Run a command in a folder, without the repository on Python's path; `path` is there instead, if given."""
    surrounding = {name: value for name, value in environment(**variables).items() if name != "PYTHONPATH"}
    if path:
        surrounding["PYTHONPATH"] = str(path)
    return subprocess.run(
        list(map(str, words)), cwd=folder, env=surrounding, capture_output=True, text=True, timeout=seconds
    )


def check(*words, folder: Path, **options) -> str:
    """The same for a command that must succeed; what it prints."""
    done = run(*words, folder=folder, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def copy(tmp_path_factory) -> Path:
    """The files of the project, which nothing was installed from."""
    folder = tmp_path_factory.mktemp("bare") / "project"
    return Path(shutil.copytree(REPOSITORY, folder, ignore=shutil.ignore_patterns(*NOT_COPIED)))


def install(folder: Path, *words: str) -> Path:
    """The folder of programs of a new environment with this project; its dependencies are those of the tests."""
    venv.create(folder, symlinks=True)
    programs = folder / "bin"
    site = check(programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder)
    Path(site.strip(), "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    pip = (programs / "python", "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index")
    check(*pip, *words, folder=folder)
    return programs


@pytest.fixture(scope="session")
def installed(copy, tmp_path_factory) -> Path:
    """Programs of an environment that a wheel of the project was installed into."""
    pytest.importorskip("hatchling", reason="builds the wheel; in requirements-dev.txt")
    folder = tmp_path_factory.mktemp("installed")
    source = shutil.copytree(copy, folder / "source")
    programs = install(folder / "environment", str(source))
    shutil.rmtree(source)  # what is installed must not need it
    return programs


@pytest.fixture
def foreign(tmp_path) -> Path:
    """A folder with packages of others, called as folders of ours."""
    for name in ("datasets", "models", "util"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"OWNER = 'someone else: {name}'\n")
        (tmp_path / name / "build.py").write_text("OWNER = 'someone else'\n")
    return tmp_path


# What users import: programs, the public face, and a module of each folder.
NAMES = """
    import samdetr, samdetr.main, samdetr.demo, samdetr.export, samdetr.engine, samdetr.hubconf, samdetr.training.loop
    from samdetr import Detections, Predictor, SemanticsAligner, build_model, load, register
    from samdetr.datasets.coco import CocoDetection
    from samdetr.models.ops import doctor
    from samdetr.util.box_ops import cxcywh_to_xyxy
"""
FOREIGN = """
    import {names}
    for module in ({names}):
        assert module.OWNER == "someone else: " + module.__name__, module.__file__
    import models.build
    assert models.build.OWNER == "someone else"
"""


def script(*parts: str) -> str:
    return "\n".join(dedent(part) for part in parts)


def others(names: str = "datasets, models, util") -> str:
    return FOREIGN.format(names=names)


# ---- A bare copy


def test_bare_copy_runs_from_any_folder(copy, tmp_path):
    assert "--coco_path" in check(sys.executable, copy / "main.py", "--help", folder=tmp_path)
    check(sys.executable, "-m", "datasets.check", "--help", folder=copy)


def test_importing_the_name_alone_is_cheap(copy):
    code = "import sys, samdetr; assert 'torch' not in sys.modules; assert 'load' in dir(samdetr); samdetr.__version__"
    check(sys.executable, "-c", code, folder=copy)


def test_help_that_nobody_reads(copy):
    """`samdetr --help | head`: no traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run([sys.executable, "-m", "samdetr"], cwd=copy, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (run.returncode, run.stderr) == (141, b"")


# test_ops.py runs all checks.
@pytest.mark.parametrize("words", [["empty"], pytest.param([], marks=pytest.mark.slow)], ids=["some", "all"])
def test_operators_check_themselves_from_any_folder(words, copy, tmp_path):
    out = check(sys.executable, copy / "models" / "ops" / "test.py", *words, folder=tmp_path, seconds=280)
    assert out.endswith("all passed\n")
    assert "ok      cpu, plain: empty sets" in out


@pytest.mark.slow  # test_two_processes.py uses the launcher in the repository
def test_two_processes_evaluate(copy, trained, shapes, tmp_path):
    flags = ["--coco_path", shapes, *TINY_DATA, "--eval", "--resume", trained / "checkpoint.pth"]
    flags += ["--output_dir", tmp_path / "output"]
    check(sys.executable, *TORCHRUN, copy / "main.py", *flags, folder=tmp_path)
    assert (tmp_path / "output" / "eval.json").exists()


def start_workers_by(method: str, path: Path) -> None:
    """Set Python's default in every process that has this folder on its path."""
    (path / "sitecustomize.py").write_text(f"import multiprocessing as m; m.set_start_method({method!r}, force=True)")


@pytest.mark.slow  # workers of other tests are forks; test_image_cache.py spawns some
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_workers(method, copy, trained, shapes, tmp_path):
    """main.py as `__main__`, which spawned workers import again by its path."""
    start_workers_by(method, tmp_path)
    flags = ["--coco_path", shapes, *TINY_DATA, "--num_workers", "1", "--eval", "--resume", trained / "checkpoint.pth"]
    flags += ["--output_dir", tmp_path / "output"]
    check(sys.executable, copy / "main.py", *flags, folder=tmp_path, path=tmp_path)
    assert (tmp_path / "output" / "detections.json").exists()


# ---- Installed


def test_wheel_is_complete(installed, copy, tmp_path):
    """Every file that programs need, compiled operators and types among them, and no folder of a bare name."""
    out = check(installed / "python", "-c", "import samdetr; print(*samdetr.__path__)", folder=tmp_path)
    (folder,) = out.split()
    package = Path(folder)
    assert "site-packages" in package.parts
    for name in ("models", "datasets", "training", "inference", "util"):
        assert not (package.parent / name).exists()
        ours = {path.relative_to(copy) for path in (copy / name).rglob("*") if path.suffix != ".pyc" and path.is_file()}
        assert any(path.suffix == ".py" for path in ours)
        assert all((package / path).is_file() for path in ours), ours
    kernels = {path.suffix for path in (package / "models" / "ops").rglob("*")}
    assert {".cpp", ".cu", ".h"} <= kernels
    assert (package / "py.typed").is_file()
    assert {path.name for path in copy.glob("*.py")} == {path.name for path in package.glob("*.py")} - {
        "__init__.py",
        "__main__.py",
        "console.py",
    }


def test_installed_commands(installed, trained, shapes, tmp_path):
    samdetr = installed / "samdetr"
    listed = check(samdetr, folder=tmp_path)
    assert listed == check(samdetr, "--help", folder=tmp_path)
    for command in [
        "train",
        "eval",
        "predict",
        "export",
        "slim",
        "report",
        "compare",
        "count",
        "check",
        "convert",
        "doctor",
    ]:
        assert f"\n  {command} " in listed
    assert check(samdetr, "--version", folder=tmp_path).startswith("0.")
    wrong = run(samdetr, "trian", folder=tmp_path)
    assert (wrong.returncode, wrong.stderr) == (2, "samdetr: error: trian is no command; did you mean train?\n")
    assert "train" in check(samdetr, "check", shapes, folder=tmp_path)
    flags = ["--resume", trained / "checkpoint.pth", "--device", "cpu"]
    check(samdetr, "predict", *flags, "--images", shapes / "val2017", "--limit", "1", "--output", "o", folder=tmp_path)
    assert len(list((tmp_path / "o").glob("det_res_*"))) == 1


@pytest.mark.slow
def test_installed_training(installed, shapes, tmp_path):
    """Train with spawned workers, evaluate, ask the doctor, all from an empty folder."""
    start_workers_by("spawn", tmp_path)
    data = ["--coco_path", shapes, *TINY_DATA, "--num_workers", "1"]
    samdetr = installed / "samdetr"
    check(samdetr, "train", *data, *MULTISCALE, "--epochs", "1", "--output_dir", "run", folder=tmp_path, path=tmp_path)
    flags = ["--resume", "run/checkpoint.pth", "--output_dir", "eval"]
    check(samdetr, "eval", *data, *flags, folder=tmp_path, path=tmp_path)
    assert (tmp_path / "eval" / "eval.json").exists()
    assert "cpu (" in check(samdetr, "doctor", folder=tmp_path)


@pytest.mark.slow  # what users install is a wheel
def test_editable_install(copy, tmp_path):
    pytest.importorskip("hatchling", reason="builds the wheel; in requirements-dev.txt")
    source = shutil.copytree(copy, tmp_path / "source")
    programs = install(tmp_path / "environment", "--editable", str(source))
    code = script(NAMES, "print(samdetr.models.__file__, samdetr.__version__)")
    (tmp_path / "empty").mkdir()
    assert str(source / "models") in check(programs / "python", "-c", code, folder=tmp_path / "empty")
    assert check(programs / "samdetr", "--version", folder=tmp_path / "empty").startswith("0.")


# ---- Beside others


def test_packages_of_others(installed, foreign):
    """Imported before ours, and after."""
    check(installed / "python", "-c", script(others(), NAMES, others()), folder=foreign)
    check(installed / "python", "-c", script(NAMES, others()), folder=foreign)


def test_hub_beside_packages_of_others(copy, foreign, trained):
    load = f"""
        import torch
        from pathlib import Path
        repository = {str(copy)!r}
        with torch.device("meta"):
            network = torch.hub.load(repository, "sam_detr_r50_smca", source="local")
        assert type(network).__module__ == "samdetr.models.detector"
        predictor = torch.hub.load(
            repository, "detector", source="local", checkpoint={str(trained / "checkpoint.pth")!r}, device="cpu"
        )
        assert len(predictor.predict(torch.zeros(3, 64, 80), threshold=0)) > 0
        from samdetr.models.ops import doctor  # after torch.hub took the repository off the path
    """
    check(sys.executable, "-c", script(others(), load, others()), folder=foreign)
    check(sys.executable, "-c", script(load, others()), folder=foreign)


def test_aligner_in_a_repository_of_others(installed, foreign):
    """A model of a repository that has a folder models/ builds the module."""
    (foreign / "models" / "detr.py").write_text(
        dedent("""
            import torch
            from samdetr import SemanticsAligner

            def step():
                torch.manual_seed(0)
                aligner = SemanticsAligner(hidden_dim=32, num_heads=4)
                return sum(p.numel() for p in aligner.parameters())
        """)
    )
    (foreign / "main.py").write_text("from models.detr import step\nprint(step())\n")
    assert int(check(installed / "python", "main.py", folder=foreign)) > 1000


# ---- What the aligner brings along


def test_the_aligner_needs_few_of_our_lines(copy):
    """To put it into another code base one reads these files and no others."""
    code = """
        import sys
        import samdetr.models.semantics_aligner
        files = {getattr(m, "__file__", None) for n, m in sys.modules.items() if n.partition(".")[0] == "samdetr"}
        for file in sorted(filter(None, files)):
            with open(file) as text:
                print(len(text.readlines()), file)
    """
    lines = check(sys.executable, "-c", dedent(code), folder=copy).splitlines()
    assert any("semantics_aligner" in line for line in lines)
    assert sum(int(line.split()[0]) for line in lines) <= 430, lines
