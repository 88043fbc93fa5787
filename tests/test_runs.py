"""What is read of runs afterwards: samdetr.read_run, samdetr compare, samdetr count."""

import json
import re
import shutil
import statistics
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from helpers import REPOSITORY, TINY, TINY_DEFORMABLE, TINY_SAP, build_tiny, run_main, save

import samdetr
from samdetr import compare, count, report
from samdetr.datasets.coco_eval import METRICS, Detections
from samdetr.datasets.coco_eval_report import image_f1
from samdetr.datasets.ground_truth import GroundTruth
from samdetr.models.checkpoints import read_checkpoint
from samdetr.training.published import departures, published, recipe, recipe_of


def write_run(folder: Path, ap: list[float], *, settings: dict | None = None, about: dict | None = None) -> Path:
    """An output folder whose AP50 is twice its AP, at most 1; no other object than small ones."""
    folder.mkdir(parents=True)
    with open(folder / "log.txt", "w") as file:
        for epoch, value in enumerate(ap):
            figures = [value, min(1, 2 * value), *[0.5] * 2, *[-1] * 2, *[0.25] * 6]
            line = {"train_loss": 10 / (epoch + 1), "test_coco_eval_bbox": figures, "epoch": epoch}
            file.write(json.dumps(line) + "\n")
    if settings is not None:
        (folder / "settings.json").write_text(json.dumps({**settings, "about": about or {}}))
    return folder


def test_a_run_as_dataclasses(trained):
    run = samdetr.read_run(trained)
    lines = [json.loads(line) for line in (trained / "log.txt").read_text().splitlines()]
    assert run.problems == ()
    assert [epoch.number for epoch in run.epochs] == [0, 1]
    assert run.epochs[1].values["train_loss_giou_0"] == lines[1]["train_loss_giou_0"]
    assert run.last.metrics["AP50"] == lines[1]["test_coco_eval_bbox"][1]
    assert (run.settings["lr"], run.planned, run.done) == (1e-3, 2, 2)
    assert run.about["versions"]


def test_averaged_weights_count_and_the_last_line_of_an_epoch(tmp_path):
    folder = write_run(tmp_path / "run", [0.5, 0.1])
    again = {"epoch": 1, "test_coco_eval_bbox": [0.2] * 12, "test_ema_coco_eval_bbox": [0.6] * 12}
    with open(folder / "log.txt", "a") as file:
        file.write(f"{json.dumps(again)}\n")
    run = samdetr.read_run(folder)
    assert (run.best.number, run.best.metrics["AP"]) == (1, 0.6)
    assert len(run.epochs) == 2
    assert "APm" not in run.epochs[0].metrics


