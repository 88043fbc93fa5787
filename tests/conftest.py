"""A tiny data set and a tiny network that was trained on it, made once for all tests that run real command lines."""

import gc
import os
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# Tests compute little at a time: a second thread costs more than it brings, and ten times as much on a busy machine.
# Set before PyTorch is imported, and for the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from helpers import MULTISCALE, TINY, Forks, forget_kernels, run_main

from samdetr.datasets.shapes import write_dataset
from samdetr.models.ops import build
from samdetr.training import loop

torch.set_num_threads(1)
# Drawing takes longer than an epoch. test_visualize.py draws curves, and so do runs that `run_process` starts.
loop.plot_training_curves = lambda lines, path: path.write_text(str(len(lines)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config) -> int:
    """Two processes for all tests; none besides pytest's own for named files or tests: starting them takes seconds."""
    return 0 if any(".py" in word for word in config.args) else 2


def pytest_collection_finish() -> None:
    """A million objects of PyTorch's modules stay for ever: the garbage collector need not walk through them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """16 images of 64 x 64 to train on, the thirteenth of them empty, and 7 for validation; do not write into it."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_dataset(folder, num_train=16, num_val=7, size=64, seed=0)
    return folder


@pytest.fixture
def own_shapes(shapes, tmp_path) -> Path:
    """A copy of `shapes` to spoil."""
    return Path(shutil.copytree(shapes, tmp_path / "shapes"))


def train(data: Path, output: Path, network: list[str]) -> Path:
    run_main(data, "--epochs", "2", "--lr_drop", "1", "--lr", "1e-3", "--output_dir", str(output), network=network)
    return output


@pytest.fixture(scope="session")
def trained(shapes, tmp_path_factory) -> Path:
    """Output folder of two epochs, the learning rate falling to a tenth after the first; do not write into it."""
    return train(shapes, tmp_path_factory.mktemp("run") / "output", TINY)


@pytest.fixture(scope="session")
def trained_multiscale(shapes, tmp_path_factory) -> Path:
    """The same of a network of three levels."""
    return train(shapes, tmp_path_factory.mktemp("run") / "output", MULTISCALE)


@pytest.fixture(params=["one scale", "three scales"])
def trained_any(request) -> Path:
    """One after the other."""
    return request.getfixturevalue("trained" if request.param == "one scale" else "trained_multiscale")


@pytest.fixture(scope="session")
def forks():
    forks = Forks()
    yield forks
    forks.close()


class Server(ThreadingHTTPServer):
    requests = 0


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        self.server.requests += 1


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves the files of `tmp_path` and counts requests; what is fetched is kept there."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    monkeypatch.setenv("no_proxy", "*")
    with Server(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache folder, and nothing remembered of earlier builds of kernels."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("MS_DEFORM_ATTN", raising=False)
    forget_kernels()
    yield tmp_path
    monkeypatch.undo()
    forget_kernels()


@pytest.fixture(scope="session")
def library() -> Path:
    """The kernels for CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CXX", raising=False)
        try:
            return build.build(build.cpu_recipe())
        except build.BuildError as error:
            pytest.skip(f"no kernels for CPUs: {error}")


@pytest.fixture
def built(library, fresh, monkeypatch) -> Path:
    """As `fresh`, but the library is there already."""
    monkeypatch.delenv("CXX", raising=False)
    folder = build.cpu_recipe().library.parent
    folder.mkdir(mode=0o700, parents=True)
    for file in (library, build.checksum_file(library)):
        shutil.copy2(file, folder)
    return fresh
