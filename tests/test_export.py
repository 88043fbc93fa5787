"""Exported detectors: the file detects what the network does, in its engine, or there is no file."""

import json
import re
import shutil
from contextlib import contextmanager
from importlib import import_module

import numpy as np
import pytest
import torch
from helpers import MULTISCALE, REPOSITORY, TINY, TINY_DEFORMABLE, TINY_SAP, build_tiny, save
from PIL import Image
from torch import nn

from samdetr import console, demo, export, load
from samdetr.inference import engines
from samdetr.inference.export import command, gate
from samdetr.inference.export.graph import Deployed, find_padding, output_names
from samdetr.inference.predictor import Predictor
from samdetr.models.ops.kernels import plain_path
from samdetr.models.ops.ms_deform_attn import plain

ONE_LAYER = [*TINY, "--dec_layers", "1"]
NO_ALIGNER = [*TINY[:-1], "--dec_layers", "1", "--no_aligner"]


@contextmanager
def fault(kind: str):
    """Inside, networks compute something else, as an engine that reads an operator in its own way would."""
    with pytest.MonkeyPatch.context() as patch:
        if kind == "align_corners":
            right = plain.F.grid_sample
            wrong = lambda *given, align_corners, **others: right(*given, align_corners=True, **others)  # noqa: E731
            patch.setattr(plain.F, "grid_sample", wrong)
        elif kind == "swapped axis":
            aligner = import_module("samdetr.models.semantics_aligner")
            right = aligner.in_cells
            patch.setattr(aligner, "in_cells", lambda x, *, height, width: right(x, height=width, width=height))
        elif kind == "padding":
            graph = import_module("samdetr.inference.export.graph")
            patch.setattr(graph, "find_padding", lambda images: torch.zeros_like(images[:, 0]).bool())
        elif kind == "interpolation":
            patch.setattr(nn.functional, "interpolate", lambda x, size, **_: torch.zeros(*x.shape[:2], *size))
        yield


