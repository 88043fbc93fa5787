"""What helps long trainings, from the command line: --ema, the best checkpoint, --patience, --max_hours, --replay."""

import json
import shlex
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, call_main, call_program, error_line, evaluate, read_log, run_main

from samdetr.training import loop
from samdetr.training.ema import WeightAverage
from samdetr.training.guard import StepGuard
from samdetr.training.run import Parts
from samdetr.training.state import TrainingState
from samdetr.util.checkpoint import checksum

FLAGS = shlex.split("--epochs 2 --lr 1e-3 --lr_schedule cosine --warmup_iters 3 --ema 0.9")


@pytest.fixture(scope="module")
def averaged(shapes, tmp_path_factory):
    """Output folder of two epochs with averaged weights; do not write into it."""
    output = tmp_path_factory.mktemp("run") / "averaged"
    run_main(shapes, *FLAGS, "--output_dir", str(output))
    return output


def load(path):
    return torch.load(path, weights_only=True)


def test_averages_are_logged_saved_and_evaluated(averaged, shapes, tmp_path):
    saved, lines = load(averaged / "checkpoint.pth"), read_log(averaged)
    assert saved["ema"]["model"].keys() == saved["model"].keys()
    assert saved["ema"]["updates"] == 8
    own, mean = (saved[name]["decoder.class_heads.0.weight"] for name in ("model",)), saved["ema"]["model"]
    assert not torch.equal(next(own), mean["decoder.class_heads.0.weight"])
    for line in lines:
        names = {name.removeprefix("test_") for name in line if name.startswith("test_")}
        assert {name for name in names if not name.startswith("ema_")} == {n[4:] for n in names if n.startswith("ema_")}
        assert line["test_ema_loss"] != line["test_loss"]
    checkpoint = averaged / "checkpoint.pth"
    assert evaluate(shapes, checkpoint, tmp_path / "a")[0] == lines[1]["test_ema_coco_eval_bbox"]
    assert evaluate(shapes, checkpoint, tmp_path / "b", "--raw_weights")[0] == lines[1]["test_coco_eval_bbox"]


def test_pictures_are_drawn_with_averages(averaged, shapes, tmp_path, monkeypatch):
    from samdetr import demo

    taken = []
    take = "samdetr.inference.predictor.load_weights"
    monkeypatch.setattr(take, lambda network, state, *, source: taken.append(state))
    flags = ["--images", str(shapes / "val2017"), "--limit", "1", "--output", str(tmp_path), "--device", "cpu"]
    for more in ([], ["--raw_weights"]):
        assert demo.main(["--resume", str(averaged / "checkpoint.pth"), *flags, *more]) == 0
    saved = load(averaged / "checkpoint.pth")
    assert list(map(checksum, taken)) == [checksum(saved["ema"]["model"]), checksum(saved["model"])]


def test_a_resumed_run_has_the_same_averages(averaged, shapes, tmp_path):
    """From the middle of an epoch."""
    first = ["--save_every_iterations", "1", "--keep", "9"]
    run_main(shapes, *FLAGS, *first, "--output_dir", str(tmp_path / "whole"))
    middle = tmp_path / "whole" / "checkpoint0000_000003.pth"
    run_main(shapes, *FLAGS, "--resume", str(middle), "--output_dir", str(tmp_path / "resumed"), network=TINY)
    straight, resumed = (load(folder / "checkpoint.pth") for folder in (averaged, tmp_path / "resumed"))
    for name in ("model", "ema", "optimizer", "extras"):
        assert checksum(resumed[name]) == checksum(straight[name]), name
    assert read_log(tmp_path / "resumed") == read_log(averaged)


def test_averages_start_with_a_run_that_had_none(averaged, trained, shapes, tmp_path, capsys):
    run_main(shapes, *FLAGS, "--resume", str(trained / "checkpoint0000.pth"), "--output_dir", str(tmp_path / "with"))
    assert "the average of the weights starts from these" in capsys.readouterr().out
    assert load(tmp_path / "with" / "checkpoint.pth")["ema"]["updates"] == 4
    flags = [*FLAGS, "--ema", "0", "--resume", str(averaged / "checkpoint0000.pth")]
    run_main(shapes, *flags, "--output_dir", str(tmp_path / "without"))
    assert "--ema continues it" in capsys.readouterr().out
    assert load(tmp_path / "without" / "checkpoint.pth")["ema"] is None


def test_learning_rates_of_a_run(averaged):
    """Steps 0 to 3 of 8: warm-up over 3, then half a cosine over the other 5, which begins at 1."""
    rises = [0.001, 0.001 + 0.999 / 3, 0.001 + 0.999 * 2 / 3, 1]
    assert read_log(averaged)[0]["train_lr"] == pytest.approx(1e-3 * sum(rises) / 4)
    cosines = [0.9045085, 0.6545085, 0.3454915, 0.0954915]  # (1 + cos(k pi / 5)) / 2
    assert read_log(averaged)[1]["train_lr"] == pytest.approx(1e-3 * sum(cosines) / 4)


