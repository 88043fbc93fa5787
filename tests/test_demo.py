"""Drawing: from a checkpoint alone, the detections of the evaluation appear on pictures."""

import json
import shutil

import pytest
import torch
from helpers import (
    MULTISCALE,
    OFFICIAL_MULTISCALE,
    REPOSITORY,
    TINY_DEFORMABLE,
    TINY_SAP,
    build_tiny,
    from_flags,
    save,
)
from PIL import Image, ImageChops

from samdetr import demo
from samdetr.datasets.transforms import EvalTransforms
from samdetr.inference import explain
from samdetr.inference.predictor import load
from samdetr.util.checkpoint import save_file
from samdetr.util.padded_images import pad_images


@pytest.fixture
def folder(shapes, tmp_path):
    """Three pictures, and a file that is none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in sorted((shapes / "val2017").iterdir())[:3]:
        shutil.copy(path, folder)
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="session")
def multiscale(tmp_path_factory):
    """A checkpoint of a multi-scale network with random weights."""
    network, settings = build_tiny("--enc_layers", "2", "--eval_size", "64", network=MULTISCALE)
    path = tmp_path_factory.mktemp("multiscale") / "checkpoint.pth"
    save_file({"model": network.state_dict(), "settings": settings}, path)
    return path


JSON = {"detections.json", "images.json", "predict.json"}


def test_folder_is_drawn_elsewhere(trained, folder, tmp_path, monkeypatch):
    checkpoint, output = str(trained / "checkpoint.pth"), tmp_path / "drawn"
    names = sorted(path.name for path in folder.glob("*.jpg"))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    flags = ["--resume", checkpoint, "--images", str(folder), "--threshold", "0", "--device", "cpu"]
    assert demo.main([*flags, "--output", str(output)]) == 0
    assert {path.name for path in output.iterdir()} == {*JSON, *(f"det_res_{name}" for name in names)}
    drawn, original = Image.open(output / f"det_res_{names[0]}"), Image.open(folder / names[0])
    assert drawn.width % original.width == 0  # enlarged by a whole factor, to be readable
    assert ImageChops.difference(drawn, original.resize(drawn.size)).getbbox()  # and something is on it

    monkeypatch.chdir(tmp_path)
    for name in ("predict", "predict2"):  # without --output nothing lies where the images are, nor in the same folder
        assert demo.main(flags) == 0
        assert {path.name for path in (tmp_path / "output" / name).glob("*.jpg")} == {f"det_res_{n}" for n in names}
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert demo.main([*flags, "--output", str(folder)]) == 0  # asked to
    assert demo.main([*flags, "--output", str(folder)]) == 0  # what the first run wrote is no input of the second
    assert sorted(path.name for path in folder.glob("det_res_*")) == [f"det_res_{name}" for name in names]


def test_official_file_is_drawn_as_ours(folder, tmp_path):
    """A multi-scale one, with salient points."""
    detector, settings = build_tiny(network=OFFICIAL_MULTISCALE)
    pictures = []
    for official in (False, True):
        checkpoint, output = tmp_path / f"{official}.pth", tmp_path / f"{official}"
        save(detector, settings, checkpoint, official=official)
        flags = ["--resume", str(checkpoint), "--images", str(folder), "--output", str(output), "--device", "cpu"]
        assert demo.main([*flags, "--limit", "1", "--threshold", "0.01", "--salient_points"]) == 0
        pictures.append({path.name: path.read_bytes() for path in output.glob("det_res_*")})
    assert len(pictures[0]) == 2
    assert pictures[0] == pictures[1]


def test_salient_points_are_watched_from_outside(trained, folder, tmp_path):
    predictor = load(trained / "checkpoint.pth", device="cpu")
    path = next(folder.glob("*.jpg"))
    with explain.watch_salient_points(predictor.model) as layers:
        watched = predictor.predict(path, threshold=0)
    plain = predictor.predict(path, threshold=0)
    settings = predictor.settings
    assert len(layers) == settings["dec_layers"]  # nothing was added after the hooks came off
    for name in ("boxes", "scores", "labels", "queries"):
        torch.testing.assert_close(getattr(watched, name), getattr(plain, name), rtol=0, atol=0)
    for boxes, points in layers:
        assert points.shape == (settings["num_queries"], settings["nheads"], 2)
        reach = (points - boxes[:, None, :2]).abs() / boxes[:, None, 2:]
        assert reach.max() <= 0.5 + 1e-5  # inside the box
    flags = ["--resume", str(trained / "checkpoint.pth"), "--images", str(folder), "--output", str(tmp_path / "drawn")]
    assert demo.main([*flags, "--threshold", "0", "--salient_points", "--limit", "1"]) == 0
    (picture,) = (tmp_path / "drawn").glob("det_res_points_*.png")
    width, height = Image.open(picture).size
    assert width > settings["dec_layers"] * 300  # a column for each decoder layer
    assert height > 2 * 300  # a row for each of the best detections


def test_points_of_a_multiscale_network(multiscale, folder, tmp_path, monkeypatch):
    drawn = []
    draw = explain.draw_sampling
    monkeypatch.setattr(explain, "draw_sampling", lambda image, layers: drawn.append(layers) or draw(image, layers))
    flags = ["--resume", str(multiscale), "--images", str(folder), "--output", str(tmp_path), "--device", "cpu"]
    paths = sorted(folder.glob("*.jpg"))
    assert demo.main([*flags, "--threshold", "0", "--salient_points", "--sampling_points", "0.3,0.8"]) == 0
    written = {path.name for path in tmp_path.glob("det_res_*.png")}
    assert written == {f"det_res_{kind}_{path.stem}.png" for kind in ("points", "sampling") for path in paths}
    for path in paths:
        assert Image.open(tmp_path / f"det_res_points_{path.stem}.png").width > 3 * 400  # 3 decoder layers
        width, height = Image.open(tmp_path / f"det_res_sampling_{path.stem}.png").size
        assert 2 * 400 < width < 3 * 400  # 2 encoder layers
        assert height > 4 * 200  # all levels, and each of three
    # The finest level has 8 x 8 cells; 0.3 lies in column 2, 0.8 in row 6.
    assert [layer.reference[0, 0].tolist() for layers in drawn for layer in layers] == 6 * [[2.5 / 8, 6.5 / 8]]

    drawn.clear()
    assert demo.main([*flags, "--threshold", "0", "--sampling_points", "best", "--limit", "1"]) == 0
    found = load(multiscale, device="cpu").predict(paths[0], threshold=0)
    x0, y0, x1, y1 = (found.boxes[0] * 8 / torch.tensor(2 * found.size)).tolist()  # in cells
    cell = [(int((x0 + x1) / 2) + 0.5) / 8, (int((y0 + y1) / 2) + 0.5) / 8]
    assert [layer.reference[0, 0].tolist() for layer in drawn[0]] == 2 * [cell]


@pytest.mark.parametrize(
    ("network", "flag", "kinds"),
    [
        ([*TINY_DEFORMABLE, "--with_box_refine"], ["--sampling_points", "best"], ["sampling", "sampling_queries"]),
        ([*TINY_DEFORMABLE, "--aligner"], ["--salient_points"], ["points"]),
        (TINY_SAP, ["--salient_points"], ["points"]),
    ],
    ids=["deformable", "aligned", "sap"],
)
def test_points_of_other_families(network, flag, kinds, folder, tmp_path, monkeypatch):
    """A column for each layer, a row for each of the best detections, and what is drawn is the network's own."""
    detector, settings = build_tiny("--eval_size", "64", network=network)
    save(detector, settings, tmp_path / "checkpoint.pth")
    drawn = []
    for name in ("draw_salient_points", "draw_sampling_points"):
        draw = getattr(explain, name)
        monkeypatch.setattr(explain, name, lambda image, draw=draw, **what: drawn.append(what) or draw(image, **what))
    output = tmp_path / "drawn"
    flags = ["--resume", str(tmp_path / "checkpoint.pth"), "--images", str(folder), "--output", str(output)]
    assert demo.main([*flags, *flag, "--limit", "1", "--threshold", "0", "--device", "cpu"]) == 0
    path = min(folder.glob("*.jpg"))
    assert {p.name for p in output.glob("*.png")} == {f"det_res_{kind}_{path.stem}.png" for kind in kinds}
    rows, columns = explain.MOST_QUERIES, settings["dec_layers"]
    assert len(drawn) == rows * columns

    image = Image.open(path).convert("RGB")
    size = torch.tensor(image.size)
    detector.eval()
    with torch.no_grad():
        outputs = detector(pad_images([EvalTransforms(short_side=64)(image)]))
    (found,) = from_flags(network)[2](outputs, size.flip(0)[None])
    query = found["queries"][0]
    last = drawn[columns - 1]
    if "pred_points" in outputs:
        torch.testing.assert_close(last["points"], outputs["pred_points"][0, query][None] * size)
        torch.testing.assert_close(last["box"], found["boxes"][0])
    if "sampling" in kinds:  # refined: the last layer looks around the box of the one before
        torch.testing.assert_close(last["reference"], outputs["aux_outputs"][-1]["pred_boxes"][0, query, :2] * size)
        assert last["points"].shape == (4, 3 * 3, 2)  # heads; levels and points
        torch.testing.assert_close(last["areas"].mean(1), torch.ones(4))


