"""Steps that are not finite: nothing of them stays, in any process, and the run stops when there are too many."""

import contextlib
import copy
import io
import math
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers import TINY, TINY_DEFORMABLE, TINY_SAP, build_tiny, criterion_of, in_processes
from torch.nn.parallel import DistributedDataParallel

from samdetr import engine
from samdetr.training import replay
from samdetr.training.checkpoints import CheckpointFolder
from samdetr.training.ema import WeightAverage
from samdetr.training.guard import BadSteps, StepGuard
from samdetr.training.optim import build_scheduler
from samdetr.training.state import TrainingState
from samdetr.training.update import Update
from samdetr.util.checkpoint import read_file, save_file
from samdetr.util.distributed import init_distributed, shutdown
from samdetr.util.padded_images import pad_images
from samdetr.util.targets import TargetBatch

CPU = torch.device("cpu")


def batch(number: int, *, spoilt: bool = False):
    """Two images, the first with an object, the second with two; an image of NaN if spoilt."""
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(2, 3, 64, 64, generator=generator)
    if spoilt:
        images[1, :, 5] = math.nan
    targets = [
        {
            "labels": torch.randint(6, (n,), generator=generator),
            "boxes": 0.3 + 0.3 * torch.rand(n, 4, generator=generator),
            "image_id": torch.tensor(10 * number + n),
        }
        for n in (1, 2)
    ]
    return pad_images(list(images)), TargetBatch.pack(targets)


class Training:
    """A tiny network with learned norms and its optimiser, at a constant learning rate, without dropout if not said."""

    def __init__(self, network=TINY, *, optimizer=None, limit=3, keep_gradients=False, scaler=None, dropout="0"):
        flags = [*network, "--dropout", dropout]
        self.network, self.settings = build_tiny(network=flags)
        self.criterion = criterion_of(flags)
        self.optimizer = (optimizer or (lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True)))(self.network.parameters())
        self.scheduler = build_scheduler(self.optimizer, schedule="step", total_steps=100, drop_step=100)
        self.average = WeightAverage(self.network, decay=0.9)
        self.update = Update(
            self.network, self.optimizer, self.scheduler, clip_max_norm=0.1, max_bad_steps=limit,
            keep_gradients=keep_gradients, scaler=scaler, average=self.average,
        )  # fmt: skip
        self.guard, self.keep_gradients, self.scaler = self.update.guard, keep_gradients, scaler
        self.model = self.network

    def run(self, batches: list, **options) -> dict[str, float]:
        return engine.train_one_epoch(
            model=self.model, criterion=self.criterion, loader=batches, update=self.update, device=CPU, epoch=0,
            print_every=50, **options,
        )  # fmt: skip

    def training_state(self) -> TrainingState:
        return TrainingState(
            model=self.network, optimizer=self.optimizer, scheduler=self.scheduler, scaler=self.scaler, seed=0, batch=2,
            keep_gradients=self.keep_gradients, facts={"settings": self.settings},
        )  # fmt: skip

    def state(self) -> dict:
        """All that a step changes."""
        gradients = {n: w.grad for n, w in self.network.named_parameters() if w.grad is not None}
        parts = self.network.state_dict(), self.optimizer.state_dict()["state"], self.average.state_dict()
        names = ("model", "optimizer", "average", "gradients")
        return copy.deepcopy(dict(zip(names, (*parts, gradients if self.keep_gradients else {}))))


def same(ours: dict, wanted: dict) -> None:
    torch.testing.assert_close(ours, wanted, rtol=0, atol=0)


OPTIMIZERS = {
    "fused AdamW": None,
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=False),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("keep_gradients", [False, True])
def test_nothing_of_a_bad_step_stays(optimizer, keep_gradients):
    """Weights, moments, step counts, statistics of norms, averages, kept gradients, and the log of the epoch."""
    options = {"optimizer": OPTIMIZERS[optimizer], "keep_gradients": keep_gradients}
    straight, disturbed = Training(**options), Training(**options)
    wanted = straight.run([batch(0), batch(1)])
    logged = disturbed.run([batch(0), batch(7, spoilt=True), batch(1)])
    same(disturbed.state(), straight.state())
    assert logged == pytest.approx(wanted | {"bad_steps": 1}, rel=1e-12)
    assert wanted["bad_steps"] == 0
    assert (straight.scheduler.last_epoch, disturbed.scheduler.last_epoch) == (2, 3)  # it counts iterations
    assert disturbed.guard.state_dict() == {"skipped": 1, "bad": 1, "in_a_row": 0}


