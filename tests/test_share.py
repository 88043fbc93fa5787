"""`samdetr slim`, and folders and repositories of its files: the same detector in every program that reads them."""

import inspect
import json
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from helpers import OFFICIAL_TINY, TINY_SAP, build_tiny, call_main, evaluate, read_log, save

from samdetr import from_pretrained, load, push_to_hub, save_pretrained, slim as program
from samdetr.inference.share import slim
from samdetr.models.checkpoints import RUN_SETTINGS, chosen_weights, read_checkpoint
from samdetr.training.finetune import SEEN
from samdetr.training.resume import AS_TRAINED
from samdetr.util.checkpoint import save_file

library = pytest.importorskip("safetensors.torch")


@pytest.fixture(scope="module")
def slimmed(trained, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("slim") / "detector.safetensors"
    assert program.main([str(trained / "checkpoint.pth"), str(path)]) == 0
    return path


def header(path: Path) -> dict:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])


def rewritten(path: Path, out: Path, change) -> Path:
    """The file with another header, which `change` edits in place: all of it, and our values in it."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    parts = json.loads(content[8 : 8 + length])
    values = json.loads(parts["__metadata__"]["samdetr"])
    change(parts, values)
    if "samdetr" in parts["__metadata__"]:
        parts["__metadata__"]["samdetr"] = json.dumps(values)
    new = json.dumps(parts).encode()
    out.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :])
    return out


def test_same_detections_from_a_third_of_the_size(trained, slimmed, shapes, tmp_path, capsys):
    """A run without averages: weights, and two moments of Adam that are left out. Evaluation needs no other word."""
    checkpoint = trained / "checkpoint.pth"
    assert slimmed.stat().st_size == pytest.approx(checkpoint.stat().st_size / 3, rel=0.1)
    assert slimmed.stat().st_mode == checkpoint.stat().st_mode
    figures = [evaluate(shapes, file, tmp_path / file.suffix) for file in (checkpoint, slimmed)]
    assert figures[0] == figures[1]
    assert "world_size" in RUN_SETTINGS
    assert {*AS_TRAINED, *SEEN} <= {*RUN_SETTINGS}
    values = json.loads(header(slimmed)["__metadata__"]["samdetr"])
    assert [row["name"] for row in values["categories"]] == ["ellipse", "triangle", "rectangle", "star"]
    assert not {"coco_path", "output_dir"} & {*values["settings"]}  # no place of the machine
    assert str(trained.parent) not in json.dumps(values)


def test_half_of_it(trained, slimmed, tmp_path):
    """Matrices and kernels in 16 bits, vectors (a variance of 1e6 among them) as they were; a network of float32."""
    predictor = load(str(slimmed), device="cpu")
    weights = predictor.model.state_dict()
    norm = next(value for name, value in weights.items() if name.endswith("running_var"))
    norm[0] = 1e6
    slim(predictor, tmp_path / "whole.safetensors")
    slim(predictor, tmp_path / "half.safetensors", half=True)
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("whole", "half")]
    assert 0.5 < sizes[1] / sizes[0] < 0.62  # a small network's names and vectors weigh something
    found = load(str(tmp_path / "half.safetensors"), device="cpu").model.state_dict()
    assert found.keys() == weights.keys()
    for name, value in found.items():
        assert value.dtype == weights[name].dtype
        bound = 5e-4 if value.ndim > 1 else 0  # 11 bits
        torch.testing.assert_close(value, weights[name], rtol=bound, atol=1e-7 if bound else 0)
    assert program.main([str(trained / "checkpoint.pth"), str(tmp_path / "c.safetensors"), "--half"]) == 0
    assert (tmp_path / "c.safetensors").stat().st_size == pytest.approx(sizes[1], rel=0.02)


def test_training_starts_from_it(slimmed, shapes, tmp_path, capsys):
    out = str(tmp_path / "resumed")
    assert call_main(shapes, "--resume", str(slimmed), "--epochs", "1", "--output_dir", out, network=[]) == 0
    assert "the optimiser starts anew: this file has no state of it" in capsys.readouterr().out
    assert [line["epoch"] for line in read_log(tmp_path / "resumed")] == [0]
    out = str(tmp_path / "tuned")
    assert call_main(shapes, "--pretrained", str(slimmed), "--epochs", "1", "--output_dir", out, network=[]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[2:] for line in table if line[:1] == ["encoder"]] == [["0", "0"]]  # nothing new, nothing left out


@pytest.mark.parametrize("raw", [False, True])
def test_averaged_weights(raw, tmp_path):
    """Heads that layers share lie in the file once."""
    detector, settings = build_tiny(network=TINY_SAP)
    state = detector.state_dict()
    averaged = {name: value * 0.9 if value.is_floating_point() else value for name, value in state.items()}
    save_file(
        {"schema_version": 1, "model": state, "ema": {"model": averaged}, "settings": settings}, tmp_path / "a.pth"
    )
    flags = ["--raw_weights"] if raw else []
    assert program.main([str(tmp_path / "a.pth"), str(tmp_path / "a.safetensors"), *flags]) == 0
    wanted = chosen_weights(read_checkpoint(str(tmp_path / "a.pth")), raw=raw)
    found = read_checkpoint(str(tmp_path / "a.safetensors"))
    assert found["model"].keys() == wanted.keys()
    assert all(torch.equal(found["model"][name], wanted[name]) for name in wanted)
    assert "ema" not in found
    distinct = {(value.data_ptr(), value.shape) for value in detector.state_dict().values()}
    assert len(header(tmp_path / "a.safetensors")) - 1 == len(distinct) < len(wanted)


def test_official_file(tmp_path, shapes):
    """Under our names, with COCO's classes."""
    detector, settings = build_tiny(network=OFFICIAL_TINY, num_classes=91)
    save(detector, settings, tmp_path / "official.pth", official=True)
    before = load(str(tmp_path / "official.pth"))
    after = load(str(slim(tmp_path / "official.pth", tmp_path / "x.safetensors")))
    assert after.categories == before.categories
    assert after.settings == before.settings
    for one, two in zip(before.model.state_dict().values(), after.model.state_dict().values(), strict=True):
        assert torch.equal(one, two)


