"""Files that somebody else wrote: each is refused with one line that says what is wrong, or works exactly."""

import argparse
import copy
import http.server
import io
import json
import os
import re
import struct
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, call_main, error_line, run_main
from PIL import Image

from samdetr.inference.predictor import load
from samdetr.util import download
from samdetr.util.checkpoint import save_file

NETWORK = [*TINY, "--backbone_level", "3"]
WEIGHT, BIAS = "decoder.layers.0.self_attention.value.weight", "decoder.class_heads.0.bias"


@pytest.fixture(scope="module")
def good(shapes, tmp_path_factory) -> dict:
    """A checkpoint inside an epoch."""
    output = tmp_path_factory.mktemp("run")
    run_main(shapes, "--epochs", "1", "--output_dir", str(output), network=NETWORK)
    content = torch.load(output / "checkpoint.pth", weights_only=True)
    del content["checksum"]
    return content


def put(*path, to) -> Callable[[dict], None]:
    """A change of the value at a place; `to` is the new one, or makes it of the old one."""

    def change(content: dict) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = to(content[path[-1]]) if callable(to) else to

    return change


def drop(*path) -> Callable[[dict], None]:
    def change(content: dict) -> None:
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


def weight(to) -> Callable[[dict], None]:
    return put("model", WEIGHT, to=to)


def swap(content: dict) -> None:
    model = content["model"]
    model[WEIGHT], model[BIAS] = model[BIAS], model[WEIGHT]


nested: list = []
for _ in range(400):
    nested = [nested]
doubling: list = [1]
for _ in range(40):
    doubling = [doubling, doubling]