def test_the_first_step_is_bad():
    disturbed, straight = Training(), Training()
    before = disturbed.state()
    disturbed.run([batch(7, spoilt=True)])
    assert all(torch.equal(a, b) for a, b in zip(before["model"].values(), disturbed.state()["model"].values()))
    disturbed.run([batch(0)])
    straight.run([batch(0)])
    same(disturbed.state(), straight.state())


def test_one_part_of_a_step_is_bad():
    straight, disturbed = Training(), Training()
    straight.run([batch(0), batch(1)], accumulate=2)
    disturbed.run([batch(0), batch(1), batch(2), batch(7, spoilt=True)], accumulate=2)
    same(disturbed.state(), straight.state())


def spoil_gradients(training: Training) -> None:
    """A loss of 0 whose gradient is 0 times infinity."""
    forward = training.criterion.forward

    def spoilt(outputs, targets, num_boxes=None):
        terms = forward(outputs, targets, num_boxes)
        return terms | {"loss_bbox": terms["loss_bbox"] + (0 * outputs["pred_boxes"]).abs().sum().sqrt()}

    training.criterion.forward = spoilt


def test_gradients_that_are_not_finite(capsys):
    training = Training()
    spoil_gradients(training)
    before = training.state()["model"]
    training.run([batch(0), batch(1)])
    same(training.state()["model"], before)
    assert training.guard.state_dict() == {"skipped": 2, "bad": 2, "in_a_row": 2}
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step skipped")]
    assert lines == [
        "step skipped, 1 in a row, 1 in all: epoch 0, iteration 0: the gradients, but no loss; image ids [1, 2]",
        "step skipped, 2 in a row, 2 in all: epoch 0, iteration 1: the gradients, but no loss; image ids [11, 12]",
    ]


@pytest.mark.parametrize(("scale", "bad"), [(2.0**126, 0), (0.5, 1)])
def test_overflow_under_a_loss_scale_is_no_bad_step(scale, bad):
    """The scaler looks for the largest scale that does not overflow; under a small one it is not the scale."""
    training = Training(scaler=torch.amp.GradScaler("cpu", init_scale=scale), limit=1)
    if bad:
        spoil_gradients(training)
    before = training.state()
    if bad:
        with pytest.raises(BadSteps):
            training.run([batch(0)])
    else:
        assert training.run([batch(0)])["bad_steps"] == 0
    assert training.scaler.get_scale() == scale / 2
    same(training.state()["model"], before["model"])
    assert training.guard.state_dict() == {"skipped": 1, "bad": bad, "in_a_row": bad}


def test_so_many_in_a_row_stop_the_run():
    """A good one between them begins the count anew; the network is as before the last, whose batch is there."""
    training, bad = Training(limit=2), batch(7, spoilt=True)
    training.run([bad, batch(0), bad, batch(1)])
    before = training.state()
    with pytest.raises(BadSteps) as stopped:
        training.run([bad, batch(8, spoilt=True), batch(1), batch(2)])
    same(training.state()["model"], before["model"])
    same(training.optimizer.state_dict()["state"], before["optimizer"])
    assert str(stopped.value).startswith("2 steps in a row were not finite, the last one in epoch 0, iteration 1: ")
    assert "loss_ce = nan" in str(stopped.value)
    assert str(stopped.value).endswith("; image ids [81, 82]")
    step = stopped.value.step
    assert (step.iteration, stopped.value.rank, int(step.num_boxes)) == (1, 0, 3)
    ((images, targets),) = step.parts
    torch.testing.assert_close(images.images, batch(8, spoilt=True)[0].images, equal_nan=True)
    assert [int(t["image_id"]) for t in targets] == [81, 82]


def test_what_is_skipped_what_is_bad_and_what_counts_in_a_row():
    """A loss without gradient is at fault alone; an overflow that a loss scale caused neither counts nor ends a row."""
    guard = StepGuard(torch.nn.Linear(1, 1), device=CPU)
    one, nan, inf, scale = torch.tensor([1.0, math.nan, math.inf, 4.0])
    asked = [
        ([one, nan], one, None, (1, 1), 1),
        ([one], inf, scale, (1, 0), 1),
        ([one], inf, scale / 8, (1, 1), 2),
        ([nan], inf, scale, (1, 1), 3),
        ([one, one], one, scale, (0, 0), 0),
    ]
    for losses, norm, of_scaler, wanted, in_a_row in asked:
        assert tuple(map(int, guard.judge(losses, norm, scale=of_scaler))) == wanted
        assert guard.state_dict()["in_a_row"] == in_a_row
    assert guard.state_dict() == {"skipped": 4, "bad": 3, "in_a_row": 0}


