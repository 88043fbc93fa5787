"""With what a run resumes, and where: parts and places of a checkpoint, without a run."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers import settings
from torch import Tensor, nn

from samdetr.datasets.sampler import TrainSampler
from samdetr.training import state
from samdetr.training.checkpoints import CheckpointFolder
from samdetr.training.ema import WeightAverage
from samdetr.training.optim import build_scheduler, parameter_groups
from samdetr.training.resume import Resume, Source, claim_folder, plan
from samdetr.training.state import TrainingState
from samdetr.util.checkpoint import checksum
from samdetr.util.logger import MetricAverager

RATES = {"lr": 1e-2, "lr_backbone": 1e-3, "lr_linear_proj_names": [], "lr_linear_proj_mult": 0.1}


class Counter:
    """A further part of a run."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, saved: dict[str, int]) -> None:
        self.count = saved["count"]


def training(seed: int) -> TrainingState:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    optimizer = torch.optim.AdamW(parameter_groups(model, **RATES))
    scheduler = build_scheduler(optimizer, schedule="step", total_steps=9, drop_step=3)
    average = WeightAverage(model, decay=0.9)
    return TrainingState(
        model=model, optimizer=optimizer, scheduler=scheduler, seed=4, batch=8, ema=average, keep_gradients=True,
        extras={"guard": Counter()},
    )  # fmt: skip


def walk(run: TrainingState, steps: int) -> Tensor:
    """Steps that change every part; their last random number."""
    for _ in range(steps):
        drawn = torch.rand(5, 3)
        loss = run.model(drawn).square().sum()
        loss.backward()
        run.optimizer.step()
        run.scheduler.step()
        run.ema.update()
        run.extras["guard"].count += 1
        run.averager.update({"loss": loss.detach()})
        run.iteration += 1
        run.samples_seen += run.batch
    return drawn


def test_a_restored_run_goes_on_like_its_original(monkeypatch):
    """The second of two processes: its own random numbers and sums, moments, kept gradients, averages, counts; the
    learning rate alone is that of the new run's settings."""
    ours = training(0)
    walk(ours, 3)
    ours.epoch = 2
    others = {"random": {"torch": torch.Generator().manual_seed(9).get_state()}, "averages": {"sums": {}, "counts": {}}}
    monkeypatch.setattr(state, "all_gather_object", lambda mine: [others, mine])
    monkeypatch.setattr(state, "get_rank", lambda: 1)
    monkeypatch.setattr(state, "get_world_size", lambda: 2)
    saved = copy.deepcopy(ours.capture())
    assert saved["sampler"] == {"seed": 4, "batch": 8, "position": 24}
    rates = [group["lr"] for group in ours.optimizer.param_groups]
    wanted = walk(ours, 2)

    again = training(1)
    again.model.load_state_dict(saved["model"])
    for group in again.optimizer.param_groups:
        group["lr"] = group["initial_lr"] = 0.5
    again.restore(saved, source="x.pth")
    assert [(group["lr"], group["initial_lr"]) for group in again.optimizer.param_groups] == [(0.5, 0.5)]
    assert again.samples_seen == 24
    for group, lr in zip(again.optimizer.param_groups, rates):
        group["lr"], group["initial_lr"] = lr, 1e-2
    again.scheduler.load_state_dict(saved["lr_scheduler"])
    assert again.restore_place(saved, iteration=3)
    torch.testing.assert_close(walk(again, 2), wanted, rtol=0, atol=0)
    assert (again.epoch, again.iteration, again.extras["guard"].count) == (2, 5, 5)
    for part in ("model", "ema", "optimizer", "averages", "gradients", "extras", "samples_seen", "sampler"):
        assert checksum(again.capture()[part]) == checksum(ours.capture()[part]), part


def test_sums_of_another_number_of_processes_keep_their_weight(monkeypatch):
    """Two processes of 3 and 1 steps, resumed by one: the mean of what is logged stays, and weighs two steps."""
    parts = [MetricAverager(), MetricAverager()]
    for value in (1.0, 2.0, 6.0):
        parts[0].update({"loss": value})
    parts[1].update({"loss": 11.0, "rare": 4.0})
    again = training(0)
    place = {"epoch": 1, "averages": [part.state_dict() for part in parts]}
    assert not again.restore_place(place, iteration=4)
    assert again.averager.averages() == {"loss": 5, "rare": 4}
    assert again.averager.state_dict() == {"sums": {"loss": 10, "rare": 2}, "counts": {"loss": 2, "rare": 0.5}}