def test_nothing_is_replaced_unasked(trained, slimmed, tmp_path, capsys):
    out = tmp_path / "x.safetensors"
    out.write_text("mine")
    for path, said in (
        (out, f"{out} is there already; pass --overwrite"),
        (tmp_path / "x.pth", "must end in .safetensors"),
    ):
        assert program.main([str(trained / "checkpoint.pth"), str(path)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert said in error
    assert out.read_text() == "mine"
    assert program.main([str(trained / "checkpoint.pth"), str(out), "--overwrite"]) == 0
    assert out.read_bytes() == slimmed.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"x.safetensors"}


def swap_ids(parts, values):
    values["categories"][0]["id"] = 77


CHANGES = {
    "another id": (swap_ids, "does not match its checksum"),
    "no checksum": (lambda parts, values: values.pop("checksum"), "does not match its checksum"),
    "another version": (lambda parts, values: values.update(schema_version=99), "does not match its checksum"),
    "no settings": (lambda parts, values: values.pop("settings"), "does not match its checksum"),
    "not a dict": (lambda parts, values: parts["__metadata__"].update(samdetr="[1]"), "cut or damaged"),
    "shared with nothing": (lambda parts, values: values.update(shared={"a": "b"}), "cut or damaged"),
    "others' metadata": (lambda parts, values: parts["__metadata__"].pop("samdetr"), "safetensors file; convert it"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_damaged_and_foreign_files(name, slimmed, tmp_path):
    change, said = CHANGES[name]
    if name == "not a dict":  # `rewritten` would put our values back
        content = slimmed.read_bytes()
        old = struct.unpack("<Q", content[:8])[0]
        parts = json.loads(content[8 : 8 + old])
        change(parts, {})
        new = json.dumps(parts).encode()
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(new)) + new + content[8 + old :])
    else:
        rewritten(slimmed, tmp_path / "x.safetensors", change)
    with pytest.raises(ValueError, match=said) as caught:
        load(str(tmp_path / "x.safetensors"))
    assert str(tmp_path / "x.safetensors") in str(caught.value)


def test_changed_weights_and_cut_files(slimmed, tmp_path):
    content = bytearray(slimmed.read_bytes())
    content[-5] ^= 1
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="does not match its checksum"):
        load(str(tmp_path / "x.safetensors"))
    (tmp_path / "x.safetensors").write_bytes(content[:-100])
    with pytest.raises(ValueError, match="cut"):
        load(str(tmp_path / "x.safetensors"))


