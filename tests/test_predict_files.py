"""`samdetr predict` with many inputs: what it prints, writes, leaves alone, and how it ends."""

import json
import os
import shutil
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO
from helpers import read_json
from PIL import Image

from samdetr import demo
from samdetr.inference import video
from samdetr.inference.outputs import image_ids, output_names
from samdetr.inference.predictor import Predictor, load
from samdetr.util import fonts
from samdetr.util.drawing import draw_detections


@pytest.fixture
def pictures(shapes, tmp_path):
    """a/x.jpg, a/x.png, b/x.jpg: three images."""
    first, second, third, *_ = sorted((shapes / "val2017").iterdir())
    for name in "ab":
        (tmp_path / name).mkdir()
    shutil.copy(first, tmp_path / "a/x.jpg")
    Image.open(second).save(tmp_path / "a/x.png")
    shutil.copy(third, tmp_path / "b/x.jpg")
    return tmp_path


def run(trained, *flags: object) -> int:
    return demo.main(["--resume", str(trained / "checkpoint.pth"), "--device", "cpu", *map(str, flags)])


def test_several_inputs_at_once(trained, pictures, capsys):
    """Equal names are kept apart, and the JSON is that of the library, readable as COCO's."""
    out = pictures / "out"
    inputs = (pictures / "a", f"{pictures}/b/*.jpg", pictures / "a/x.jpg")  # the last one twice
    assert run(trained, "--images", *inputs, "--output", out, "--threshold", "0.01") == 0
    names = {"det_res_x.jpg", "det_res_x.png", "det_res_x_2.jpg"}
    assert {path.name for path in out.iterdir()} == names | {"detections.json", "images.json", "predict.json"}
    predictor = load(trained / "checkpoint.pth", device="cpu")
    paths = [pictures / name for name in ("a/x.jpg", "a/x.png", "b/x.jpg")]
    found = [predictor.predict(path, threshold=0.01) for path in paths]
    assert read_json(out / "detections.json") == [row for i, each in enumerate(found, 1) for row in each.to_coco(i)]
    images = read_json(out / "images.json")
    assert [(row["id"], row["drawn_as"]) for row in images["images"]] == [
        (1, "det_res_x.jpg"), (2, "det_res_x.png"), (3, "det_res_x_2.jpg")
    ]  # fmt: skip
    assert images["categories"] == [
        {"id": c, "name": n} for c, n in zip((1, 2, 3, 5), predictor.categories.names.values())
    ]
    loaded = COCO(str(out / "images.json")).loadRes(str(out / "detections.json"))
    assert len(loaded.anns) == sum(map(len, found)) > 0
    lines = capsys.readouterr().out.splitlines()
    name, scores = (
        found[1].names[0],
        [s for s, n in zip(found[1].scores.tolist(), found[1].names) if n == found[1].names[0]],
    )
    shown = [f"{score:.2f}" for score in scores]
    shown = shown if len(shown) <= 10 else [*shown[:9], "...", shown[-1]]
    assert any(line.startswith(f"x.png: {len(scores)} {name} ({', '.join(shown)})") for line in lines)


def test_numbers_are_ids(trained, shapes, tmp_path):
    paths = sorted((shapes / "val2017").iterdir())[:3]
    assert run(trained, "--images", *paths, "--output", tmp_path, "--threshold", "0") == 0
    wanted = [int(path.stem) for path in paths]
    assert list(dict.fromkeys(row["image_id"] for row in read_json(tmp_path / "detections.json"))) == wanted
    assert [row["id"] for row in read_json(tmp_path / "images.json")["images"]] == wanted
    assert image_ids(["7.jpg", "007.png"]) == image_ids(["7.jpg", "x.jpg"]) == image_ids(["7.jpg", "²"]) == [1, 2]


def test_ids_of_an_annotation_file(trained, own_shapes, tmp_path):
    """An image of the same name in another folder is none of the file's."""
    file = own_shapes / "annotations/instances_val2017.json"
    content = read_json(file)
    for record in (*content["images"], *content["annotations"]):
        key = "id" if "file_name" in record else "image_id"
        record[key] += 1000
    file.write_text(json.dumps(content))
    paths = sorted((own_shapes / "val2017").iterdir())[:2]
    (tmp_path / "b").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "b" / paths[0].name)
    flags = ["--annotations", file, "--output", tmp_path / "out", "--threshold", "0"]
    assert run(trained, "--images", *paths, tmp_path / "b", *flags) == 0
    known = {record["file_name"]: record["id"] for record in content["images"]}
    wanted = [*(known[path.name] for path in paths), max(known[path.name] for path in paths) + 1]
    assert [row["id"] for row in read_json(tmp_path / "out/images.json")["images"]] == wanted
    predictor = load(trained / "checkpoint.pth", device="cpu")
    black = predictor.predict(tmp_path / "b" / paths[0].name, threshold=0)
    rows = [row for row in read_json(tmp_path / "out/detections.json") if row["image_id"] == wanted[2]]
    assert rows == black.to_coco(wanted[2])


