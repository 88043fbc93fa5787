"""The library's way to detect: whatever is passed in, the detections are those that evaluation writes."""

import http.server
import json
import shutil
import sys
import threading
from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import official
import pytest
import torch
from helpers import OFFICIAL_TINY, REPOSITORY, TINY_DEFORMABLE, TINY_SAP, build_tiny, damage, evaluate, save
from PIL import Image

from samdetr.datasets.images import read_image
from samdetr.inference.detections import Detections
from samdetr.inference.predictor import load

COLUMNS = ("boxes", "scores", "labels", "queries")


def same(one: Detections, other: Detections, **tolerance: float) -> None:
    """Bit by bit unless a tolerance is given."""
    for name in COLUMNS:
        torch.testing.assert_close(getattr(one, name), getattr(other, name), **({"rtol": 0, "atol": 0} | tolerance))
    assert one.size == other.size


@pytest.fixture(scope="module")
def predictor(trained):
    return load(trained / "checkpoint.pth", device="cpu")


@pytest.fixture
def photo(tmp_path):
    """A picture of 90 x 60 without any symmetry."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(noise).resize((90, 60), Image.Resampling.BICUBIC).save(path)
    return path


# ---- The same as evaluation


def as_coco(predictor, folder, **options) -> list[dict]:
    paths = sorted(folder.iterdir())
    found = predictor.predict(paths, threshold=0, **options)
    return [row for path, each in zip(paths, found) for row in each.to_coco(int(path.stem))]


def test_trained_networks_detect_what_evaluation_writes(trained_any, shapes, tmp_path):
    """All of the best 100, bit by bit, in batches of 4 as the evaluation's."""
    _, results = evaluate(shapes, trained_any / "checkpoint.pth", tmp_path / "eval")
    assert as_coco(load(trained_any / "checkpoint.pth", device="cpu"), shapes / "val2017", batch_size=4) == results


@pytest.mark.parametrize("network", [TINY_DEFORMABLE, TINY_SAP], ids=["deformable", "sap"])
def test_other_families_detect_what_evaluation_writes(network, shapes, tmp_path):
    detector, settings = build_tiny("--eval_size", "64", network=network)
    content = json.loads((shapes / "annotations" / "instances_val2017.json").read_text())
    categories = [{"label": c["id"], "id": c["id"], "name": c["name"]} for c in content["categories"]]
    torch.save({"model": detector.state_dict(), "settings": settings, "categories": categories}, tmp_path / "c.pth")
    _, results = evaluate(shapes, tmp_path / "c.pth", tmp_path / "eval")
    assert results
    assert as_coco(load(tmp_path / "c.pth", device="cpu"), shapes / "val2017", batch_size=4) == results


