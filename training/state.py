"""Everything that a run needs to resume as if it had never stopped, as one plain dict."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from samdetr.training.ema import WeightAverage
from samdetr.training.optim import groups_of_run, load_optimizer_state, optimizer_state
from samdetr.util.checkpoint import SCHEMA_VERSION, TRAINING_ONLY
from samdetr.util.distributed import all_gather_object, get_rank, get_world_size
from samdetr.util.logger import MetricAverager
from samdetr.util.schema import anything, brief, each, listed, maybe, number, record, tensor

_COUNT = number(least=0, most=2**62)


def _random_rule(value: Any, place: str) -> None:
    try:
        torch.Generator().set_state(value)
    except (RuntimeError, TypeError):
        raise ValueError(f"{place} is {brief(value)}, not the state of a generator of random numbers") from None


def _gpu_random_rule(value: Any, place: str) -> None:
    tensor(dtype=torch.uint8)(value, place)
    if value.shape != (16,):
        raise ValueError(f"{place} is {brief(value)}, not the state of a generator of a GPU")


RANDOM_RULE = record({"torch": _random_rule}, optional={"cuda": _gpu_random_rule})


def _real(value: Any, place: str) -> None:
    """A number, or what is none: sums of losses may overflow."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"{place} is {brief(value)}, not a number")


RULES = record(
    {},
    optional={
        "iteration": maybe(_COUNT),
        "samples_seen": _COUNT,
        "sampler": record(
            {"seed": _COUNT, "batch": number(least=1, most=2**62), "position": _COUNT},
            optional={"buckets": number(least=2, most=2**14), "group": number(least=1, most=2**62)},
        ),
        "random_states": listed(RANDOM_RULE, least=1),
        "averages": listed(record({"sums": each(_real), "counts": each(number(least=0, whole=False))}), least=1),
        "extras": record(
            {},
            optional={
                "bad_steps": record(dict.fromkeys(("skipped", "bad", "in_a_row"), _COUNT)),
                "clock": record({"seconds": number(least=0, whole=False)}),
            },
        ),
        "scaler": maybe(
            record(
                {},
                optional={
                    "scale": number(least=1e-40, most=1e38, whole=False),
                    "growth_factor": number(least=1, most=1e6, whole=False),
                    "backoff_factor": number(least=1e-6, most=1, whole=False),
                    "growth_interval": number(least=1, most=2**31),
                    "_growth_tracker": number(least=0, most=2**31),
                },
            )
        ),
        "ema": maybe(record({"model": each(tensor()), "updates": _COUNT})),
        "gradients": each(tensor()),
        "optimizer": anything,  # training.optim compares it with the parameters
    },
)


def check_state(checkpoint: dict[str, Any], *, source: str) -> None:
    """Require what `restore` and `restore_place` read to be there and to belong together. Raises ValueError."""
    try:
        RULES(checkpoint, "")
        if checkpoint.get("iteration") is None:  # official and early files end with an epoch
            return
        record(dict.fromkeys(("epoch", "sampler", "random_states", "averages"), anything))(checkpoint, "")
        order, done = checkpoint["sampler"], checkpoint["iteration"]
        if order["position"] != done * order["batch"]:
            raise ValueError(
                f"'sampler' has the position {order['position']}, {done} steps of {order['batch']} images are another"
            )
        if len(checkpoint["averages"]) != len(checkpoint["random_states"]):
            raise ValueError("'averages' and 'random_states' are of different numbers of processes")
        for state in checkpoint["averages"]:
            if state["sums"].keys() != state["counts"].keys():
                raise ValueError("'averages' has sums without counts")
    except ValueError as error:
        raise ValueError(f"`resume` {source} cannot be resumed: {error}; pass another checkpoint") from None