def test_nothing_is_found(trained, pictures, capsys):
    assert run(trained, "--images", pictures / "a/x.jpg", "--output", pictures / "out", "--threshold", "1") == 0
    best = load(trained / "checkpoint.pth", device="cpu").predict(pictures / "a/x.jpg", threshold=0)
    lines = capsys.readouterr().out.splitlines()
    assert f"x.jpg: nothing above 1, the best score is {best.scores[0]:.2f} ({best.names[0]})" in lines
    assert any(line.startswith("nothing is above --threshold 1 in any image; the best score is ") for line in lines)
    assert read_json(pictures / "out/detections.json") == []


def test_files_that_cannot_be_read_do_not_end_it(trained, pictures, capsys):
    (pictures / "a/cut.jpg").write_bytes((pictures / "a/x.jpg").read_bytes()[:300])
    (pictures / "a/gone.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(pictures / "a/pipe.jpg")
    out = pictures / "out"
    assert run(trained, "--images", pictures / "a", pictures / "b", "--output", out) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        "demo.py: error: 3 of 6 could not be read (see the lines above): cut.jpg, gone.jpg, pipe.jpg\n"
    )
    for name, reason in {"cut.jpg": "", "gone.jpg": "nowhere.jpg", "pipe.jpg": "named pipe"}.items():
        assert any(line.startswith(f"not read: {name}: ") and reason in line for line in captured.out.splitlines())
    assert len(read_json(out / "images.json")["images"]) == 3
    assert [row["file_name"] for row in read_json(out / "predict.json")["unreadable"]] == [
        "cut.jpg",
        "gone.jpg",
        "pipe.jpg",
    ]


def test_files_of_others_are_not_replaced(trained, pictures, capsys):
    out = pictures / "out"
    out.mkdir()
    flags = ["--images", pictures / "a/x.jpg", "--output", out]
    for name in ("detections.json", "images.json", "predict.json", "det_res_x.jpg"):
        (out / name).write_text('["mine"]')
        assert run(trained, *flags) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"{out / name} is there already" in error
        assert "--overwrite" in error
        assert [path.name for path in out.iterdir()] == [name]
        assert (out / name).read_text() == '["mine"]'
        (out / name).unlink()
    (out / "det_res_x.jpg").write_text("mine")
    assert run(trained, *flags, "--overwrite") == 0
    assert run(trained, *flags) == 0  # its own, unchanged
    (out / "detections.json").write_text("changed")
    assert run(trained, *flags) == 2
    assert (out / "detections.json").read_text() == "changed"