def checkpoint(epoch: int, iteration: int | None, **order: int) -> dict:
    known = {} if iteration is None else {"iteration": iteration}
    return {"epoch": epoch, **known, "sampler": {"seed": 0, "batch": 4, "position": 4 * (iteration or 0), **order}}


# An epoch of 4 images a step, by the number of images: the last step that is whole ends it.
@pytest.mark.parametrize(
    ("length", "iteration", "logged", "wanted"),
    [
        (12, 2, [], (1, 2)),  # the third step has exactly the images that are left
        (11, 2, [0, 1], (2, None)),
        (11, 1, [], (1, 1)),
        (12, 3, [0, 1], (2, None)),
        (12, 3, [0], (1, 3)),  # its evaluation is missing
        (12, None, [0], (2, None)),  # a file of epochs alone
    ],
)
def test_where_a_run_goes_on(length, iteration, logged, wanted, tmp_path):
    folder = CheckpointFolder(tmp_path)
    for epoch in logged:
        folder.append_log({"epoch": epoch})
    sampler = TrainSampler(length=length, batch=4, rank=0, world_size=1, seed=0)
    source = Source("x.pth", checkpoint(1, iteration), same_run=True)
    place = plan(source, settings(""), {}, sampler=sampler, folder=folder)
    assert (place.epoch, place.step) == wanted
    elsewhere = plan(replace(source, same_run=False), settings(""), {}, sampler=sampler, folder=folder)
    assert (elsewhere.epoch, elsewhere.step) == ((2, None) if wanted == (1, 3) else wanted)


@pytest.mark.parametrize(
    ("order", "said"), [({"seed": 3}, "`seed` 3, here 0"), ({"batch": 2}, "`accumulate`. 2, here 4")]
)
def test_another_order_inside_an_epoch(order, said, tmp_path):
    sampler = TrainSampler(length=12, batch=4, rank=0, world_size=1, seed=0)
    source = Source("x.pth", checkpoint(1, 1, **order), same_run=True)
    with pytest.raises(ValueError, match=said):
        plan(source, settings(""), {}, sampler=sampler, folder=CheckpointFolder(tmp_path))


def test_whose_files_are_in_the_folder(tmp_path):
    """A run that goes on, or starts from an early file of this folder, writes beside its files; another is refused."""
    (tmp_path / "checkpoint0001.pth").touch()
    folder, source = CheckpointFolder(tmp_path), Source("x.pth", {}, same_run=False)
    for known in (replace(source, same_run=True), replace(source, in_folder=True)):
        claim_folder(known, folder, overwrite=False)
    with pytest.raises(ValueError, match=r"holds a run \(checkpoint0001\.pth\)"):
        claim_folder(source, folder, overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint0001.pth"]


def test_lines_of_epochs_that_come_again_leave_the_log(tmp_path):
    folder, source = CheckpointFolder(tmp_path), Source("x.pth", {}, same_run=True)
    for epoch in range(3):
        folder.append_log({"epoch": epoch})
    assert Resume(replace(source, same_run=False), 1, None).trim_log(folder) == []
    assert len(folder.logged()) == 3
    assert Resume(source, 1, 2).trim_log(folder) == folder.logged() == [{"epoch": 0}]


def test_names_of_long_runs_and_the_order_of_lines(tmp_path):
    """More digits than four and six sort as numbers; a line that was written again counts once, in its place."""
    folder = CheckpointFolder(tmp_path, keep=1)
    for epoch, iteration in ((9999, None), (10000, 999999), (10000, 1000000), (10000, None)):
        folder.save({"epoch": epoch}, epoch=epoch, iteration=iteration)
    (tmp_path / "checkpoint.pth").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint10000.pth", "checkpoint10000_1000000.pth"]
    for epoch, loss in ((1, 5), (0, 4), (1, 3)):
        folder.append_log({"epoch": epoch, "loss": loss})
    assert [(line["epoch"], line["loss"]) for line in folder.logged()] == [(0, 4), (1, 3)]