def test_seeds_and_flags(tmp_path, capsys):
    """Three seeds in other places, the third unfinished; a fourth run with another rate, a fifth of other data."""
    same = {"lr": 0.1, "epochs": 3, "coco_path": "here"}
    known = {"annotations_sha256": {"train.json": "a"}}
    ap = {"a": [0.1, 0.4, 0.3], "b": [0.2, 0.3, 0.5], "c": [0.3, 0.2]}
    folders = [
        write_run(
            tmp_path / name, ap[name], settings={**same, "seed": seed, "output_dir": name, "keep": seed}, about=known
        )
        for seed, name in enumerate("abc")
    ]
    folders.append(write_run(tmp_path / "d", [0.9] * 3, settings={**same, "lr": 0.2, "seed": 7}, about=known))
    folders.append(write_run(tmp_path / "e", [0.9] * 3, settings={**same, "seed": 8}, about={}))
    found = samdetr.compare_runs(folders)
    (seeds,) = found.seeds
    assert [run.folder.name for run in seeds.runs] == ["a", "b", "c"]
    assert seeds.epoch == 1
    assert seeds.last.mean["AP"] == pytest.approx((0.4 + 0.3 + 0.2) / 3)
    assert seeds.best.mean["AP"] == pytest.approx((0.4 + 0.3 + 0.3) / 3)
    assert seeds.best.deviation["AP50"] == pytest.approx(statistics.stdev([0.8, 0.6, 0.6]))
    assert "APm" not in seeds.last.mean
    assert {*found.differences} == {"seed", "lr", "keep"}
    assert found.differences["keep"] == ("0", "1", "2", "?", "?")

    picture = tmp_path / "curves.png"
    assert compare.main([*map(str, folders), "--picture", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "lr    0.1 (a, b, c, e); 0.2 (d)" in out
    assert "c: 2 of 3 epochs" in out
    row = next(line for line in out.splitlines() if line.startswith("mean of 3 seeds: a, b, c  last, 1"))
    assert row.split()[9:15] == ["0.3000", "0.6000", "0.5000", "0.5000", "-", "-"]
    assert picture.stat().st_size > 10_000
    assert compare.main([str(folders[0]), "--picture", str(picture)]) == 0  # our own


def test_damaged_files_are_lines(tmp_path, capsys):
    folder = write_run(tmp_path / "$_run\n", [0.5])
    deep = "[" * 100_000
    with open(folder / "log.txt", "ab") as file:
        file.write(b'{"epoch": true}\n\xff\n' + deep.encode() + b'\n{"epoch": 1, "train_loss": NaN, "test_loss": "x", ')
        file.write(b'"test_coco_eval_bbox": [1, 2]}\n{"epoch": 2, "train_loss": 1' + b"0" * 400 + b'}\n{"epo')
    (folder / "settings.json").write_text("[1]")
    (folder / "eval.json").mkdir()
    run = samdetr.read_run(folder)
    assert [epoch.number for epoch in run.epochs] == [0, 1, 2]
    assert run.last.number == 0
    assert run.epochs[1].values == run.epochs[2].values == {}
    assert any("4 lines are damaged and left out (2, 3, 4, 7)" in problem for problem in run.problems)
    assert compare.main([str(folder), "--picture", str(tmp_path / "p.png")]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == len(run.problems) == 4


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere"], "does not exist"),
        (["empty"], "holds no run"),
        (["run/log.txt"], "is a file"),
        (["run", "./run/"], "is named twice"),
        (["run", "--picture", "run/other.png"], "--overwrite replaces it"),
        (["run", "--picture", "run/x.txt"], "ends in .png"),
        (["run", "--picture", "run/log.txt/x.png"], "cannot be written"),
    ],
)
def test_wrong_words_of_compare(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    write_run(Path("run"), [0.5])
    Path("run/other.png").write_bytes(b"somebody's")
    assert compare.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("compare.py: error: ")
    assert error.count("\n") == 1
    assert told in error
    assert Path("run/other.png").read_bytes() == b"somebody's"


def test_published_runs():
    """As the table in docs/published.md has them, and each is found by its own settings alone."""
    table = (REPOSITORY / "docs/published.md").read_text()
    for name, curve in published().items():
        settings = recipe(name).flat()
        assert recipe_of(settings) == name
        assert recipe_of({**settings, "num_queries": 100}) is None
        older = {key: value for key, value in settings.items() if key not in ("relation", "sam_range")}
        assert recipe_of(older) == name  # a run before these settings came
        assert departures({**settings, "batch_size": 7}, name) == []
        assert departures({**settings, "lr": 1.0}, name) == ["lr 1.0 (0.0001)"]
        row = re.search(rf"\| \d+ \| ([\d.]+) \|[^\n]*scripts/{name}_\dgpu\.sh", table)
        assert row, name
        assert curve["coco_eval_bbox"][-1][0] == pytest.approx(float(row[1]) / 100, abs=6e-4)
        assert {len(curve[key]) for key in curve if key != "n_parameters"} == {len(curve["epoch"])}
        assert {len(metrics) for metrics in curve["coco_eval_bbox"]} == {len(METRICS)}


def test_f1_of_images():
    """Two objects, one found, one detection too many; the same with a threshold; no object; a crowd alone."""
    boxes = np.array([[0, 0, 10, 10], [20, 20, 10, 10], [0, 0, 10, 10.0]])
    truth = GroundTruth(
        images=np.arange(1, 4),
        categories=np.array([1]),
        image_ids=np.array([1, 1, 3]),
        category_ids=np.array([1, 1, 1]),
        boxes=boxes,
        areas=np.full(3, 100.0),
        crowd=np.array([False, False, True]),
    )
    found = Detections(
        np.arange(1, 4), np.array([2, 0, 0]), np.array([1, 1]), boxes[[0, 0]] + [[0, 0, 0, 0], [50, 0, 0, 0]],
        np.array([0.9, 0.5]),
    )  # fmt: skip
    for threshold, wanted in ((0, 2 / 4), (0.6, 2 / 3), (0.95, 0)):
        f1, objects = image_f1(found, truth, threshold=threshold)
        np.testing.assert_allclose(f1, [wanted, np.nan, np.nan])
        assert objects.tolist() == [2, 0, 0]


class Page(HTMLParser):
    """Tags, attributes and text; `open` has the elements that are not closed, in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.rows: list[list[str]] = []  # of tables
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br", "line"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag != "line":
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def write_report(tmp_path: Path, *folders: Path, looks: int = 0) -> Page:
    file = tmp_path / "report.html"
    assert report.main([*map(str, folders), "--output", str(file), "--explain", str(looks)]) == 0
    html = file.read_text()
    page = Page(html)
    assert page.open == []
    fetched = [attributes[name] for _, attributes in page.tags for name in ("src", "href") if name in attributes]
    assert all(address.startswith("data:image/") for address in fetched)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert "url(" not in html
    return page


def pictures(page: Page) -> list[str]:
    return [attributes["alt"] for tag, attributes in page.tags if tag == "img"]


def test_a_report_of_several_runs(tmp_path):
    """What files hold is text in the page, whatever it looks like; seeds, a published curve, a run without a log."""
    bad = "<script>alert('&')</script>"
    settings = {**recipe("r50_smca_e12").flat(), "lr": 3e-4}
    about = {"commit": bad, "versions": [bad], "device": 3}
    folders = [
        write_run(tmp_path / name, [0.1, 0.3 + 0.1 * seed], settings={**settings, "seed": seed}, about=about)
        for seed, name in enumerate(("<b>one", "$two_"))
    ]
    (folders[0] / "eval.json").write_text(
        json.dumps({"coco_eval_bbox": [0.5] * 12, "classes": [{"name": bad, "AP": 0.25, "num_objects": 3}, 5]})
    )
    (folders[1] / "confusion_matrix.png").write_bytes(b"no picture")
    (folders[1] / "eval.json").write_text("{")
    page = write_report(tmp_path, *folders)
    assert page.text.count(bad) >= 3
    assert "published r50_smca_e12, COCO" in page.text
    assert "differs in lr 0.0003 (0.0001)" in page.text
    row = next(row for row in page.rows if row[0].startswith("mean of 2 seeds: <b>one, $two_"))
    assert row[1:4] == ["last, 1", "0.3500 ±\xa00.0707", "0.7000 ±\xa00.1414"]  # AP 0.3 and 0.4, AP50 twice as much
    assert page.text.count("Thick lines: mean of runs that differ by seed alone") == 2
    assert ["<b>one", *["not recorded"] * 6] in page.rows
    assert "2 of 12" in page.text
    assert "eval.json is damaged" in page.text
    assert {"AP over epochs", "APs over epochs", "train_loss over epochs"} <= {*pictures(page)}
    assert "Confusion matrix" not in pictures(page)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "log.txt").touch()
    page = write_report(tmp_path, empty)
    assert "has no epoch yet" in page.text
    assert pictures(page) == []


def test_a_report_of_a_trained_run(trained, shapes, tmp_path):
    """With what --eval wrote: classes and pictures."""
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    run_main(shapes, "--eval", "--resume", str(folder / "checkpoint.pth"), "--output_dir", str(folder), network=[])
    page = write_report(tmp_path, folder)
    found = {*pictures(page)}
    assert "Where queries look" not in page.text
    assert {"Confusion matrix", "Precision and recall", "loss_ce over epochs", "train_loss_giou over epochs"} <= found
    evaluation = json.loads((folder / "eval.json").read_text())
    for row in evaluation["classes"]:
        assert row["name"] in page.text
    assert len(re.findall(r"\.\w+: F1 [01]\.\d\d", page.text)) == 7  # all images, each once
    shown = re.findall(r"F1 ([01]\.\d\d)", page.text.split("Best images")[1])
    assert shown[:4] == sorted(shown[:4], reverse=True)
    assert shown[4:] == sorted(shown[4:])
    evaluation["settings"]["coco_path"] = str(tmp_path / "gone")
    (folder / "eval.json").write_text(json.dumps(evaluation))
    assert "No images: " in write_report(tmp_path, folder).text
    notes = tmp_path / "notes.html"
    notes.write_text("mine")
    assert report.main([str(folder), "--output", str(notes)]) == 2
    assert notes.read_text() == "mine"


MAPS = ["Prior by decoder layer and head", "Attention by decoder layer and head"]
SAMPLING = ["Sampling points by encoder layer", "Sampling points by decoder layer"]
NETWORKS = {
    "sam_detr": (TINY, {"Salient points by decoder layer", *MAPS}),
    "sam_detr without prior": (
        [word for word in TINY if word != "--smca"],
        {"Salient points by decoder layer", MAPS[1]},
    ),
    "deformable_detr": (TINY_DEFORMABLE, {*SAMPLING}),
    "sap_detr": (TINY_SAP, {"Salient points by decoder layer", *MAPS}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_where_the_queries_of_a_run_look(name, shapes, tmp_path):
    """Each family's own sheets for each image, and a line about the others; then what is lost, one after the other."""
    network, sheets = NETWORKS[name]
    detector, values = build_tiny("--eval_size", "64", network=network)
    folder = write_run(tmp_path / "run", [0.1], settings={**values, "coco_path": str(shapes)})
    save(detector, values, folder / "checkpoint.pth")
    page = write_report(tmp_path, folder, looks=2)
    assert sorted(title for title in pictures(page) if "over epochs" not in title) == sorted([*sheets] * 2)
    lacking = {title.lower() for title in report.TITLES.values()} - {title.lower() for title in sheets}
    assert {*page.text.split(f"Not in this {values['model']}: ")[1].split(".")[0].split("; ")} == lacking
    assert len(re.findall(r"The best detection: \w+ 0\.\d\d, query \d+; checkpoint\.pth\.", page.text)) == 2
    if name != "sam_detr":
        return
    evil = tmp_path / "evil"
    with open(folder / "checkpoint_best.pth", "wb") as file:  # it comes first
        file.write(b"cos\nmkdir\n(V" + str(evil).encode() + b"\ntR.")
    page = write_report(tmp_path, folder, looks=1)
    assert not evil.exists()
    assert re.search(r"No sheets: \S+checkpoint_best\.pth", page.text)
    (folder / "checkpoint_best.pth").unlink()
    (folder / "settings.json").write_text(json.dumps({**values, "coco_path": "gone"}))
    assert re.search(
        "No sheets: the images that it evaluates on are not found from here: .*gone",
        write_report(tmp_path, folder, looks=1).text,
    )
    (folder / "checkpoint.pth").unlink()
    page = write_report(tmp_path, folder, looks=1)
    assert page.text.count("No sheets: no checkpoint is here") == 1
    assert "AP over epochs" in pictures(page)


def test_throughput_and_hours(trained, tmp_path):
    """Of an unfinished run that was stopped in its second epoch and is in its third, and of one that was trained."""
    folder = write_run(tmp_path / "run", [0.1, 0.2], settings={"epochs": 5})
    lines = [
        {"epoch": 0, "train_images": 100, "train_seconds": 4000, "test_images": 20, "test_seconds": 1000},
        {"epoch": 1, "train_images": 50, "train_seconds": 2500, "peak_mib": 3000},
        {"epoch": 1, "train_images": 50, "train_seconds": 1500, "test_images": 20, "test_seconds": 600, "peak_mib": 5},
        {"epoch": 2, "train_images": 40, "train_seconds": 400, "peak_mib": 0},
        {"epoch": 2, "train_seconds": -1}, {"epoch": 2, "train_images": "many"}, {"epoch": -1},
    ]  # fmt: skip
    (folder / "times.txt").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"epoch": 3, "tr')
    page = write_report(tmp_path, folder, trained)
    images, seconds = 100 + 50 + 50 + 40, 4000 + 2500 + 1500 + 400
    left = 3 * (5000 + 2500 + 2100) / 2  # two epochs are done
    assert page.rows[page.rows.index(next(row for row in page.rows if "hours left" in row)) + 1] == [
        "run", f"{images / seconds:.1f}", f"{40 / 1600:.1f}", "2.33 (2:20:00)", "0.44 (0:26:40)",
        f"{left / 3600:.2f} (4:00:00)", "3,000 MiB",
    ]  # fmt: skip
    assert "2 lines are damaged and left out (7, 8)" in page.text
    assert "lines with values that no run writes are left out" in page.text
    spent = samdetr.read_run(trained).spent
    assert (spent.train_images, spent.test_images) == (2 * 16, 2 * 7)
    assert spent.train_seconds > 0
    assert spent.test_seconds > 0
    assert spent.peak_mib > 50
    assert samdetr.read_run(trained).seconds_left == 0


def table_of(out: str) -> dict[str, list[float]]:
    rows = [line.split() for line in out.splitlines() if re.fullmatch(r"[\w.]+ +[\d,]+ +[\d,]+ +[\d.]+", line)]
    return {name: [float(cell.replace(",", "")) for cell in cells] for name, *cells in rows}


def test_count_flags(capsys):
    assert count.main(["--smca"]) == 0
    out = capsys.readouterr().out
    counted = table_of(out)
    assert counted["all"] == [58_345_194, 58_122_794, 99.3]  # parameters: docs/published.md
    parts = ("backbone", "projection", "encoder", "decoder")
    assert [sum(counted[part][i] for part in parts) for i in (0, 1)] == counted["all"][:2]
    assert sum(counted[part][2] for part in parts) == pytest.approx(99.3, abs=0.2)
    inside = [value for name, value in counted.items() if name.startswith("decoder.")]
    assert sum(value[2] for value in inside) == pytest.approx(counted["decoder"][2], abs=0.3)
    assert "one FLOP" in out


def test_count_a_checkpoint(trained, capsys):
    weights = read_checkpoint(str(trained / "checkpoint.pth"))["model"]
    assert count.main(["--resume", str(trained / "checkpoint.pth"), "--size", "64", "96", "--latency", "1"]) == 0
    out = capsys.readouterr().out
    assert table_of(out)["all"][0] == sum(
        value.numel() for name, value in weights.items() if value.is_floating_point() and "running" not in name
    )
    assert "6 classes" in out
    assert re.search(r"[\d.]+ ms for an image \(cpu, \d+ threads, float32, median of 1\)", out)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--resume", "nowhere.pth"], "--resume nowhere.pth"),
        (["--resume", "auto"], "--output_dir"),
        (["--pretrained", "x.pth"], "with --resume"),
        (["--enc_n_points", "3"], "no effect on --model sam_detr"),
        (["--size", "31", "64"], "from 32 to"),
        (["--latency", "0"], "from 1 to"),
        (["--smcx"], "did you mean --smca?"),
    ],
)
def test_wrong_words_of_count(words, told, capsys):
    try:
        status = count.main(words)
    except SystemExit as end:
        status = end.code
    assert status == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert told in error
    assert "error: " in error