def trained_like(network: list[str], path, *, confident: bool = True, num_classes: int = 6):
    """A checkpoint of random weights, whose best scores lie around the threshold, or all are small."""
    detector, settings = build_tiny("--eval_size", "64", network=network, num_classes=num_classes)
    for head in detector.decoder.class_heads if confident else []:
        last = head if isinstance(head, nn.Linear) else head.layers[-1]
        with torch.no_grad():
            last.bias.fill_(-1.0)
            last.weight.mul_(2)
    save(detector, settings, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return trained_like(NO_ALIGNER, tmp_path_factory.mktemp("export") / "checkpoint.pth")


@pytest.fixture(scope="module")
def onnx_file(checkpoint):
    """Exported for images of any size."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    assert export.main(["--resume", str(checkpoint)]) == 0
    return checkpoint.with_suffix(".onnx")


@pytest.fixture
def photo(tmp_path):
    """An image that is no multiple of the stride on any side."""
    path = tmp_path / "photo.png"
    Image.fromarray(gate.draw_image(seed=1, split="val", index=1, size=150)[0]).crop((0, 0, 101, 150)).save(path)
    return path


def test_onnx_has_the_predictor_of_its_checkpoint(onnx_file, checkpoint, photo, tmp_path):
    import onnx

    model = onnx.load(onnx_file)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert not model.functions
    ours, theirs = load(checkpoint, device="cpu"), load(str(onnx_file))
    for image in (photo, "images/shapes_2002.jpg"):
        wanted, found = (each.predict(image, threshold=0) for each in (ours, theirs))
        assert len(found) == len(wanted) > 20
        torch.testing.assert_close(found.scores, wanted.scores, rtol=0, atol=1e-5)
        best = slice(0, 3)
        torch.testing.assert_close(found.boxes[best], wanted.boxes[best], rtol=0, atol=1e-2)
        assert found.names[best] == wanted.names[best]
        assert found.category_ids[best].tolist() == wanted.category_ids[best].tolist()
    # Images of unlike sizes, each as alone; and a batch of one size.
    together = theirs.predict([photo, "images/shapes_2002.jpg", photo], threshold=0)
    torch.testing.assert_close(together[2].scores, theirs.predict(photo, threshold=0).scores, rtol=0, atol=1e-5)
    flags = ["--resume", str(onnx_file), "--images", str(photo), "--output", str(tmp_path), "--threshold", "0"]
    assert demo.main(flags) == 0
    assert (tmp_path / "det_res_photo.png").is_file()
    assert demo.main([*flags, "--salient_points"]) == 2

    report = json.loads((onnx_file.parent / f"{onnx_file.name}.json").read_text())
    assert report["passed"]
    assert report["agreement"] == 1
    assert report["detections"] > 10
    assert report["images"] >= 8
    sizes = {tuple(shape.split(" x ")[2:]) for shape in report["batches"]}
    assert len(sizes) >= 3
    assert len({shape.split(" x ")[0] for shape in report["batches"]}) >= 2


def test_onnx_without_this_project(onnx_file, photo, tmp_path, monkeypatch, capsys):
    """The program of the manual: at most 20 lines, numpy, PIL and onnxruntime alone."""
    (program,) = re.findall(r"^```python\n(.*?)^```", (REPOSITORY / "docs/export.md").read_text(), re.M | re.DOTALL)
    assert len(program.strip().splitlines()) <= 20
    assert {line.split()[1].split(".")[0] for line in program.splitlines() if line.startswith(("import", "from"))} == {
        "json",
        "numpy",
        "onnxruntime",
        "PIL",
    }
    shutil.copy(onnx_file, tmp_path / "checkpoint.onnx")
    monkeypatch.chdir(tmp_path)
    Image.open(photo).save("photo.jpg", quality=95)
    assert "threshold = 0.3" in program
    exec(compile(program.replace("threshold = 0.3", "threshold = 0.0"), "export.md", "exec"), {})
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    wanted = load(str(onnx_file)).predict("photo.jpg", threshold=0)
    # PIL resizes a little differently.
    scores = [float(words[1]) for words in printed]
    np.testing.assert_allclose(scores, wanted.scores.numpy(), atol=0.02)
    best = torch.tensor([float(word.strip("[],")) for word in printed[0][2:]])
    assert (best - wanted.boxes[0]).abs().max() < 3


def test_torch_export_of_one_size_pads(checkpoint, photo, tmp_path, monkeypatch, capsys):
    traced, trace = [], command.trace
    monkeypatch.setattr(
        command, "trace", lambda *given, **options: traced.append(trace(*given, **options)) or traced[0]
    )
    file = tmp_path / "fixed.pt2"
    flags = ["--resume", str(checkpoint), "--format", "torch_export", "--size", "64", "96", "--output", str(file)]
    assert export.main(flags) == 0
    names = {str(node.target) for node in torch.export.load(file).graph.nodes}
    assert not [name for name in names if "sam_detr" in name]
    report = json.loads((tmp_path / "fixed.pt2.json").read_text())
    assert {shape.split(" x ", 2)[2] for shape in report["batches"]} == {"64 x 96"}
    predictor = load(str(file), device="cpu")
    found = predictor.predict(photo, threshold=0)
    assert found.size == (101, 150)
    # The same by hand: 64 / 150 of the size, in the left of the canvas, the rest padding.
    ours = load(checkpoint, device="cpu")
    image = predictor.prepare(Image.open(photo))
    assert image.shape == (3, 64, 43)
    (batch,) = gate.batches_of([[image]], (64, 96))
    with torch.no_grad():
        (wanted,) = ours._postprocess(ours.model(batch), torch.tensor([[150, 101]]))
    torch.testing.assert_close(found.scores, wanted["scores"], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.boxes[:3], wanted["boxes"][:3], rtol=0, atol=1e-2)

    before = file.read_bytes()
    assert export.main(flags) == 2  # it is there already
    (program,) = traced
    with torch.no_grad():
        next(value for name, value in program.state_dict.items() if "class_heads" in name).mul_(1.1)
    monkeypatch.setattr(command, "trace", lambda *_, **__: program)
    assert export.main([*flags, "--overwrite"]) == 1
    assert "differs, no file is kept" in capsys.readouterr().err
    assert file.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"fixed.pt2", "fixed.pt2.json", "photo.png"}


def in_place_of_engine(predictor: Predictor, kind: str, *, raw: bool = False) -> Predictor:
    """A predictor whose "engine" is the graph in PyTorch, with a fault."""
    request = command.Request(format="torch_export", raw=raw)
    about = command.describe(predictor, request)
    graph = Deployed(predictor.model, top_k=about["top_k"], raw=raw)

    def run(images):
        with fault(kind):
            return graph(images)

    network = engines.ExportedNetwork(run, about, device=torch.device("cpu"))
    return Predictor(
        network, postprocess=network.postprocess, categories=None, settings=predictor.settings, device=network.device
    )


@pytest.mark.parametrize(
    ("network", "kind", "confident"),
    [
        (ONE_LAYER, "swapped axis", True),
        (ONE_LAYER, "padding", False),
        (TINY_DEFORMABLE, "align_corners", True),
        (TINY_DEFORMABLE, "align_corners", False),
        (TINY_SAP, "interpolation", True),
    ],
)
def test_the_gate_finds(network, kind, confident, tmp_path):
    predictor = load(trained_like(network, tmp_path / "checkpoint.pth", confident=confident), device="cpu")
    images, raw = gate.pictures(), network is TINY_DEFORMABLE
    with plain_path():
        right = gate.compare(predictor, in_place_of_engine(predictor, "none", raw=raw), images)
        assert right.passed
        assert bool(right.above.compared) == confident
        assert right.top.compared > 100
        assert not gate.compare(predictor, in_place_of_engine(predictor, kind, raw=raw), images).passed


def test_nothing_compared_is_nothing_passed():
    assert not gate.Comparison().passed


def test_padding_is_what_is_zero_at_the_end():
    images = torch.ones(3, 3, 4, 5)
    images[0, :, :, 3:] = 0
    images[0, :, 3:] = 0
    images[1, :, 1] = 0  # a row inside
    images[2] = 0  # nothing is known
    padding = find_padding(images)
    assert padding[0].tolist() == 3 * [3 * [False] + 2 * [True]] + [5 * [True]]
    assert not padding[1:].any()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--format torch_export --half", "--format torch_export has no --half; pass onnx or openvino"),
        ("--half --int8 images", "--half and --int8 exclude each other"),
        ("--half --raw", "--half is judged by detections, which --raw has not"),
        ("--size 640", "--size 640 is neither two numbers"),
        ("--size 0 64", "--size 0 64: sides go from 1 to"),
        ("--size 640 x", "--size 640 x is neither two numbers"),
        ("--output FOLDER/x.pt", "a file of --format onnx ends in .onnx"),
        ("--output FOLDER/none/x.onnx", "there is no folder"),
        ("--output FOLDER/there.onnx", "exists; pass another --output, or --overwrite"),
        ("--annotations x.json", "--annotations needs the images that they are of: pass --images"),
        ("--half --most_drop 2", "--most_drop 2.0 is not between 0 and 1"),
        ("--images FOLDER/no", "--images FOLDER/no: no such file or folder"),
        ("--resume FOLDER/no.pth", "--resume FOLDER/no.pth: no such file"),
        ("--resume FOLDER/there.onnx --output FOLDER/x.onnx", "--resume FOLDER/there.onnx cannot be read"),
    ],
)
def test_bad_input(flags, words, checkpoint, tmp_path, capsys):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    (tmp_path / "there.onnx").write_text("no graph")
    given = flags.replace("FOLDER", str(tmp_path)).split()
    assert export.main(["--resume", str(checkpoint), "--output", str(tmp_path / "new.onnx"), *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words.replace("FOLDER", str(tmp_path)) in line
    assert {path.name for path in tmp_path.iterdir()} == {"there.onnx"}


@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import of package:RuntimeWarning")  # by runpy
def test_missing_packages_are_named(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", [])
    with pytest.raises(SystemExit) as end:
        console.main(["export", "--resume", str(checkpoint), "--format", "openvino"])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    wanted = "--format openvino needs openvino, onnx, onnxscript: pip install openvino onnx onnxscript"
    assert line == f"samdetr export: error: {wanted}"
    (tmp_path / "x.onnx").write_text("")
    with pytest.raises(ValueError, match="needs onnxruntime: pip install onnxruntime"):
        load(str(tmp_path / "x.onnx"))


# ---- Minutes

NETWORKS = {
    "single scale": TINY,
    "dc5": [*TINY, "--backbone", "resnet50", "--backbone_level", "5", "--dilation"],
    "frozen norms, no aligner": [*TINY[:-1], "--backbone_norm", "frozen", "--no_aligner"],
    "relations": [*TINY, "--relation"],
    "multi-scale": MULTISCALE,
    "deformable": TINY_DEFORMABLE,
    "deformable, one level": [*TINY_DEFORMABLE, "--num_feature_levels", "1"],
    "deformable, two-stage": [*TINY_DEFORMABLE, "--with_box_refine", "--two_stage"],
    "sap": TINY_SAP,
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_in_every_format(name, tmp_path):
    size = ["96", "128"] if name == "deformable" else ["dynamic"]
    for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    path = trained_like(NETWORKS[name], tmp_path / "checkpoint.pth")
    for format in command.FORMATS:
        flags = ["--resume", str(path), "--format", format, "--size", *size]
        assert export.main(flags) == 0, format
        if name == "multi-scale" and format == "onnx":
            assert export.main([*flags, "--raw", "--output", str(tmp_path / "raw.onnx")]) == 0
            assert load(str(tmp_path / "raw.onnx")).predict("images/shapes_2002.jpg", threshold=0)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_fewer_bits(tmp_path, shapes, monkeypatch, capsys):
    for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    path = trained_like(ONE_LAYER, tmp_path / "checkpoint.pth")
    images = str(shapes / "val2017")
    flags = ["--resume", str(path), "--images", images, "--overwrite"]
    for format in ("onnx", "openvino"):
        assert export.main([*flags, "--format", format, "--half", "--most_drop", "0.2"]) == 0
        full = path.stat().st_size
        suffix = command.FORMATS[format].suffix
        report = json.loads(path.with_suffix(f"{suffix}.json").read_text())
        assert report["drop"] == report["AP50_network"] - report["AP50_exported"]
        assert report["metadata"]["precision"] == "half"
        assert report["bytes"] < 0.8 * full
        assert export.main([*flags, "--format", format, "--int8", images, "--most_drop", "1"]) == 0
        capsys.readouterr()
    assert export.main([*flags, "--int8", images, "--most_drop", "0", "--output", str(tmp_path / "new.onnx")]) in (0, 1)


def test_names_of_outputs():
    assert output_names(raw=True) == ("pred_logits", "pred_boxes")