@pytest.fixture
def made_up(monkeypatch):
    """Let evaluations find these APs, one after the other."""

    def use(aps: list[float], *, ema: bool = False) -> None:
        found = iter(aps)

        def metrics(parts):
            return {"loss": 1.0, "coco_eval_bbox": [next(found), *[0.5] * 11]}, SimpleNamespace(table=lambda: "")

        monkeypatch.setattr(Parts, "evaluate", metrics)

    return use


def epochs(output) -> list[int]:
    return [line["epoch"] for line in read_log(output)]


def test_the_best_checkpoint_and_patience(shapes, tmp_path, capsys, made_up):
    """Best after epoch 1; two evaluations without a better one end the run, and one that goes on from there."""
    flags = ["--epochs", "9", "--patience", "2", "--keep", "0", "--output_dir", str(tmp_path)]
    made_up([0.1, 0.3])
    flags[1] = "2"
    run_main(shapes, *flags)
    assert load(tmp_path / "checkpoint_best.pth")["epoch"] == 1
    flags[1] = "9"
    made_up([0.3, 0.2, 0.9])  # as good is not better
    run_main(shapes, *flags, "--resume", "auto")
    assert epochs(tmp_path) == [0, 1, 2, 3]
    assert "stopped by --patience 2: no AP of the last 2 evaluations is above 0.3000" in capsys.readouterr().out
    assert load(tmp_path / "checkpoint_best.pth")["epoch"] == 1
    assert load(tmp_path / "checkpoint.pth")["epoch"] == 3
    assert not (tmp_path / "checkpoint0001.pth").exists()  # --keep 0
    run_main(shapes, *flags, "--resume", "auto")
    assert epochs(tmp_path) == [0, 1, 2, 3]
    run_main(shapes, *flags, "--resume", "auto", "--patience", "3", "--epochs", "5")
    assert epochs(tmp_path) == [0, 1, 2, 3, 4]
    assert load(tmp_path / "checkpoint_best.pth")["epoch"] == 4


def test_the_best_is_that_of_averaged_weights():
    figures = {"test_coco_eval_bbox": [0.4] * 12, "test_ema_coco_eval_bbox": [0.3] * 12}
    assert loop.average_precision(figures) == 0.3
    assert loop.average_precision({"test_coco_eval_bbox": [0.4] * 12}) == 0.4
    assert loop.average_precision({"train_loss": 1}) is None


def test_hours_are_counted_over_resumes(shapes, tmp_path, capsys, monkeypatch):
    """A step takes an hour."""
    now = [0.0]
    monkeypatch.setattr("samdetr.training.cluster.wall_clock.time.monotonic", lambda: now[0])
    step = StepGuard.step

    def slow(*arguments):
        now[0] += 3600
        step(*arguments)

    monkeypatch.setattr(StepGuard, "step", slow)
    flags = ["--epochs", "2", "--output_dir", str(tmp_path)]
    run_main(shapes, *flags, "--max_hours", "2.5")
    assert "--max_hours 2.5 are used up\nstopped after step 3 of epoch 0" in capsys.readouterr().out
    assert load(tmp_path / "checkpoint.pth")["iteration"] == 3
    run_main(shapes, *flags, "--max_hours", "2.5", "--resume", "auto")
    assert "--max_hours 2.5 are used up (3.00); a larger number continues" in capsys.readouterr().out
    assert load(tmp_path / "checkpoint.pth")["iteration"] == 3
    run_main(shapes, *flags, "--max_hours", "5", "--resume", "auto")
    saved = load(tmp_path / "checkpoint.pth")
    assert (saved["epoch"], saved["iteration"], saved["extras"]["clock"]) == (1, 1, {"seconds": 5 * 3600.0})
    assert epochs(tmp_path) == [0]
    run_main(shapes, *flags, "--max_hours", "9", "--resume", "auto")
    assert epochs(tmp_path) == [0, 1]
    straight = tmp_path / "straight"
    run_main(shapes, *flags, "--output_dir", str(straight))
    torch.testing.assert_close(
        load(tmp_path / "checkpoint.pth")["model"], load(straight / "checkpoint.pth")["model"], rtol=0, atol=0
    )
    assert read_log(tmp_path) == read_log(straight)


