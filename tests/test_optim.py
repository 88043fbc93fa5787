"""Parameter groups that cover everything once, and learning-rate schedules against figures worked out by hand."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

from samdetr.training.optim import (
    build_scheduler,
    groups_of_run,
    learning_rate_factor,
    load_optimizer_state,
    optimizer_state,
    parameter_groups,
)


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


def adamw(*names: str, layout: torch.memory_format = torch.contiguous_format) -> tuple[nn.Module, torch.optim.AdamW]:
    """A network of two layers of equal shapes after one step, the parameters whose names contain `names` apart."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"first": nn.Conv2d(4, 4, 2), "second": nn.Conv2d(4, 4, 2)}).to(memory_format=layout)
    groups = groups_of(model, lr_linear_proj_names=names)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    for name, weight in model.named_parameters():
        weight.grad = torch.randn_like(weight) if name != "first.bias" else None
    optimizer.step()
    return model, optimizer


def test_moments_go_to_their_parameters_whatever_the_layout_in_memory():
    (model, first), (other, second) = adamw(), adamw(layout=torch.channels_last)
    load_optimizer_state(second, optimizer_state(first), source="x")
    for mine, theirs in zip(model.parameters(), other.parameters()):
        saved, loaded = first.state.get(mine), second.state.get(theirs)
        assert (saved is None) == (loaded is None)
        if saved:
            torch.testing.assert_close(loaded, saved, rtol=0, atol=0)
            assert loaded["exp_avg"].stride() == theirs.stride()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda saved: saved["state"].update({1: dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.zeros(3))}),
            "first.bias",
        ),
        (lambda saved: saved["state"].pop(3), "no moments of second.bias"),
        (lambda saved: saved["state"].update({9: saved["state"][3]}), r"parameters \[9\]"),
        (lambda saved: saved["state"][3].update(exp_avg=torch.zeros(2)), r"exp_avg of second.bias is .* \(2,\)"),
        (lambda saved: saved["state"][3].update(exp_avg=torch.zeros(4, dtype=torch.int64)), "exp_avg of second.bias"),
        (lambda saved: saved["state"][3]["exp_avg_sq"].fill_(-1), "exp_avg_sq of second.bias"),
        (lambda saved: saved["state"][3]["exp_avg"].fill_(torch.nan), "exp_avg of second.bias"),
        (lambda saved: saved["state"][3].update(step=torch.tensor(-1.0)), "step count of second.bias"),
        (lambda saved: saved["state"][3].update(max_exp_avg_sq=torch.zeros(4)), "max_exp_avg_sq"),
        (lambda saved: saved["state"][3].pop("exp_avg"), "has no 'exp_avg'"),
        (lambda saved: saved["param_groups"][0]["params"].reverse(), "not in order"),
        (lambda saved: saved["param_groups"][0]["params"].pop(), "3 parameters in group 0, here 4"),
        (
            lambda saved: saved["param_groups"][0]["param_names"].reverse(),
            "'second.bias' where this run has first.weight",
        ),
        (lambda saved: saved["param_groups"].append(saved["param_groups"][0]), "2 groups, here 1"),
        (lambda saved: saved["param_groups"][0].update(weight_decay="much"), "weight_decay.*'much'"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_before_anything_is_loaded(change, said):
    saved = optimizer_state(adamw()[1])
    optimizer = adamw()[1]
    before = copy.deepcopy(optimizer.state_dict()["state"])
    change(saved)
    with pytest.raises(ValueError, match=said):
        load_optimizer_state(optimizer, saved, source="x")
    torch.testing.assert_close(optimizer.state_dict()["state"], before, rtol=0, atol=0)


def test_other_names_of_as_many_parameters_are_refused():
    """Also where the file holds no names: then its settings say which parameters were apart."""
    (model, optimizer), (_, other) = adamw("first"), adamw("second")
    saved = optimizer_state(optimizer)
    with pytest.raises(ValueError, match=r"'second\.weight' where this run has first\.weight.*`lr_linear_proj_names`"):
        load_optimizer_state(other, saved, source="x")
    for group in saved["param_groups"]:
        del group["param_names"]
    rates = {"lr": 1e-3, "lr_backbone": 1e-3, "lr_linear_proj_names": ["first"], "lr_linear_proj_mult": 1.0}
    with pytest.raises(ValueError, match=r"where this run has first\.weight"):
        load_optimizer_state(other, saved, source="x", groups=groups_of_run(model, rates))