def test_counts_go_on_after_a_resume():
    straight, resumed = Training(limit=3), Training(limit=3)
    straight.run([batch(7, spoilt=True)] * 2)
    resumed.guard.load_state_dict(straight.guard.state_dict())
    with pytest.raises(BadSteps, match="3 steps in a row were not finite, the last one in epoch 0, iteration 0"):
        resumed.run([batch(7, spoilt=True)])


@pytest.mark.parametrize("keep_gradients", [False, True])
def test_a_step_is_repeated_from_its_file(keep_gradients, tmp_path):
    """Bit by bit, dropout and kept gradients included, by another network after other steps."""
    training = Training(limit=1, dropout="0.2", keep_gradients=keep_gradients)
    training.run([batch(0), batch(1)])
    spoil_gradients(training)
    with pytest.raises(BadSteps) as stopped:
        training.run([batch(2), batch(3)])
    step = stopped.value.step
    save_file(replay.pack(step, training.training_state()), tmp_path / "replay.pth")
    content = read_file(str(tmp_path / "replay.pth"), name="replay")
    other = Training(dropout="0.2")
    other.run([batch(5)])
    other.network.load_state_dict(content["model"])
    forward = other.criterion.forward
    for fault in (True, False):
        if fault:
            spoil_gradients(other)
        repeated = replay.repeat(content, network=other.network, criterion=other.criterion, device=CPU, amp=None)
        assert repeated.terms == {name: step.metrics[0][name].item() for name in repeated.terms}
        assert set(repeated.terms) == {"loss"} | {
            f"loss_{n}{layer}" for n in ("ce", "bbox", "giou") for layer in ("", "_0")
        }
        assert (repeated.nan, repeated.infinite, repeated.same_numbers) == (None, None, True)
        # backward reaches the heads of the last layer first
        assert repeated.gradient == ("decoder.box_heads.1.layers.2.bias" if fault else None)
        assert repeated.finite is not fault
        other.criterion.forward = forward
    straight = Training(dropout="0.2", keep_gradients=keep_gradients)
    straight.run([batch(0), batch(1)])
    straight.run([batch(2)])
    gradient = {name: weight.grad for name, weight in straight.network.named_parameters()}
    norm = torch.nn.utils.get_total_norm([g for g in gradient.values() if g is not None]).item()
    assert norm == pytest.approx(0.1, rel=1e-3)  # that training clipped, as it goes on with them
    clipped = {name: weight.grad * 0.1 / repeated.norm for name, weight in other.network.named_parameters()}
    for name, value in gradient.items():
        torch.testing.assert_close(clipped[name], value, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("spoil", "what", "where"),
    [
        ("image", "nan", "the images"),
        ("backbone.body.layer2.0.conv1.weight", "nan", "output of backbone.body.layer2.0.conv1"),
        ("encoder.layers.0.feed_forward.linear1.weight", "nan", "output of encoder.layers.0.feed_forward.linear1"),
        ("decoder.box_heads.0.layers.0.bias", "nan", "output of decoder.box_heads.0.layers.0"),
    ],
)
def test_where_it_began(spoil, what, where):
    training = Training(limit=1)
    if spoil != "image":
        with torch.no_grad():
            training.network.get_parameter(spoil).view(-1)[0] = math.nan
    with pytest.raises(BadSteps) as stopped:
        training.run([batch(7, spoilt=spoil == "image")])
    content = replay.pack(stopped.value.step, training.training_state())
    repeated = replay.repeat(content, network=training.network, criterion=training.criterion, device=CPU, amp=None)
    assert getattr(repeated, what) == where
    assert not repeated.finite
    assert any(line.endswith("<- not finite") for line in repeated.lines())