# What every reader refuses: the change, and words of the message.
EVERYWHERE = {
    "integers": (weight(lambda w: w.long()), "another kind of numbers 1 (" + WEIGHT),
    "complex": (weight(lambda w: w.to(torch.complex64)), "of complex numbers"),
    "sparse": (weight(lambda w: w.to_sparse()), "sparse"),
    "quantised": (weight(lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.quint8)), "quantised"),
    "8 bits": (weight(lambda w: w.to(torch.float8_e4m3fn)), "8-bit"),
    "no memory": (weight(lambda w: w.to("meta")), "device meta"),
    "a view of terabytes": (weight(lambda w: torch.zeros(1).expand(10**6, 10**7)), "40000.0 GB"),
    "NaN": (weight(lambda w: w.fill_(torch.nan)), f"1024 of 1024 values of {WEIGHT}, 1 of"),
    "infinity": (put("model", BIAS, to=torch.tensor([torch.inf, *range(5)])), f"1 of 6 values of {BIAS}"),
    "a scalar": (put("model", BIAS, to=torch.tensor(1.0)), "the weights have 1 classes"),
    "nothing": (weight(lambda w: w[:0]), "(0, 32) in the file, (32, 32) here"),
    "a text as weight": (weight(lambda w: "x"), "no weights under 'model'"),
    "swapped": (swap, "(6,) in the file, (32, 32) here"),
    "a missing weight": (drop("model", WEIGHT), f"missing 1 ({WEIGHT})"),
    "a further weight": (lambda c: c["model"].update(more=torch.zeros(1)), "unexpected 1 (more)"),
    "two lines": (lambda c: c["model"].update({"a\nb": torch.zeros(1)}), "unexpected 1 ('a\\nb')"),
    "a number as name": (lambda c: c["model"].update({3: torch.zeros(1)}), "a key of 'model' is 3"),
    "lone surrogates": (lambda c: c["model"].update({"\udc80": torch.zeros(1)}), "'\\udc80'"),
    "no weights": (put("model", to={}), "no weights under 'model'"),
    "settings as list": (put("settings", to=[]), "'settings' is a list"),
    "a width as text": (put("settings", "hidden_dim", to="32"), "hidden_dim '32' is not an integer"),
    "true as width": (put("settings", "hidden_dim", to=True), "hidden_dim True is not an integer"),
    "a width of terabytes": (put("settings", "hidden_dim", to=10**9), "hidden_dim 1000000000 must be at most"),
    "a huge width": (put("settings", "hidden_dim", to=2**70), "must be at most"),
    "another width": (put("settings", "hidden_dim", to=64), "(32,) in the file, (64,) here"),
    "NaN as width": (put("settings", "hidden_dim", to=float("nan")), "hidden_dim nan is not an integer"),
    "a thousand layers": (put("settings", "enc_layers", to=1000), "more layers than it has tensors"),
    "one layer more": (put("settings", "dec_layers", to=3), "missing"),
    "half a layer": (put("settings", "dec_layers", to=2.5), "dec_layers 2.5"),
    "no queries": (put("settings", "num_queries", to=0), "num_queries 0"),
    "heads that do not divide": (put("settings", "nheads", to=5), "nheads 5"),
    "an image of terabytes": (put("settings", "eval_size", to=10**12), "eval_size 1000000000000"),
    "another family": (put("settings", "model", to="sap_detr"), "does not fit the network"),
    "an unknown family": (put("settings", "model", to=["x"]), "holds a a list of 1"),
    "an unknown backbone": (put("settings", "backbone", to="x"), "backbone"),
    "a switch as text": (put("settings", "smca", to="no"), "smca 'no' is not true or false"),
    "categories as text": (put("categories", to="cat"), "'categories' is 'cat'"),
    "a label beyond the outputs": (put("categories", 0, "label", to=6), "the label 6, the weights have 6 classes"),
    "a label twice": (put("categories", 0, "label", to=2), "a label twice"),
    "a name of a lone surrogate": (put("categories", 0, "name", to="\ud800"), "['name'] is '\\ud800'"),
    "an average without weights": (put("ema", to={}), "'ema' has no 'model'"),
    "a cut average": (
        lambda c: c.update(ema={"model": {n: w for n, w in c["model"].items() if n != BIAS}, "updates": 1}),
        f"missing 1 ({BIAS})",
    ),
    "a newer version": (put("schema_version", to=99), "schema version 99"),
    "a version as text": (put("schema_version", to="1"), "schema version '1'"),
    "NumPy": (put("x", to=np.float64(1)), "values of NumPy (numpy"),
    "flags as text": (put("args", to=argparse.Namespace(hidden_dim="32")), "hidden_dim '32'"),
}
# What only a run refuses that starts from the file.
IN_TRAINING = {
    "a negative epoch": (put("epoch", to=-1), "'epoch' is -1"),
    "an epoch as text": (put("epoch", to="1"), "'epoch' is '1'"),
    "a huge epoch": (put("epoch", to=10**400), "'epoch' is 1000"),
    "a negative step": (put("iteration", to=-1), "'iteration' is -1"),
    "another step": (put("iteration", to=3), "3 steps of 4 images"),
    "no order": (drop("sampler"), "no 'sampler'"),
    "a huge seed": (put("sampler", "seed", to=2**80), "'sampler'['seed']"),
    "no random numbers": (put("random_states", to=[]), "'random_states' is a list of 0"),
    "a cut generator": (put("random_states", 0, "torch", to=lambda t: t[:9]), "not the state of a generator"),
    "averages without counts": (drop("averages", 0, "counts", "loss"), "sums without counts"),
    "a batch as text": (put("settings", "batch_size", to="4"), "batch_size '4'"),
    "no processes": (put("settings", "world_size", to=0), "'world_size' is 0"),
    "counters as text": (put("extras", "bad_steps", "bad", to="x"), "'extras'['bad_steps']['bad']"),
    "a scale of NaN": (put("scaler", to={"scale": float("nan")}), "'scaler'['scale'] is nan"),
    "no moments": (put("optimizer", "state", to={}), "has no moments of"),
    "moments in another order": (
        put("optimizer", "state", to=lambda s: {k: s[len(s) - 1 - k] for k in s}),
        "the shape",
    ),
    "a learning rate as text": (put("optimizer", "param_groups", 0, "lr", to="x"), "['lr'] is 'x'"),
    "an optimiser as list": (put("optimizer", to=[]), "'optimizer' is a list"),
}
# What is as good as the original.
FINE = {
    "double": weight(lambda w: w.double()),
    "in another order in memory": weight(lambda w: w.t().contiguous().t()),
    "a part of a larger tensor": weight(lambda w: torch.cat([w, w])[: len(w)]),
    "a parameter": weight(torch.nn.Parameter),
    "from DataParallel": put("model", to=lambda m: {f"module.{name}": value for name, value in m.items()}),
    "further keys": lambda c: c.update({"x": {1: [2.0, "a"]}, "\udc80": None}),
    "no state of the optimiser": drop("optimizer"),
}