@dataclass(kw_only=True)
class TrainingState:
    """The parts of a run that change, and its position. `capture()` makes a checkpoint of them, `restore()` and
    `restore_place()` undo it.

    The learning rate is no part: it follows from the settings and the position, so a run may resume with others.
    Results of an evaluation are no part either: an epoch is saved before it is evaluated.
    """

    model: nn.Module  # without DDP's wrapper
    optimizer: Optimizer
    scheduler: LRScheduler
    seed: int  # of the order of the images, which is a function of it and the epoch
    batch: int  # images per step, over all processes
    grouping: dict[str, int] = field(default_factory=dict)  # of the order of the images, too
    ema: WeightAverage | None = None
    scaler: GradScaler | None = None
    keep_gradients: bool = False  # whether the next step adds to the gradients of the last one
    # Further parts with a state_dict of plain values, by name; equal in all processes.
    extras: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)  # plain values to save as well: settings, categories
    epoch: int = 0  # the current one, counted from 0
    iteration: int = 0  # steps done in it; all of them at its end
    samples_seen: int = 0
    averager: MetricAverager = field(default_factory=MetricAverager)  # of the epoch's log line, in this process

    def capture(self) -> dict[str, Any]:
        """The checkpoint. Every process must call this, for its random numbers and sums; waits for the device."""
        device = next(self.model.parameters()).device
        ranks = all_gather_object({"random": random_state(device), "averages": self.averager.state_dict()})
        content = {
            "schema_version": SCHEMA_VERSION,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "optimizer": optimizer_state(self.optimizer),
            "lr_scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "epoch": self.epoch,
            "iteration": self.iteration,
            "samples_seen": self.samples_seen,
            "sampler": {
                "seed": self.seed,
                "batch": self.batch,
                "position": self.iteration * self.batch,
                **self.grouping,
            },
            "random_states": [rank["random"] for rank in ranks],
            "averages": [rank["averages"] for rank in ranks],
            "extras": {name: part.state_dict() for name, part in self.extras.items()},
            "versions": versions(),
            **self.facts,
        }
        if self.keep_gradients:
            content["gradients"] = {
                name: weight.grad for name, weight in self.model.named_parameters() if weight.grad is not None
            }
        return content

    def restore(self, checkpoint: dict[str, Any], *, source: str) -> None:
        """Restore everything except weights, learning rates and the position. Parts that the file lacks, as early files
        of this project do, are left as they are.

        Raises:
            ValueError: the file has other groups of parameters, or state that does not fit them.
        """
        groups = groups_of_run(self.model, checkpoint.get("run_settings", {}))
        load_optimizer_state(self.optimizer, checkpoint["optimizer"], source=source, groups=groups)
        weights = dict(self.model.named_parameters())
        for name, gradient in checkpoint.get("gradients", {}).items() if self.keep_gradients else ():
            if name.startswith(TRAINING_ONLY) and name not in weights:
                continue
            if name not in weights or gradient.shape != weights[name].shape:
                raise ValueError(f"{source} has a gradient {name} {tuple(gradient.shape)}, which no parameter has")
            weights[name].grad = torch.empty_like(weights[name]).copy_(gradient)
        parts = {"scaler": self.scaler, "ema": self.ema, **self.extras}
        saved = {**checkpoint.get("extras", {}), "scaler": checkpoint.get("scaler"), "ema": checkpoint.get("ema")}
        for name, part in parts.items():
            if part is not None and saved.get(name):
                part.load_state_dict(saved[name])
        self.samples_seen = checkpoint.get("samples_seen", 0)

    def restore_place(self, checkpoint: dict[str, Any], *, iteration: int) -> bool:
        """Resume after `iteration` steps of the checkpoint's epoch: the sums for its log line and the random numbers.

        Returns whether the file is of the same number of processes; if not, random numbers must be seeded anew.
        """
        self.epoch, self.iteration = checkpoint["epoch"], iteration
        sums = checkpoint["averages"]
        if len(sums) != get_world_size():
            self.averager.load_state_dict(mean_state(sums))
            return False
        self.averager.load_state_dict(sums[get_rank()])
        set_random_state(checkpoint["random_states"][get_rank()], next(self.model.parameters()).device)
        return True


def random_state(device: torch.device) -> dict[str, Tensor]:
    """State of the generators that training draws from: PyTorch's on the CPU and on this process's GPU."""
    state = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def mean_state(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of the averagers of some processes, for each process of another number of processes: relative to the
    steps to come, the past ones keep their weight."""
    mean: dict[str, Any] = {"sums": {}, "counts": {}}
    for state in states:
        for kind, values in state.items():
            for name, value in values.items():
                mean[kind][name] = mean[kind].get(name, 0.0) + value / len(states)
    return mean


def versions() -> dict[str, str | None]:
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "cuda": torch.version.cuda,
    }
