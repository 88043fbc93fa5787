"""docs/tutorial.ipynb: it holds its outputs, and runs from the files that the quick start leaves."""

import base64
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY, environment
from PIL import Image

NOTEBOOK = REPOSITORY / "docs" / "tutorial.ipynb"


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def pictures(cell: dict) -> list[Image.Image]:
    found = [output.get("data", {}).get("image/png") for output in cell["outputs"]]
    return [Image.open(io.BytesIO(base64.b64decode("".join(each)))) for each in found if each]


def test_outputs_are_there_and_small():
    text = NOTEBOOK.read_text()
    assert len(text) < 400_000
    notebook = json.loads(text)
    assert 10 <= len(notebook["cells"]) <= 15
    cells = code_cells(notebook)
    kinds = [output["output_type"] for cell in cells for output in cell["outputs"]]
    assert all(cell["outputs"] for cell in cells)
    assert "error" not in kinds
    assert [len(pictures(cell)) for cell in cells] == [0, 1, 1, 0, 1, 1, 0, 0]
    assert str(Path.home()) not in text
    for cell in cells:
        compile("".join(cell["source"]), "cell", "exec")


@pytest.mark.slow
def test_notebook_runs(trained, shapes, tmp_path, monkeypatch):
    """From a folder that looks like that of the quick start, in another process."""
    nbclient = pytest.importorskip("nbclient", reason="pip install 'samdetr[notebook]'")
    pytest.importorskip("ipykernel")
    nbformat = pytest.importorskip("nbformat")
    (tmp_path / "docs").mkdir()
    shutil.copytree(REPOSITORY / "images", tmp_path / "images")
    shutil.copytree(shapes, tmp_path / "data" / "shapes")
    shutil.copytree(trained, tmp_path / "output" / "quickstart")
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}:{':'.join(path for path in sys.path if path)}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in code_cells(notebook):
        cell["outputs"] = []
        cell["source"] = cell["source"].replace("THRESHOLD = 0.3", "THRESHOLD = 0")  # it was trained for seconds
    resources = {"metadata": {"path": str(tmp_path / "docs")}}
    nbclient.NotebookClient(notebook, timeout=200, resources=resources).execute()  # raises what a cell raises
    assert [len(pictures(cell)) for cell in code_cells(notebook)] == [0, 1, 1, 0, 1, 1, 0, 0]
    written = {path.name for path in (tmp_path / "output" / "tutorial").iterdir()}
    assert {"predicted", "eval", "detector.safetensors"} <= written