def written(good: dict, change, path: Path) -> Path:
    content = copy.deepcopy(good)
    change(content)
    try:
        save_file(content, path)
    except (RuntimeError, NotImplementedError):  # it has no checksum, or needs terabytes for it
        del content["schema_version"]
        torch.save(content, path)
    return path


def refused(reader: str, path: Path, shapes: Path, capsys) -> str:
    """What a reader says about the file, in one line."""
    if reader == "load":
        with pytest.raises(ValueError, match=r".") as caught:
            load(str(path), device="cpu")
        return str(caught.value).replace("`", "")
    flags = ["--eval"] if reader == "eval" else ["--epochs", "2"]
    network = [] if reader == "eval" else ["--backbone_norm", "learned"]
    assert call_main(shapes, "--resume", str(path), *flags, network=network) == 2
    return error_line(capsys.readouterr().err).replace("--", "")


@pytest.mark.parametrize("name", [*EVERYWHERE, *IN_TRAINING])
def test_manipulated_checkpoint(name, good, shapes, tmp_path, capsys):
    change, said = (EVERYWHERE | IN_TRAINING)[name]
    path = written(good, change, tmp_path / "x.pth")
    # The three readers in turn: what differs between them is in IN_TRAINING.
    reader = ["load", "eval", "resume"][list(EVERYWHERE).index(name) % 3] if name in EVERYWHERE else "resume"
    line = refused(reader, path, shapes, capsys)
    assert said in line
    assert str(path) in line


@pytest.mark.parametrize("name", FINE)
def test_changes_that_do_not_matter(name, good, tmp_path):
    image = Image.effect_noise((64, 64), 90).convert("RGB")
    first, second = (
        load(str(written(good, change, tmp_path / "x.pth")), device="cpu").predict(image, threshold=0)
        for change in (lambda content: None, FINE[name])
    )
    assert len(first) > 0
    assert torch.equal(first.scores, second.scores)
    assert torch.equal(first.boxes, second.boxes)


def archive(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr(name, content)
    return file.getvalue()


HEADER = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\n<!DOCTYPE html><title>Quota exceeded</title>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "`git lfs pull`"),
        (struct.pack("<Q", len(HEADER)) + HEADER + bytes(4), "safetensors file; convert it"),
        (b"\x1f\x8b\x08" + bytes(99), "gzip"),
        (b'{"a": 1}', "JSON"),
        (archive("a/data.pkl", bytes(10**8)), "would take 0.1 GB"),
        (archive("model/code/x.py", b""), "TorchScript"),
        (archive("weights.npy", b""), "NumPy"),
        (archive("readme.txt", b""), "zip archive"),
        (b"", "cut, damaged"),
        (b"\x80\x02K\x05.", "cut, damaged"),
        ({"pytorch-lightning_version": "2", "state_dict": {"a": torch.zeros(1)}}, "PyTorch Lightning"),
        ({"model_ema": {"a": torch.zeros(1)}}, "averaged weights (EMA) under 'model_ema'"),
        ({"state_dict": {"a": torch.zeros(1)}}, "another program, with weights under 'state_dict'"),
        ({"a.weight": torch.zeros(1)}, "no bare state dict of a network here"),
        ({"model": {"a": torch.zeros(1)}, "x": nested}, "cut, damaged|nested too deeply|does not fit"),
        ({"model": {"a": torch.zeros(1)}, "x": doubling}, "more than 1000000 values"),
    ],
)
def test_foreign_files(content, said, tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=said.replace("(", r"\(").replace(")", r"\)")) as caught:
        load(str(path), device="cpu")
    assert str(path) in str(caught.value)


def test_files_that_never_end(tmp_path):
    """Devices, pipes and folders are not opened."""
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero"), tmp_path):
        with pytest.raises(ValueError, match="not a regular file"):
            load(str(path), device="cpu")


def test_flipped_bits_of_a_file_without_our_checksum(good, tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"model": good["model"], "settings": good["settings"]}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="does not match its checksum"):
        load(str(path), device="cpu")