def test_ctrl_c_leaves_whole_files(trained, shapes, tmp_path, monkeypatch, capsys):
    predict, calls = Predictor.predict, []

    def interrupted(self, *words, **options):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return predict(self, *words, **options)

    monkeypatch.setattr(Predictor, "predict", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        assert run(trained, "--images", shapes / "val2017", "--output", tmp_path / "out") == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(calls) == len(read_json(tmp_path / "out/images.json")["images"]) == 2
    assert len(list((tmp_path / "out").glob("det_res_*"))) == 2
    assert read_json(tmp_path / "out/predict.json")["complete"] is False
    assert "stopped by Ctrl-C" in capsys.readouterr().out


def test_urls_are_checked_downloads(server, trained, pictures, capsys):
    address = f"http://127.0.0.1:{server.server_port}"
    urls = [f"{address}/a/x.jpg", f"{address}/gone.jpg", f"{address}/b/x.jpg?x=1", "http://192.0.2.1/other.jpg"]
    assert run(trained, "--images", *urls, "--output", pictures / "out") == 2
    captured = capsys.readouterr()
    assert "2 of 4 could not be read (see the lines above): gone.jpg, other.jpg" in captured.err
    assert "404" in captured.out
    assert "pass --allow_http" in captured.out  # other machines, without encryption
    assert {path.name for path in (pictures / "out").glob("det*.jpg")} == {"det_res_x.jpg", "det_res_x_2.jpg"}


def test_no_two_outputs_have_one_name():
    assert output_names(["x.jpg", "X.JPG", "x_2.jpg", "x.png", "x.jpg"]) == [
        "det_res_x.jpg", "det_res_X_3.JPG", "det_res_x_2.jpg", "det_res_x.png", "det_res_x_4.jpg"
    ]  # fmt: skip
    names = output_names(
        ["x.jpg", "x.png", "points_x.png", "b" * 250 + ".jpg", "b" * 251 + ".jpg", "\0../\n.jpg"], kinds=["points"]
    )
    assert names[:3] == ["det_res_x.jpg", "det_res_x_2.png", "det_res_points_x_3.png"]
    assert len({*names}) == 6
    assert max(map(len, names)) < 200
    assert names[5].isprintable()
    assert "/" not in names[5]


# ---- Videos


def fake_cv2(frames: list[np.ndarray], *, opened: bool = True) -> SimpleNamespace:
    """What this project calls of OpenCV, in BGR; writes its frames as lines of their mean colours."""

    class Capture:
        def __init__(self, source, *api):
            self.source, self.left = source, list(frames)

        def isOpened(self):
            return opened

        def get(self, name):
            return {"fps": 4.0, "count": len(frames)}[name]

        def read(self):
            return (True, self.left.pop(0)) if self.left else (False, None)

        def release(self):
            pass

    class Writer:
        def __init__(self, path, code, rate, size):
            self.path, self.lines = Path(path), [f"{rate} {size}"]

        def isOpened(self):
            return True

        def write(self, frame):
            self.lines.append(f"{frame.mean((0, 1)).round().tolist()}")

        def release(self):
            self.path.write_text("\n".join(self.lines))

    return SimpleNamespace(
        VideoCapture=Capture, VideoWriter=Writer, VideoWriter_fourcc=lambda *_: 0,
        CAP_PROP_FPS="fps", CAP_PROP_FRAME_COUNT="count", CAP_FFMPEG=1900,
    )  # fmt: skip


@pytest.fixture
def opencv(monkeypatch):
    """Instals a fake OpenCV of these frames, and hides PyAV."""

    def install(frames, **options):
        monkeypatch.setitem(sys.modules, "cv2", fake_cv2(frames, **options))
        monkeypatch.setattr(video, "find_spec", lambda name: True if name == "cv2" else None)

    return install


def test_camera_is_drawn_until_the_limit(trained, tmp_path, opencv, monkeypatch):
    """Frames are repeated for as long as they took: at seconds 0, 0.5 and 1.2 of 4 frames a second, one, two and two
    fall due."""
    times = iter([100.0, 100.0, 100.5, 101.2])
    monkeypatch.setattr(video, "time", SimpleNamespace(monotonic=lambda: next(times)))
    opencv([np.full((49, 65, 3), (200, 100, 0), np.uint8)] * 5)
    monkeypatch.chdir(tmp_path)
    assert run(trained, "--images", "0", "--limit", "3", "--output", "out", "--threshold", "0.99") == 0
    found = read_json(tmp_path / "out/det_res_camera0.json")
    assert [frame["seconds"] for frame in found["frames"]] == pytest.approx([0, 0.5, 1.2])
    assert (found["width"], found["height"], found["fps"]) == (65, 49, 4)
    first, *lines = (tmp_path / "out/det_res_camera0.mp4").read_text().splitlines()
    assert first == "4.0 (520, 392)"  # drawn 8 times as large, which is even
    assert lines == ["[200.0, 100.0, 0.0]"] * 5
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "det_res_camera0.json",
        "det_res_camera0.mp4",
        "predict.json",
    }


def test_video_that_ends_early_and_one_that_is_none(trained, pictures, opencv, capsys):
    opencv([np.zeros((64, 64, 3), np.uint8)] * 3)
    sys.modules["cv2"].VideoCapture.get = lambda self, name: 4.0 if name == "fps" else 9
    (pictures / "clip.mp4").write_bytes(b"\0binary")
    (pictures / "list.mp4").write_text("#EXTM3U\nother.mp4\n")
    out = pictures / "out"
    assert run(trained, "--images", pictures / "clip.mp4", pictures / "list.mp4", "--output", out) == 2
    captured = capsys.readouterr()
    assert "2 of 2 could not be read" in captured.err
    assert "clip.mp4: it ends after 3 of 9 frames" in captured.out
    assert "list.mp4 is no video, but a text" in captured.out
    assert len(read_json(out / "det_res_clip.json")["frames"]) == 3
    assert not (out / "det_res_list.mp4").exists()
    assert run(trained, "--images", pictures / "list.mp4", "--output", pictures / "none") == 2
    assert not (pictures / "none").exists()