def test_without_the_package(slimmed, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        load(str(slimmed))
    assert program.main([str(trained / "checkpoint.pth"), str(tmp_path / "x.safetensors")]) == 2
    assert "pip install safetensors" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


# ---- Folders and repositories


class LocalHub:
    """What this project calls of huggingface_hub, in a folder instead of on a server."""

    def __init__(self, folder: Path):
        self.folder, self.calls = folder, []

    def HfApi(self, token=None):
        self.calls.append(token)
        return self

    def create_repo(self, repo_id, *, private, exist_ok):
        (self.folder / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        self.calls.append(private)

    def file_exists(self, repo_id, name):
        return (self.folder / repo_id / name).is_file()

    def upload_folder(self, *, repo_id, folder_path, commit_message, ignore_patterns):
        ignore = shutil.ignore_patterns(*ignore_patterns)
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True, ignore=ignore)
        return f"uploaded to {repo_id}"

    def hf_hub_download(self, repo_id, name, *, revision, token):
        self.calls.append((revision, token))
        if not (self.folder / repo_id / name).is_file():
            raise RuntimeError("Entry\nnot found")
        return str(self.folder / repo_id / name)


def test_folder(trained, slimmed, tmp_path):
    folder = save_pretrained(trained / "checkpoint.pth", tmp_path / "mine")
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "README.md"}
    assert (folder / "model.safetensors").read_bytes() == slimmed.read_bytes()
    assert "triangle" in (folder / "README.md").read_text()
    found = from_pretrained(folder, device="cpu")
    assert found.categories.names[5] == "star"
    (folder / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        save_pretrained(found, folder)
    save_pretrained(found, folder, overwrite=True)
    assert (folder / "README.md").read_text() == "mine"
    assert (folder / "model.safetensors").read_bytes() == slimmed.read_bytes()


def test_repository(trained, slimmed, tmp_path, monkeypatch):
    hub = LocalHub(tmp_path / "hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    for _ in range(2):
        assert push_to_hub(trained / "checkpoint.pth", "me/shapes", private=True, token="t") == "uploaded to me/shapes"
        assert (tmp_path / "hub/me/shapes/model.safetensors").read_bytes() == slimmed.read_bytes()
        assert "triangle" in (tmp_path / "hub/me/shapes/README.md").read_text()
    assert hub.calls == ["t", True, "t", True]
    (tmp_path / "hub/me/shapes/README.md").write_text("written by hand")
    push_to_hub(load(str(slimmed)), "me/shapes")
    assert (tmp_path / "hub/me/shapes/README.md").read_text() == "written by hand"
    monkeypatch.chdir(tmp_path)
    assert from_pretrained("me/shapes", revision="v1", device="cpu").categories.names[5] == "star"
    assert hub.calls[-1] == ("v1", None)


def test_what_is_no_repository(tmp_path, monkeypatch, trained):
    monkeypatch.setitem(sys.modules, "huggingface_hub", LocalHub(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for source, said in {
        "empty": "empty has no model.safetensors",
        "nothing": "neither a folder nor OWNER/NAME",
        "me/nothing": "me/nothing is no folder, and cannot be fetched: Entry not found",
        trained / "checkpoint.pth": "pass a file to `samdetr.load`",
    }.items():
        with pytest.raises(ValueError, match=said):
            from_pretrained(source)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: from_pretrained("me/x"), lambda: push_to_hub(trained / "checkpoint.pth", "me/x")):
        with pytest.raises(ValueError, match="pip install huggingface_hub"):
            call()


def test_names_of_the_package():
    """The arguments that the folder above stands in for exist in the real package."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    for call, names in {
        huggingface_hub.hf_hub_download: ("repo_id", "filename", "revision", "token"),
        huggingface_hub.HfApi.create_repo: ("repo_id", "private", "exist_ok"),
        huggingface_hub.HfApi.file_exists: ("repo_id", "filename"),
        huggingface_hub.HfApi.upload_folder: ("repo_id", "folder_path", "commit_message", "ignore_patterns"),
    }.items():
        assert {*names} <= {*inspect.signature(call).parameters}