def test_no_detection_no_place_to_look_from(multiscale, folder, tmp_path):
    flags = ["--resume", str(multiscale), "--images", str(folder), "--output", str(tmp_path), "--device", "cpu"]
    assert demo.main([*flags, "--threshold", "1", "--sampling_points", "best", "--limit", "1"]) == 0
    assert [path.suffix for path in tmp_path.glob("det_res_*")] == [".jpg"]


def test_ground_truth_beside(trained, shapes, tmp_path):
    output = tmp_path / "drawn"
    flags = ["--resume", str(trained / "checkpoint.pth"), "--images", str(shapes / "val2017"), "--output", str(output)]
    annotations = shapes / "annotations" / "instances_val2017.json"
    assert demo.main([*flags, "--limit", "2", "--annotations", str(annotations)]) == 0
    for path in output.glob("det_res_*"):
        width, height = Image.open(path).size
        assert width > 1.9 * (height - 60)  # two square pictures below a title


def test_one_box_for_an_object(trained, folder, tmp_path):
    """--nms takes away what overlaps a better box of its class, and nothing else."""
    flags = ["--resume", str(trained / "checkpoint.pth"), "--images", str(folder), "--threshold", "0"]
    flags += ["--device", "cpu", "--output"]
    results = []
    for name, more in {"all": [], "best": ["--nms", "0.3"]}.items():
        assert demo.main([*flags, str(tmp_path / name), *more]) == 0
        results.append(json.loads((tmp_path / name / "detections.json").read_text()))
        assert json.loads((tmp_path / name / "predict.json").read_text())["nms"] == (0.3 if more else None)
    every, best = results
    wanted = []
    for row in every:  # the best of each image first
        x, y, w, h = row["bbox"]
        rivals = [r for r in wanted if all(r[key] == row[key] for key in ("image_id", "category_id"))]
        overlaps = [0.0]
        for x2, y2, w2, h2 in (rival["bbox"] for rival in rivals):
            common = max(0, min(x + w, x2 + w2) - max(x, x2)) * max(0, min(y + h, y2 + h2) - max(y, y2))
            overlaps.append(common / (w * h + w2 * h2 - common))
        if max(overlaps) <= 0.3:
            wanted.append(row)
    assert best == wanted
    assert 0 < len(best) < len(every)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--images", "nowhere"], "nowhere"),
        (["--threshold", "2"], "--threshold 2"),
        (["--resume", "nothing.pth"], "nothing.pth"),
        (["--limit", "0"], "--limit 0"),
        (["--nms", "1.5"], "--nms 1.5 is not between 0 and 1"),
        (["--nms", "nan"], "--nms nan is not between 0 and 1"),
        (["--sampling_points", "0.5,0.5"], "multi-scale"),
    ],
)
def test_bad_input(trained, folder, capsys, change, named):
    flags = ["--resume", str(trained / "checkpoint.pth"), "--images", str(folder), *change]
    assert demo.main(flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert named in error
    assert not list(folder.glob("det_res_*"))


@pytest.mark.parametrize("value", ["0.5", "0.5,1.01", "0.5,-0.1", "0.5,0.5,0.5", "nan,0.5", "0.5;0.5", "Best", ","])
def test_bad_sampling_points(multiscale, folder, capsys, value):
    assert demo.main(["--resume", str(multiscale), "--images", str(folder), "--sampling_points", value]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"--sampling_points {value} " in error
    assert "0.5,0.5" in error  # the remedy
    assert not list(folder.glob("det_res_*"))


def test_damaged_image_is_named(trained, folder, capsys):
    path = sorted(folder.glob("*.jpg"))[0]
    path.write_bytes(path.read_bytes()[:300])
    assert demo.main(["--resume", str(trained / "checkpoint.pth"), "--images", str(folder)]) == 2
    assert path.name in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "trainable"),
    [
        ("sam_detr_r50_smca", 58_122_794),
        ("sam_detr_r50_ms", 54_972_298),
        ("sam_detr_r50_ms_smca", 55_021_546),
    ],
)
def test_hub_entry_point_builds_the_published_model(name, trainable):
    with torch.device("meta"):  # counts without memory
        detector = torch.hub.load(str(REPOSITORY), name, source="local")
    assert sum(p.numel() for p in detector.parameters() if p.requires_grad) == trainable
    assert not detector.training