def test_a_diverged_run_stops_and_its_step_is_repeated(shapes, tmp_path, capsys):
    """A learning rate that no weight survives: the second step and all after it have no finite loss."""
    output = tmp_path / "output"
    flags = ["--lr", "1e30", "--clip_max_norm", "0", "--max_bad_steps", "2", "--output_dir", str(output)]
    assert call_main(shapes, *flags) == 2
    out, err = capsys.readouterr()
    assert out.count("step skipped, 1 in a row, 1 in all: epoch 0, iteration 1: loss_ce = nan, ") == 1
    line = error_line(err)
    for part in (
        "2 steps in a row were not finite, the last one in epoch 0, iteration 2: loss_ce = nan, ",
        "loss_giou_0 = nan",
        "; first NaN: output of encoder.layers.0.self_attention.out_proj",
        "--lr",
        f"python main.py --replay {output}/replay.pth",
    ):
        assert part in line
    assert [path.name for path in output.iterdir()] == ["replay.pth"]
    ids = line.split("image ids ")[1].split("]")[0]

    assert call_program("--replay", str(output / "replay.pth"), "--device", "cpu") == 1
    replayed = capsys.readouterr().out
    assert replayed.startswith(f"epoch 0, iteration 2, image ids {ids}]\n")
    assert "loss_ce_0              nan   <- not finite\n" in replayed
    assert "first NaN: output of encoder.layers.0.self_attention.out_proj\n" in replayed

    content = load(output / "replay.pth")
    assert all(torch.isfinite(weight).all() for weight in content["model"].values())
    assert {int(state["step"]) for state in content["optimizer"]["state"].values()} == {1}
    assert json.loads(json.dumps(content["settings"]))["lr"] == 1e30


def test_a_diverged_run_is_evaluated(shapes, tmp_path):
    """Detections that are no numbers hit nothing; the log averages the steps that were taken."""
    run_main(shapes, "--epochs", "1", "--lr", "1e30", "--clip_max_norm", "0", "--output_dir", str(tmp_path))
    (line,) = read_log(tmp_path)
    assert (line["train_bad_steps"], line["test_loss"], line["test_coco_eval_bbox"][0]) == (3, None, 0)
    assert 0 < line["train_loss"] < 1000
    assert load(tmp_path / "checkpoint.pth")["extras"]["bad_steps"] == {"skipped": 3, "bad": 3, "in_a_row": 3}


def test_replay_where_the_step_is_finite(shapes, tmp_path, capsys):
    """The same batch with the weights from before: what it says equals what training did."""
    output = tmp_path / "output"
    flags = ["--lr", "1e30", "--clip_max_norm", "0", "--max_bad_steps", "1", "--output_dir", str(output)]
    assert call_main(shapes, *flags) == 2
    content = load(output / "replay.pth")
    capsys.readouterr()
    torch.manual_seed(0)
    for name, weight in content["model"].items():
        if weight.is_floating_point() and "running" not in name:
            content["model"][name] = 0.1 * torch.randn_like(weight)
    del content["checksum"]
    torch.save(content, tmp_path / "milder.pth")
    content["settings"]["lr"] = content["optimizer"]["param_groups"][0]["lr"] = 1e-4
    assert call_program("--replay", str(tmp_path / "milder.pth"), "--device", "cpu") == 0
    out = capsys.readouterr().out
    assert "<-" not in out
    assert "first gradient that is not finite: none" in out
    assert "the step is finite; after it all weights are finite, too" in out

    torch.save({"model": content["model"]}, tmp_path / "weights.pth")
    assert call_program("--replay", str(tmp_path / "weights.pth")) == 2
    assert "weights.pth holds no step; pass the replay.pth" in error_line(capsys.readouterr().err)


def test_state_of_all_aids_is_in_a_checkpoint(averaged):
    """They are parts of a training state, restored by it (tests of resuming compare all of it)."""
    saved = load(averaged / "checkpoint.pth")
    assert saved["extras"] == {"bad_steps": {"skipped": 0, "bad": 0, "in_a_row": 0}}
    network = torch.nn.Linear(1, 1)
    average, guard = WeightAverage(network, decay=0.5), StepGuard(network, device=torch.device("cpu"))
    state = TrainingState(
        model=network, optimizer=torch.optim.AdamW(network.parameters()), scheduler=None, seed=0, batch=1, ema=average,
        extras={"bad_steps": guard},
    )  # fmt: skip
    saved = {
        "optimizer": state.optimizer.state_dict(),
        "ema": {"model": {"weight": torch.tensor([[5.0]]), "bias": torch.tensor([7.0])}, "updates": 3, "decay": 0.5},
        "extras": {"bad_steps": {"skipped": 4, "bad": 2, "in_a_row": 1}},
    }
    for group in saved["optimizer"]["param_groups"]:
        group["initial_lr"] = group["lr"]
    for group in state.optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    state.restore(saved, source="here")
    assert average.state_dict() | {"model": None} == {"model": None, "updates": 3, "decay": 0.5}
    assert {name: weight.item() for name, weight in average.weights().items()} == {"weight": 5.0, "bias": 7.0}
    assert guard.state_dict() == saved["extras"]["bad_steps"]