def test_bare_state_dict_of_a_fitting_network(good, shapes, tmp_path, capsys):
    """Read with a note: the flags say what the network is."""
    torch.save(good["model"], tmp_path / "bare.pth")
    flags = ["--eval", "--resume", str(tmp_path / "bare.pth"), "--output_dir"]
    run_main(shapes, *flags, str(tmp_path / "bare"), network=NETWORK)
    assert f"note: {tmp_path}/bare.pth is a bare state dict of a sam_detr" in capsys.readouterr().out
    path = written(good, lambda content: None, tmp_path / "whole.pth")
    run_main(shapes, "--eval", "--resume", str(path), "--output_dir", str(tmp_path / "whole"), network=[])
    bare, whole = (json.loads((tmp_path / name / "eval.json").read_text()) for name in ("bare", "whole"))
    assert bare["loss"] == whole["loss"]


def test_outputs_that_are_not_finite_are_counted(good, shapes, tmp_path, capsys):
    """Of weights that are finite and too large."""
    path = written(good, put("model", "decoder.layers.1.norm3.weight", to=lambda w: w.fill_(3e38)), tmp_path / "x.pth")
    assert "outputs of 7 of 7 images are not finite" in refused("eval", path, shapes, capsys)
    assert call_main(shapes, "--resume", str(path), "--eval", "--allow_nonfinite", network=[]) == 0
    assert "warning: outputs of 7 images are not finite" in capsys.readouterr().out
    nan = written(good, put("model", BIAS, to=torch.full((6,), torch.nan)), tmp_path / "y.pth")
    assert call_main(shapes, "--resume", str(nan), "--eval", "--allow_nonfinite", network=[]) == 0


class Server(http.server.ThreadingHTTPServer):
    """Answers by the path: the file, a part of it, a page, nothing more, or another address."""

    def __init__(self, file: bytes) -> None:
        self.file, self.requests = file, []
        super().__init__(("127.0.0.1", 0), Answers)


class Answers(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_) -> None:
        self.server.requests.append(self.path)

    def do_GET(self) -> None:
        name, file = self.path.strip("/").removesuffix(".pth"), self.server.file
        self.send_response(302 if name in ("file", "ftp", "elsewhere") else 200)
        if name in ("file", "ftp", "elsewhere"):
            address = {"file": "file:///etc/passwd", "ftp": "ftp://127.0.0.1/x", "elsewhere": "http://192.0.2.1/x"}
            self.send_header("Location", address[name])
            file = b""
        self.send_header("Content-Length", str(10**12 if name == "huge" else len(file)))
        self.end_headers()
        if name == "page":
            file = b"<!DOCTYPE html>".ljust(len(file))
        self.wfile.write(file[: len(file) // 2] if name in ("cut", "stops") else b"" if name == "huge" else file)
        if name == "stops":
            self.wfile.flush()
            time.sleep(3)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cut", "more expected"),
        ("stops", "no answer for 1 s"),
        ("page", "it is a page of a web site"),
        ("huge", "it has 1000.0 GB"),
        ("file", "is not allowed"),
        ("ftp", "ftp: is no way"),
        ("elsewhere", "192.0.2.1 sends it by http"),
    ],
)
def test_downloads(name, said, good, tmp_path, monkeypatch):
    """Nothing is left of what does not come; the next try fetches."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "SECONDS", 1.0)
    file = written(good, lambda content: None, tmp_path / "x.pth").read_bytes()
    with Server(file) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(ValueError, match=re.escape(said)) as caught:
            load(f"{address}/{name}.pth", device="cpu")
        assert f"{address}/{name}.pth cannot be fetched" in str(caught.value)
        assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == []
        if name == "cut":
            for _ in range(2):
                load(f"{address}/whole.pth", device="cpu")
            (kept,) = (path for path in (tmp_path / "home").rglob("*") if path.is_file())
            kept.write_bytes(file[:-100])
            with pytest.raises(ValueError, match=f"kept as {kept}"):
                load(f"{address}/whole.pth", device="cpu")
            load(f"{address}/whole.pth", device="cpu")
            assert server.requests.count("/whole.pth") == 2
        server.shutdown()


def test_http_from_other_machines(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="use https, or pass `allow_http`"):
        load("http://192.0.2.1/x.pth", device="cpu")
    monkeypatch.setattr(download, "SECONDS", 0.2)
    with pytest.raises(ValueError, match="cannot be fetched"):
        load("http://192.0.2.1/x.pth", device="cpu", allow_http=True)
    assert list(tmp_path.rglob("*.pth")) == []