def test_sizes_do_not_meet_in_a_batch(trained, own_shapes, tmp_path, predictor):
    """Images of several sizes, which the evaluation pads in a batch of 4, and not in batches of one."""
    content = json.loads((own_shapes / "annotations" / "instances_val2017.json").read_text())
    for record, size in zip(content["images"], [(64, 64), (96, 64), (64, 64), (64, 80)]):
        path = own_shapes / "val2017" / record["file_name"]
        Image.open(path).resize(size).save(path)
        record["width"], record["height"] = size
    (own_shapes / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    _, results = evaluate(own_shapes, trained / "checkpoint.pth", tmp_path / "eval", "--batch_size", "1")
    assert as_coco(predictor, own_shapes / "val2017", batch_size=1) == results
    together = as_coco(predictor, own_shapes / "val2017", batch_size=4)
    assert [(row["image_id"], row["category_id"]) for row in together] == [
        (row["image_id"], row["category_id"]) for row in results
    ]
    boxes = [torch.tensor([row["bbox"] for row in rows]) for rows in (together, results)]
    torch.testing.assert_close(*boxes, atol=1e-3, rtol=0)


def test_more_sizes_than_wait(predictor):
    """Twelve sizes, one batch at a time: results are in the order of the images."""
    pictures = [Image.new("RGB", (64 + i, 64), (20 * i, 100, 200 - 15 * i)) for i in range(12)]
    found = predictor.predict(pictures, threshold=0, batch_size=2)
    assert [each.size for each in found] == [picture.size for picture in pictures]
    for picture, each in zip(pictures, found):
        same(each, predictor.predict(picture, threshold=0))


# ---- What is taken for an image


@pytest.mark.parametrize("kind", ["palette", "alpha", "16 bit", "cmyk", "grey", "turned"])
def test_files_are_read_as_in_evaluation(kind, predictor, photo, tmp_path):
    picture = Image.open(photo)
    path = tmp_path / f"image.{'jpg' if kind in ('cmyk', 'turned') else 'png'}"
    options = {}
    if kind == "palette":
        picture = picture.convert("P", palette=Image.Palette.ADAPTIVE)
    elif kind == "alpha":
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    elif kind == "16 bit":
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    elif kind == "cmyk":
        picture = picture.convert("CMYK")
    elif kind == "grey":
        picture = picture.convert("L")
    else:
        options["exif"] = Image.Exif()
        options["exif"][274] = 6  # to be turned by a quarter
    picture.save(path, **options)
    found = predictor.predict(path, threshold=0)
    assert found.size == ((60, 90) if kind == "turned" else (90, 60))
    same(found, predictor.predict(np.asarray(read_image(path)), threshold=0))
    same(found, predictor.predict(Image.open(path), threshold=0))
    assert found.image.tobytes() == read_image(path).tobytes()


def test_pictures_arrays_and_tensors(predictor, photo):
    found = predictor.predict(str(photo), threshold=0)
    array = np.asarray(Image.open(photo))
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    views = (array[:, ::-1][:, ::-1], tensor / 255, (tensor / 255).double())
    for image in (photo, Image.open(photo), array, tensor, *views):
        same(predictor.predict(image, threshold=0), found)
    assert predictor.predict(array).source.name == "image_0"


def test_several(predictor, shapes, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(shapes / "val2017", folder)
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.jpg").write_text("no picture")
    (folder / "det_res_000000000001.jpg").write_text("no picture")  # as demo.py writes
    paths = sorted((shapes / "val2017").iterdir())
    wanted = predictor.predict(paths, threshold=0)
    assert [each.source.name for each in wanted] == [path.name for path in paths]
    for images in (folder, str(folder), [folder], f"{folder}/0*.jpg", [f"{folder}/0*.jpg"], tuple(paths)):
        for one, other in zip(predictor.predict(images, threshold=0), wanted, strict=True):
            same(one, other)
    mixed = predictor.predict([Image.open(paths[1]), folder, paths[0]], threshold=0)
    assert len(mixed) == len(paths) + 2
    same(mixed[0], wanted[1], rtol=1e-4, atol=1e-4)  # sums of batches of other sizes are rounded differently
    same(mixed[-1], wanted[0], rtol=1e-4, atol=1e-4)
    assert predictor.predict([]) == []
    assert isinstance(predictor.predict([paths[0]]), list)
    (folder / "odd [1].jpg").write_bytes(paths[0].read_bytes())
    same(
        predictor.predict(folder / "odd [1].jpg", threshold=0), predictor.predict(paths[0], threshold=0)
    )  # a file, not a pattern


def test_urls(predictor, photo, monkeypatch):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if "photo" in self.path or "page" in self.path else 404)
            self.end_headers()
            self.wfile.write(photo.read_bytes() if "photo" in self.path else b"<html>")

        def log_message(self, *_):
            pass

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        found = predictor.predict(f"{address}/a%20photo.png?raw=true", threshold=0)
        same(found, predictor.predict(photo, threshold=0))
        assert found.source.name == "a photo.png"
        with pytest.raises(ValueError, match=rf"{address}/gone.png cannot be fetched: .*404"):
            predictor.predict(f"{address}/gone.png")
        with pytest.raises(ValueError, match=rf"{address}/page.png is no image"):
            predictor.predict([f"{address}/page.png"])
        server.shutdown()
    with pytest.raises(ValueError, match=rf"{address}/photo.png cannot be fetched"):
        predictor.predict(f"{address}/photo.png")
    with pytest.raises(ValueError, match=r"http://\[ "):
        predictor.predict("http://[")


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (np.zeros((60, 90), np.uint8), r"shape \(60, 90\) is not \(height, width, 3\)"),
        (np.zeros((3, 60, 90), np.uint8), r"use transpose\(1, 2, 0\)"),
        (np.zeros((60, 90, 4), np.uint8), r"\(60, 90, 4\) is not"),
        (np.zeros((3, 90, 3), np.uint8), "ambiguous"),
        (np.zeros((2, 60, 90, 3), np.uint8), "list of images"),
        (np.zeros((0, 90, 3), np.uint8), r"\(0, 90, 3\)"),
        (np.zeros((60, 90, 3)), "float64.*uint8"),
        (torch.zeros(60, 90, 3), r"use permute\(2, 0, 1\)"),
        (torch.zeros(3, 60, 3), "ambiguous"),
        (torch.zeros(1, 60, 90), r"\(1, 60, 90\) is not \(3, height, width\)"),
        (torch.zeros(2, 3, 60, 90), "list of images"),
        (torch.full((3, 60, 90), 1.01), "to 1.01"),
        (torch.full((3, 60, 90), -0.01), "from -0.01"),
        (torch.full((3, 60, 90), float("nan")), "nan"),
        (torch.zeros(3, 60, 90, dtype=torch.int64), "int64"),
        (None, "NoneType"),
        (7, "int"),
    ],
)
def test_what_is_no_image(image, expected, predictor):
    with pytest.raises(ValueError, match=expected):
        predictor.predict(image)