def half(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    init_distributed(device="cpu", dist_url=f"file://{folder}/meeting")
    results = {}
    for fault in ("none", "image", "term without gradient"):
        training = Training(limit=2)
        training.model = DistributedDataParallel(training.network)
        forward = training.criterion.forward

        def spoilt(outputs, targets, num_boxes=None, forward=forward):
            terms = forward(outputs, targets, num_boxes)
            bad = any(int(t["image_id"]) > 70 for t in targets)
            return terms | {"loss_giou": terms["loss_giou"] + (math.nan if bad else 0)}

        if fault == "term without gradient":
            training.criterion.forward = spoilt
        batches = [batch(rank), batch(2 + rank)]
        if fault != "none":
            bad = batch(7, spoilt=fault == "image") if rank == 1 else batch(4)
            batches.insert(1, bad)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            logged = training.run(batches)
        results[fault] = {"state": training.state(), "logged": logged, "said": said.getvalue()}
        if fault != "none":
            try:
                training.run([bad, bad])
            except BadSteps as error:
                results[fault] |= {"error": str(error), "rank": error.rank}
                text = replay.keep(
                    error, state=training.training_state(), criterion=training.criterion, device=CPU, amp=None,
                    folder=CheckpointFolder(f"{folder}/{fault}"),
                )  # fmt: skip
                results[fault]["text"] = text
    torch.save(results, Path(folder) / f"{rank}.pth")
    shutdown()


def test_two_processes_skip_alike(tmp_path):
    """The second alone has the fault: with a NaN that the gradients bring to the first, and one that they do not."""
    in_processes(half, (str(tmp_path),), 2)
    first, second = (torch.load(tmp_path / f"{rank}.pth") for rank in (0, 1))
    for fault in ("image", "term without gradient"):
        for ours in (first, second):
            same(ours[fault]["state"], ours["none"]["state"])
            assert ours[fault]["logged"] == pytest.approx(ours["none"]["logged"] | {"bad_steps": 1}, rel=1e-12)
            assert "2 steps in a row were not finite, the last one in epoch 0, iteration 1: " in ours[fault]["error"]
            assert ours[fault]["error"].endswith("; image ids [71, 72] of rank 1")
            assert ours[fault]["rank"] == 1
            assert ours[fault]["text"].startswith(ours[fault]["error"])
        assert first[fault]["text"] == second[fault]["text"]
        skipped = "step skipped, 1 in a row, 1 in all: epoch 0, iteration 1: "
        assert [ours[fault]["said"].count(skipped) for ours in (first, second)] == [1, 0]
        content = replay.read(str(tmp_path / fault / "replay.pth"))  # that of the process at fault
        assert (content["rank"], replay.image_ids(content)) == (1, [71, 72])
        assert content["num_boxes"] == 3
    assert "; first NaN: the images. Try a smaller `lr`" in first["image"]["text"]
    assert "; first NaN: loss_giou. Try" in first["term without gradient"]["text"]


@pytest.mark.parametrize("network", [TINY, TINY_DEFORMABLE, TINY_SAP], ids=["sam", "deformable", "sap"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, 1e38])
def test_degenerate_predictions_give_a_loss(network, value):
    """Whatever boxes and logits are: a matching of every object to a query, and numbers, finite or not."""
    training = Training(network)
    images, targets = batch(0)
    targets = targets.unpack()
    outputs = training.network(images)
    names = [name for name in outputs if name.startswith("pred_")]
    for name in names:
        for part in ([slice(None)], [0, slice(3)], [..., slice(2, None)]):  # all, some queries, sizes
            spoilt = outputs | {name: outputs[name].clone()}
            spoilt[name][tuple(part)] = value
            (matches,) = training.criterion.matcher([spoilt], targets)
            assert sorted(matches.target.tolist()) == [0, 1, 2]
            assert matches.image.tolist() == [0, 1, 1]
            loss, terms = engine.compute_losses(training.criterion, spoilt, targets)
            loss.backward(retain_graph=True)
            if value == 0:
                assert all(torch.isfinite(term) for term in terms.values()), name


@pytest.mark.parametrize("network", [TINY, TINY_DEFORMABLE, TINY_SAP], ids=["sam", "deformable", "sap"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_degenerate_weights_are_reported_not_asserted(network, value):
    """NaN and infinity wherever a network can bring them forth, in training and in evaluation."""
    for part in ("backbone", "projection", "encoder", "decoder"):
        training = Training(network, limit=1)
        with torch.no_grad():
            next(p for n, p in training.network.named_parameters() if n.startswith(part)).fill_(value)
        # Infinity has a finite sigmoid, which is all that the decoders make of their first boxes.
        with pytest.raises(BadSteps) if value != math.inf or part != "decoder" else suppress(BadSteps):
            training.run([batch(0)])
        training.network.eval()
        with torch.no_grad():
            training.network(batch(0)[0])
