"""Parameter groups that cover everything once, and learning-rate schedules against figures worked out by hand."""

import io

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

from samdetr.training.optim import build_scheduler, learning_rate_factor, parameter_groups


def detector() -> nn.Module:
    model = nn.Module()
    model.backbone = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.backbone[0].requires_grad_(False)
    model.backbone.sampling_offsets = nn.Linear(2, 2)  # the prefix wins over the pattern
    model.encoder = nn.ModuleDict({"sampling_offsets": nn.Linear(2, 2), "backbone": nn.Linear(2, 2)})
    model.head = nn.Linear(2, 2)
    model.same_head = model.head
    return model


def groups_of(model: nn.Module, **changes) -> list[dict]:
    settings = {
        "lr": 1e-4,
        "lr_backbone": 1e-5,
        "lr_linear_proj_names": ["reference_points", "sampling_offsets"],
        "lr_linear_proj_mult": 0.1,
    }
    return parameter_groups(model, **(settings | changes))


def test_every_trainable_parameter_is_in_one_group():
    model = detector()
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {group["name"]: (group["lr"], [names[p] for p in group["params"]]) for group in groups_of(model)}
    linear = {module: [f"{module}.weight", f"{module}.bias"] for module, _ in model.named_modules()}
    assert groups == {
        "main": (1e-4, linear["encoder.backbone"] + linear["head"]),
        "backbone": (1e-5, linear["backbone.1"] + linear["backbone.sampling_offsets"]),
        "linear_proj": (1e-4 * 0.1, linear["encoder.sampling_offsets"]),
    }


def test_empty_groups_are_left_out():
    model = detector()
    model.backbone.requires_grad_(False)
    assert [group["name"] for group in groups_of(model, lr_linear_proj_names=[])] == ["main"]


def test_a_misspelt_pattern_is_an_error():
    with pytest.raises(ValueError, match="`lr_linear_proj_names` sampling_ofsets"):
        groups_of(detector(), lr_linear_proj_names=["sampling_ofsets"])
    with pytest.raises(ValueError, match=r"backbone\.1"):  # would have no effect: the backbone's own rate wins
        groups_of(detector(), lr_linear_proj_names=["backbone.1"])
    with pytest.raises(ValueError, match="reference_points"):
        groups_of(detector(), optional_names=[])


@pytest.mark.parametrize(
    ("schedule", "total", "drop", "warmup", "expected"),
    [
        ("step", 100, 40, 0, {0: 1, 39: 1, 40: 0.1, 79: 0.1, 80: 0.01}),
        ("step", 100, 40, 10, {0: 0.001, 5: 0.5005, 10: 1, 39: 1, 40: 0.1, 79: 0.1, 80: 0.1, 99: 0.1}),  # once
        ("step", 100, 4, 8, {4: 0.05005, 9: 0.1}),  # a drop within the warm-up multiplies
        ("cosine", 100, 1, 0, {0: 1, 25: 0.8535534, 50: 0.5, 100: 0, 101: 0}),
        ("cosine", 110, 1, 10, {0: 0.001, 5: 0.5005, 10: 1, 60: 0.5, 110: 0}),
        ("onecycle", 100, 1, 0, {0: 0.001, 5: 0.5005, 10: 1, 55: 0.5, 100: 0}),
        ("onecycle", 100, 1, 50, {0: 0.001, 25: 0.5005, 50: 1, 75: 0.5, 100: 0}),
        ("onecycle", 3, 1, 0, {0: 1, 3: 0}),  # too short for a warm-up
    ],
)
def test_learning_rate_factor(schedule, total, drop, warmup, expected):
    got = {
        step: learning_rate_factor(step, schedule=schedule, total_steps=total, drop_step=drop, warmup_steps=warmup)
        for step in expected
    }
    assert got == pytest.approx(expected, abs=1e-7)


def test_unknown_schedule():
    with pytest.raises(ValueError, match="'linear' is none of step, cosine, onecycle"):
        learning_rate_factor(0, schedule="linear", total_steps=9, drop_step=1, warmup_steps=0)


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD(
        [{"params": [nn.Parameter(torch.zeros(1))], "lr": 1e-4}, {"params": [nn.Parameter(torch.zeros(1))], "lr": 1e-5}]
    )


@pytest.mark.parametrize("drop_epochs", [40, 12])
def test_steps_by_iteration_equal_the_published_schedule_by_epoch(drop_epochs):
    ours, published = optimizer(), optimizer()
    by_iteration = build_scheduler(ours, schedule="step", total_steps=50 * 7, drop_step=drop_epochs * 7)
    by_epoch = StepLR(published, drop_epochs)
    for _ in range(50):
        for _ in range(7):
            for mine, theirs in zip(ours.param_groups, published.param_groups):
                assert mine["lr"] == pytest.approx(theirs["lr"], rel=1e-12)
            ours.step()
            by_iteration.step()
        published.step()
        by_epoch.step()


@pytest.mark.parametrize("schedule", ["step", "cosine", "onecycle"])
def test_a_schedule_that_starts_late_is_the_one_that_walked_there(schedule):
    """In all that it saves, the count of its steps too: a resumed run makes the checkpoints of an uninterrupted one."""
    settings = {"schedule": schedule, "total_steps": 40, "drop_step": 9, "warmup_steps": 5}
    walked, late = optimizer(), optimizer()
    steps = build_scheduler(walked, **settings)
    for _ in range(13):
        walked.step()
        steps.step()
    state = build_scheduler(late, **settings, first_step=13).state_dict()
    assert state == steps.state_dict()
    assert (state["last_epoch"], state["_step_count"]) == (13, 14)
    assert [group["lr"] for group in late.param_groups] == [group["lr"] for group in walked.param_groups]


def test_a_resumed_schedule_goes_on_where_it_was():
    def build(target):
        return build_scheduler(target, schedule="onecycle", total_steps=40, drop_step=1)

    whole, resumed = optimizer(), optimizer()
    schedule = build(whole)
    file = io.BytesIO()
    for step in range(30):
        if step == 13:
            torch.save({"optimizer": whole.state_dict(), "schedule": schedule.state_dict()}, file)
        whole.step()
        schedule.step()

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    schedule = build(resumed)
    resumed.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    for _ in range(13, 30):
        resumed.step()
        schedule.step()
    assert [group["lr"] for group in resumed.param_groups] == [group["lr"] for group in whole.param_groups]
    assert whole.param_groups[0]["lr"] == pytest.approx(1e-4 * 0.17860620)  # (1 + cos(26 / 36 pi)) / 2