def test_what_is_not_there(predictor, tmp_path, shapes):
    for images, expected in [
        (tmp_path / "none.jpg", "none.jpg: no such file or folder"),
        (tmp_path, "holds no image"),
        (f"{tmp_path}/*.jpg", r"\*.jpg: no file matches"),
    ]:
        with pytest.raises(ValueError, match=expected):
            predictor.predict(images)
    good = min((shapes / "val2017").iterdir())
    bad = damage(tmp_path / shutil.copy(good, tmp_path / "damaged.jpg").name)
    with pytest.raises(ValueError, match=r"damaged.jpg cannot be read \(.*\); replace or remove it"):
        predictor.predict([good, bad])


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_thresholds_out_of_range(threshold, predictor, photo):
    with pytest.raises(ValueError, match="`threshold`"):
        predictor.predict(photo, threshold=threshold)
    with pytest.raises(ValueError, match="`threshold`"):
        predictor.predict(photo).above(threshold)


def test_batch_size(predictor, photo):
    with pytest.raises(ValueError, match="`batch_size` 0 must be at least 1"):
        predictor.predict(photo, batch_size=0)


# ---- The model is left as it was


def test_modes_and_gradients(predictor, photo):
    wanted = predictor.predict(photo, threshold=0)
    try:
        predictor.model.train()
        predictor.model.encoder.eval()
        modes = [module.training for module in predictor.model.modules()]
        same(predictor.predict(photo, threshold=0), wanted)
        with pytest.raises(ValueError, match="no such file"):
            predictor.predict("nowhere.jpg")
        assert [module.training for module in predictor.model.modules()] == modes
    finally:
        predictor.model.eval()
    assert not any(getattr(wanted, name).requires_grad for name in COLUMNS)


# ---- Detections


def test_detections(predictor, photo, tmp_path):
    everything = predictor.predict(photo, threshold=0)
    middle = everything.scores.median().item()
    found = predictor.predict(photo, threshold=middle)
    same(found, everything.above(middle))
    assert len(found) == int((everything.scores >= middle).sum()) > 0
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    first = next(iter(found))
    assert first.box == tuple(found.boxes[0].tolist())
    assert first.name == found.names[0] == predictor.categories.names[first.label]
    assert first.category_id == found.category_ids[0] == predictor.categories.category_ids[first.label]
    assert first.query == found.queries[0] < 10
    assert len(list(found)) == len(found)
    assert repr(everything.above(1)) == "<Detections in photo.png, 90 x 60: none>"
    assert f"{found.names.count(first.name)} {first.name}" in repr(found)
    left, top, right, bottom = first.box
    assert found.to_coco(9)[0] == {
        "image_id": 9,
        "category_id": first.category_id,
        "bbox": pytest.approx([left, top, right - left, bottom - top]),
        "score": first.score,
    }


def test_without_duplicates(predictor, photo):
    """Boxes of other classes stay, wherever they lie: also outside of the image."""
    found = predictor.predict(photo, threshold=0).select(slice(5))
    boxes = [[90.0, 90, 110, 110], [-11, -11, 9, 9], [-11, -11, 9, 9], [-10, -11, 10, 9], [30, 30, 40, 40]]
    found = replace(found, boxes=torch.tensor(boxes), labels=torch.tensor([1, 2, 3, 3, 3]))
    assert found.without_duplicates(0.0).queries.tolist() == found.queries[[0, 1, 2, 4]].tolist()
    assert len(found.without_duplicates(0.95)) == 5  # 380 of 420 pixels are common
    assert len(found.select(slice(0)).without_duplicates(0.5)) == 0
    with pytest.raises(ValueError, match=r"`iou` 2 is not between 0 and 1; pass 0\.5, say"):
        found.without_duplicates(2)


@pytest.mark.parametrize(
    ("name", "written", "kind"),
    [
        ("a.jpg", "a.jpg", "JPEG"), ("b.PNG", "b.PNG", "PNG"), ("c", "c.png", "PNG"), ("d.dat", "d.dat.png", "PNG"),
        ("e.jpg?raw=true", "e.jpg?raw=true.png", "PNG"), ("f.jpg.1", "f.jpg.1.png", "PNG"),
        ("g.webp", "g.webp", "WEBP"),
    ],
)  # fmt: skip
def test_save(name, written, kind, predictor, photo, tmp_path):
    path = predictor.predict(photo, threshold=0).save(tmp_path / name)
    assert path == tmp_path / written
    drawn = Image.open(path)
    assert drawn.format == kind
    assert drawn.size == (90 * 7, 60 * 7)  # enlarged to be readable
    assert {p.name for p in tmp_path.iterdir()} == {"photo.png", written}