def test_videos_without_a_package_for_them(trained, pictures, monkeypatch, capsys):
    monkeypatch.setattr(video, "find_spec", lambda name: None)
    (pictures / "clip.mp4").write_bytes(b"\0")
    for source, remedy in ((pictures / "clip.mp4", "pip install av"), ("0", "pip install opencv-python-headless")):
        assert run(trained, "--images", source, "--output", pictures / "out") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert remedy in error


@pytest.mark.skipif(not find_spec("av"), reason="PyAV is not installed")
def test_video_file(trained, shapes, tmp_path):
    """Every frame is the detection of that picture; the annotated video has as many frames, at the same rate."""
    import av

    paths = sorted((shapes / "val2017").iterdir())[:3]
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for path in paths:
            container.mux(stream.encode(av.VideoFrame.from_image(Image.open(path))))
        container.mux(stream.encode())
    with av.open(str(tmp_path / "clip.mp4")) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    assert len(frames) == 3
    assert run(trained, "--images", tmp_path / "clip.mp4", "--output", tmp_path / "out", "--threshold", "0.01") == 0
    found = read_json(tmp_path / "out/det_res_clip.json")
    predictor = load(trained / "checkpoint.pth", device="cpu")
    for number, (frame, image) in enumerate(zip(found["frames"], frames, strict=True)):
        assert frame["seconds"] == pytest.approx(number / 5)
        assert frame["detections"] == predictor.predict(image, threshold=0.01).to_coco(number)
    with av.open(str(tmp_path / "out/det_res_clip.mp4")) as container:
        assert container.streams.video[0].average_rate == 5
        assert len(list(container.decode(video=0))) == 3


# ---- Class names in any script


@pytest.fixture
def no_fonts(monkeypatch):
    """Only matplotlib's own font, which has no Chinese."""
    caches = [getattr(fonts, name) for name in ("_parts", "_font_of", "_fonts", "letters")]
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda *_: [])
    monkeypatch.setattr(fonts, "_NAMED", set())
    [each.cache_clear() for each in caches]
    yield
    [each.cache_clear() for each in caches]


NAMES = {1: "cat", 2: "кошка", 3: "قطة", 4: "猫", 5: "two\nlines"}


def test_names_are_drawn_in_their_script(no_fonts, capsys):
    ids = {label: 10 * label for label in NAMES}
    drawn = fonts.drawable(NAMES, ids)
    assert drawn == {**NAMES, 4: "40"}
    assert fonts.drawable(NAMES, ids) == drawn
    assert capsys.readouterr().out.count("note: no font here has all letters of 1 class name(s), such as 猫") == 1
    boxes = torch.tensor([[10.0, 30, 90, 90]])
    blank = Image.new("RGB", (400, 400))
    pictures = [
        draw_detections(blank, boxes=boxes, labels=torch.tensor([1]), scores=None, class_names={1: name}).tobytes()
        for name in ("кошка", "собак", "\ue000\ue001\ue002\ue003\ue004")
    ]
    assert len({*pictures}) == 3  # letters, not boxes for each


def test_font_of_the_machine_is_found(no_fonts, tmp_path, monkeypatch):
    """A font whose only letter is a square of 800 of 1000 units."""
    builder_module = pytest.importorskip("fontTools.fontBuilder")
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    for step, place in enumerate([(100, 0), (100, 800), (900, 800), (900, 0)]):
        (pen.lineTo if step else pen.moveTo)(place)
    pen.closePath()
    builder = builder_module.FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "cat"])
    builder.setupCharacterMap({ord("猫"): "cat"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "cat": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "cat": (1000, 100)})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Cat", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "cat.ttf")
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda *_: [str(tmp_path / "cat.ttf")])
    assert fonts.drawable(NAMES, {4: 40}) == NAMES
    font = fonts.Font(20)
    assert font.getlength("猫猫") == 40
    assert font.getlength("猫 1") == 20 + font.getlength(" 1")
    drawn = draw_detections(
        Image.new("RGB", (400, 400)),
        boxes=torch.tensor([[10.0, 60, 90, 90]]),
        labels=torch.tensor([1]),
        scores=None,
        class_names={1: "猫"},
    )
    ink = {colour: number for number, colour in drawn.getcolors(1 << 20)}[(255, 255, 255)]
    size = 13  # pixels of the text in a picture of this size
    assert ink == pytest.approx((0.8 * size) ** 2, rel=0.3)
