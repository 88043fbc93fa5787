"""Settings of a run: optimisation, speed, the run itself; and all settings of the program together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from samdetr.datasets.settings import Data
from samdetr.models.build import FAMILIES
from samdetr.models.ops.kernels import PATHS
from samdetr.models.settings import FamilyConfig, Loss, Trunk
from samdetr.training.optim import SCHEDULES
from samdetr.training.presets import PRESETS
from samdetr.training.trackers import TRACKERS
from samdetr.util.settings import Settings, flag, flags


@dataclass(frozen=True, kw_only=True)
class Optimisation(Settings):
    """How weights are changed."""

    lr: float = flag(1e-4, "learning rate", least=0)
    lr_backbone: float = flag(1e-5, "learning rate of the backbone; 0 freezes it", least=0)
    scale_lr: bool = flag(False, "learning rates in proportion to the images of a step")
    lr_linear_proj_names: tuple[str, ...] = flag((), "parameters whose names contain one of these", metavar="NAME")
    lr_linear_proj_mult: float = flag(0.1, "... learn at lr times this")
    freeze: tuple[str, ...] = flag(
        (), "modules that keep their weights: backbone, projection, encoder, decoder, or parts", metavar="MODULE"
    )
    batch_size: int = flag(2, "images per process", least=1)
    accumulate: int = flag(1, "batches per step, as one large batch", least=1, metavar="BATCHES")
    weight_decay: float = flag(1e-4, "of AdamW", least=0)
    epochs: int = flag(50, "epochs in all, those before a --resume included", least=1)
    lr_drop: int = flag(
        40,
        "epochs after which the learning rate falls to a tenth, again and again; once if there is a warm-up",
        least=1,
        metavar="EPOCHS",
    )
    lr_schedule: str = flag("step", "how the learning rate falls", choices=SCHEDULES)
    warmup_iters: int = flag(0, "iterations of linear warm-up", least=0, metavar="ITERATIONS")
    clip_max_norm: float = flag(0.1, "largest gradient norm; 0: no clipping", least=0)
    ema: float = flag(0.0, "also average the weights, e.g. 0.9998; 0: off", least=0, below=1, metavar="DECAY")
    max_bad_steps: int = flag(
        10, "stop after this many consecutive steps with a non-finite loss or gradient; each is skipped", least=1
    )
    legacy_no_zero_grad: bool = flag(
        False, "never zero gradients, as the published SAP-DETR does without --amp: each step adds to the last one's"
    )


@dataclass(frozen=True, kw_only=True)
class Speed(Settings):
    """How the network is computed."""

    amp: str = flag(
        "off", "16-bit arithmetic in the network; matching and losses stay float32", choices=("off", "bf16", "fp16")
    )
    compile: bool = flag(False, "torch.compile the network, for any size of image")
    ops: str = flag(
        "auto",
        "kernels: auto, ours where they run; plain, PyTorch alone; deformops, deformable attention by that package",
        choices=PATHS,
    )
    cuda_graphs: bool = flag(False, "on a GPU: evaluate sizes of batches that come again as CUDA graphs")
    tf32: bool = flag(False, "round products of float32 to 10 bits on recent GPUs", off=("--no_tf32",))
    channels_last: bool | None = flag(
        None, "memory format of images; default on a CPU", on=("--channels_last",), off=("--no_channels_last",)
    )
    deterministic: bool = flag(False, "the same numbers in every run, or an error")
    profile: int = flag(0, "time the sections of the first N steps", least=0, metavar="N")


@dataclass(frozen=True, kw_only=True)
class Run(Settings):
    """Where a run starts, what it keeps, when it ends."""

    output_dir: str = flag("", "where checkpoints and logs are saved; empty: nowhere", metavar="FOLDER")
    device: str = flag("auto", "auto: a GPU if there is one")
    seed: int = flag(42, "of weights, data order and augmentation", least=0, most=2**62)
    backbone_weights: str = flag(
        "imagenet", "pretrained backbone; not used with --resume", metavar="{imagenet,none,FILE}"
    )
    resume: str = flag(
        "",
        "checkpoint to continue from, ours or an official one; auto: the newest good one in --output_dir if any, "
        "else FILE",
        metavar="{FILE,URL,auto,auto:FILE}",
    )
    pretrained: str = flag(
        "", "detector to start from, ours or an official one; takes all weights that fit", metavar="{FILE,URL}"
    )
    preset: str = flag("none", "settings for own data, for flags that are not given", choices=tuple(PRESETS))
    overfit: int = flag(
        0,
        "train and evaluate on N training images to see whether the run can learn; keeps nothing",
        least=0,
        metavar="N",
    )
    start_epoch: int = flag(0, "first epoch, counted from 0; a checkpoint brings its own", least=0, metavar="EPOCH")
    eval: bool = flag(False, "evaluate, do not train")
    detections: str = flag("", "with --eval: a file of COCO results instead of a network", metavar="FILE")
    annotations: str = flag("", "with --detections: what they are compared with, in COCO form", metavar="FILE")
    raw_weights: bool = flag(False, "with --eval: not the averaged weights of --ema")
    allow_http: bool = flag(False, "fetch files over http from other machines, too, where others can change them")
    allow_nonfinite: bool = flag(False, "use weights, and with --eval count outputs, that are not finite")
    eval_every_epoch: int = flag(1, "epochs between evaluations", least=1, metavar="EPOCHS")
    compare: str = flag(
        "",
        "published run to compare every epoch with; auto: the one with this network and --epochs",
        metavar="{RECIPE,auto}",
    )
    patience: int = flag(
        0, "stop after this many evaluations without a higher AP; 0: never", least=0, metavar="EVALUATIONS"
    )
    max_hours: float = flag(
        0.0, "save and stop after this many hours, those before a --resume included", least=0, metavar="HOURS"
    )
    replay: str = flag("", "repeat the step that a run stopped at, and report", metavar="FILE")
    save_every_epoch: int = flag(1, "epochs between checkpoints named by epoch", least=1, metavar="EPOCHS")
    save_every_iterations: int = flag(0, "also save every N iterations; 0: off", least=0, metavar="N")
    save_every_minutes: float = flag(0.0, "also save every N minutes; 0: off", least=0, metavar="N")
    keep: int | None = flag(
        1, "older checkpoints kept beside the newest and the best; -1: all of --save_every_epoch", least=-1, metavar="N"
    )
    overwrite: bool = flag(False, "start anew in an --output_dir that holds a run; its files move to a subfolder")
    timeout: float = flag(
        1800.0,
        "seconds without a sign of life of a process until the others stop",
        least=1,
        most=1e9,
        metavar="SECONDS",
    )
    verbose: bool = flag(False, "show the 12 metrics after every evaluation, not only after the last")
    track: tuple[str, ...] = flag((), "also write metrics and pictures for these programs", choices=tuple(TRACKERS))
    print_every: int = flag(50, "iterations between progress lines if output is no terminal", least=1, metavar="N")
    world_size: int = flag(1, "number of processes, if the launcher does not set it", least=1)
    dist_url: str = flag("env://", "where the processes meet", metavar="URL")
    plugin: str = flag("", "module or .py file that registers a further family of detectors", metavar="MODULE")
    local_rank: int = flag(0, "set by torch.distributed.launch; LOCAL_RANK replaces it", on=("--local-rank",))


PARTS: dict[str, type[Settings]] = {
    "optimisation": Optimisation, "trunk": Trunk, "loss": Loss, "data": Data, "speed": Speed, "run": Run,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """All settings of the program. `family` are those of the family that `trunk.model` names."""

    optimisation: Optimisation
    trunk: Trunk
    family: FamilyConfig
    loss: Loss
    data: Data
    speed: Speed
    run: Run

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> RunSettings:
        """From values by name; for those that are missing, of the `preset` among them, else as published for the
        family. Unknown names are left out.

        Raises:
            ValueError: a value that no run can use, or an unknown family.
        """
        name = values.get("model", Trunk.model)
        if name not in FAMILIES:
            raise ValueError(f"`model` {name!r} is none of {', '.join(FAMILIES)}")
        family = FAMILIES[name]
        preset = PRESETS.get(values.get("preset", "none"), {})  # its field refuses an unknown one
        values = {**family.defaults, **preset, **values}
        parts: dict[str, Any] = {part: kind.pick(values) for part, kind in PARTS.items()}
        return cls(**parts, family=family.config.pick(values))

    def flat(self) -> dict[str, Any]:
        """Plain values by name, as checkpoints and settings.json hold them; flags of other families have their
        defaults there."""
        values: dict[str, Any] = {}
        for family in reversed(FAMILIES.values()):
            values |= family.config().flat()
        for part in (*PARTS, "family"):
            values |= getattr(self, part).flat()
        return values

    def replace(self, **changes: Any) -> RunSettings:
        """The same settings except for some fields, by their flat names."""
        unknown = changes.keys() - self.flat().keys()
        assert not unknown, f"no settings: {sorted(unknown)}"
        parts = {
            part: dataclasses.replace(old, **own)
            for part in (*PARTS, "family")
            if (own := {n: v for n, v in changes.items() if n in (old := getattr(self, part)).__dataclass_fields__})
        }
        return dataclasses.replace(self, **parts)

    def with_checkpoint(self, saved: Mapping[str, Any], given: Mapping[str, Any]) -> RunSettings:
        """Let the settings `saved` in a checkpoint decide what shapes the network, except for the values that the user
        gave: if these do not fit, loading the weights reports it. What the weights themselves show always follows them.

        Raises ValueError: the user asked for another family.
        """
        if "model" in given and given["model"] != saved["model"]:
            raise ValueError(
                f"`model` {given['model']} does not fit the checkpoint, a {saved['model']}; leave the flag out"
            )
        shown = {name: saved[name] for name in ("model", "input_proj_norm", "num_classes") if name in saved}
        # A preset does not shape a network that is there: what the file does not say is as published.
        family = FAMILIES[saved["model"]]
        published = {**Trunk().flat(), **family.config().flat(), **Data().flat(), **family.defaults}
        carried = [name for kind in (Trunk, family.config) for name, one in flags(kind) if one.carried]
        network = {name: published[name] for name in (*carried, "eval_size", "max_size")}
        return RunSettings.from_flat({**network, **saved, **given, **shown})

    def with_resolved_norm(self) -> RunSettings:
        """`input_proj_norm` as "group" or "none". The reference has a GroupNorm in multi-scale models and if the
        schedule is shorter than 25 epochs ("by accident", it says); "auto" keeps this rule."""
        if self.trunk.input_proj_norm != "auto":
            return self
        group = self.family.several_levels or self.optimisation.epochs < 25
        return self.replace(input_proj_norm="group" if group else "none")

    def check_family(self, given: Mapping[str, Any]) -> None:
        """Refuse flags of other families, which would have no effect. Raises ValueError."""
        own = {name for name, _ in flags(type(self.family))}
        others = {name for family in FAMILIES.values() for name, _ in flags(family.config)} - own
        for name in sorted(others & given.keys()):
            raise ValueError(
                f"`{name}` has no effect on `model` {self.trunk.model}; leave it out, or choose another model"
            )