def test_supervision(predictor, photo, monkeypatch):
    found = predictor.predict(photo, threshold=0)
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="pip install supervision"):
        found.to_supervision()
    package = SimpleNamespace(Detections=lambda **what: what)
    monkeypatch.setitem(sys.modules, "supervision", package)
    theirs = found.to_supervision()
    assert theirs["xyxy"].shape == (len(found), 4)
    assert theirs["class_id"].tolist() == found.category_ids.tolist()
    assert theirs["data"]["class_name"].tolist() == found.names
    assert found.above(1).to_supervision()["data"]["class_name"].shape == (0,)


# ---- Files


def save_official(detector, settings, rename, path):
    """As the official code does. Its files have no word for the settings that are left out here."""
    names = settings.keys() - {"model", "num_classes", "eval_size", "max_size", "backbone_norm", "input_proj_norm"}
    saved = Namespace(**{name: settings[name] for name in names})
    torch.save({"model": rename(detector.state_dict()), "args": saved}, path)


def by_name(to_official):
    return lambda state: {to_official(name): weight for name, weight in state.items()}


FROM_IMAGENET = ["--backbone_level", "5", "--backbone_norm", "frozen"]  # as all official networks
OFFICIAL = {
    "sam_detr": (OFFICIAL_TINY, by_name(official.sam_detr)),
    "deformable_detr": ([*TINY_DEFORMABLE, *FROM_IMAGENET], official.deformable_detr),
    "sap_detr": ([*TINY_SAP, *FROM_IMAGENET], by_name(official.sap_detr)),
}


@pytest.mark.parametrize("family", OFFICIAL)
@pytest.mark.parametrize("num_classes", [91, 6])
def test_official_files(family, num_classes, photo, tmp_path):
    """The names of COCO's classes are known by their number, others are numbers."""
    network, rename = OFFICIAL[family]
    detector, settings = build_tiny(network=network, num_classes=num_classes)
    save(detector, {**settings, "eval_size": 64}, tmp_path / "ours.pth")
    save_official(detector, settings, rename, tmp_path / "official.pth")
    theirs, ours = (load(str(tmp_path / f"{name}.pth"), device="cpu") for name in ("official", "ours"))
    assert (theirs.settings["model"], theirs.settings["num_classes"]) == (family, num_classes)
    assert (theirs.settings["eval_size"], ours.settings["eval_size"]) == (800, 64)
    names = theirs.categories.names
    assert theirs.has_names == (num_classes == 91)
    assert names == ({label: str(label) for label in range(6)} if num_classes == 6 else names)
    assert names[3] == ("car" if num_classes == 91 else "3")
    theirs.transforms = ours.transforms
    found = ours.predict(photo, threshold=0)
    known = torch.isin(found.labels, torch.tensor(list(names)))  # COCO's ids have gaps
    same(theirs.predict(photo, threshold=0), found.select(known))


def test_averaged_weights(photo, tmp_path):
    detector, settings = build_tiny("--eval_size", "64")
    trained = detector.state_dict()
    averaged = {name: value * 0.9 for name, value in trained.items()}
    torch.save({"model": trained, "ema": {"model": averaged}, "settings": settings}, tmp_path / "both.pth")
    for name, state in (("trained", trained), ("averaged", averaged)):
        torch.save({"model": state, "settings": settings}, tmp_path / f"{name}.pth")

    def detect(name, **options):
        return load(tmp_path / f"{name}.pth", device="cpu", **options).predict(photo, threshold=0)

    same(detect("both"), detect("averaged"))
    same(detect("both", raw=True), detect("trained"))
    assert not torch.equal(detect("trained").scores, detect("averaged").scores)


@pytest.mark.parametrize(
    ("device", "expected"), [("gpu", "`device` gpu is no device"), ("cuda:99", "`device` cuda:99 is not here")]
)
def test_devices_that_are_not_there(device, expected, trained):
    with pytest.raises(ValueError, match=expected):
        load(trained / "checkpoint.pth", device=device)


def test_files_that_are_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"`source` .*nothing.pth: no such file"):
        load(tmp_path / "nothing.pth")
    with pytest.raises(ValueError, match="damaged or no file of plain weights"):
        load(REPOSITORY / "README.md")


def test_hub_loads_any_file(trained, photo):
    by_hub = torch.hub.load(
        str(REPOSITORY), "detector", source="local", checkpoint=str(trained / "checkpoint.pth"), device="cpu"
    )
    same(by_hub.predict(photo, threshold=0), load(trained / "checkpoint.pth", device="cpu").predict(photo, threshold=0))
