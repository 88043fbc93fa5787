"""The parts of a run, from its settings."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from samdetr.datasets.annotations import Annotations
from samdetr.datasets.bad_images import BadImages
from samdetr.datasets.build import build_dataset, collate, read_split
from samdetr.datasets.categories import Categories, checkpoint_categories
from samdetr.datasets.check.splits import Split
from samdetr.datasets.check.start import check_loaded, start_lines
from samdetr.datasets.coco import CocoDetection
from samdetr.datasets.coco_eval import CocoEvaluator
from samdetr.datasets.sampler import Buckets, TrainSampler, evaluation_batches
from samdetr.engine import evaluate
from samdetr.models.build import build_model
from samdetr.models.checkpoints import check_memory, check_network, chosen_weights, load_backbone_weights
from samdetr.models.criterion import SetCriterion
from samdetr.models.detector import Detector
from samdetr.models.ops.module import MSDeformAttn
from samdetr.models.ops.ms_deform_attn import by_deformops
from samdetr.training import learning_rate, overfit
from samdetr.training.checkpoints import CheckpointFolder
from samdetr.training.cluster.folder_lock import leave_lock_to_parent
from samdetr.training.cluster.preemption import shield_worker
from samdetr.training.cluster.watchdog import Watchdog
from samdetr.training.finetune import Pretrained
from samdetr.training.judge import published_name
from samdetr.training.optim import parameter_groups
from samdetr.training.parallel import parallel
from samdetr.training.resume import Source, claim_folder, find_checkpoint, is_auto
from samdetr.training.settings import RunSettings
from samdetr.training.trackers import require_packages
from samdetr.util.checkpoint import TRAINING_ONLY, load_weights, require_finite
from samdetr.util.device import choose_device, place
from samdetr.util.distributed import get_rank, get_world_size, is_main, main_process_first
from samdetr.util.loader import Loader, guard_worker, shared_memory_warning
from samdetr.util.logger import log

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainData:
    """The training images, as batches in the order of `sampler`."""

    images: CocoDetection
    sampler: TrainSampler
    loader: DataLoader
    bad_images: BadImages


@dataclass(frozen=True)
class Data:
    """What a run reads; no `train` if it only evaluates."""

    categories: Categories
    train: TrainData | None
    val_images: CocoDetection
    val_loader: DataLoader


@dataclass(frozen=True)
class Parts:
    """What both training and evaluation need.

    `settings` include what checkpoint and data decide; `model` is the network, or DistributedDataParallel around it;
    without a `folder` nothing is written.
    """

    settings: RunSettings
    source: Source
    data: Data
    device: torch.device
    network: Detector
    model: nn.Module
    criterion: SetCriterion
    postprocess: Callable[..., Any]
    folder: CheckpointFolder | None
    watchdog: Watchdog

    @property
    def amp(self) -> torch.dtype | None:
        """Autocast dtype of the network."""
        return AMP[self.settings.speed.amp]

    def saved_settings(self, settings: RunSettings | None = None) -> dict[str, Any]:
        """As checkpoints and JSON files hold them."""
        return {**(settings or self.settings).flat(), "world_size": get_world_size()}

    def evaluate(self) -> tuple[dict[str, Any], CocoEvaluator]:
        """Metrics of the network as it is, and what holds the detections."""
        assert self.data.val_images.ground_truth is not None
        evaluator = CocoEvaluator(self.data.val_images.ground_truth, self.data.categories)
        self.watchdog.begin_round()
        metrics = evaluate(
            model=self.model, criterion=self.criterion, postprocess=self.postprocess, loader=self.data.val_loader,
            evaluator=evaluator, device=self.device, amp=self.amp, cuda_graphs=self.settings.speed.cuda_graphs,
            on_batch=self.watchdog.on_batch, print_every=self.settings.run.print_every,
        )  # fmt: skip
        return metrics, evaluator


def check_settings(settings: RunSettings) -> None:
    """Refuse what no run can use, before anything is read or written. Raises ValueError."""
    run = settings.run
    if run.detections and not run.eval:
        raise ValueError("`detections` is for `eval`, which evaluates them: pass both")
    if run.annotations and not run.detections:
        raise ValueError(
            "`annotations` is what `detections` FILE is compared with: pass both, or name the file of a data set with "
            "`val_annotations`"
        )
    if run.detections and not run.annotations:
        raise ValueError("`detections` needs what to compare with: pass `annotations` FILE, in COCO form")
    if run.detections and run.resume:
        raise ValueError("`detections` evaluates a file, `resume` a network: pass one of them")
    if run.eval and not run.resume and not run.detections:
        raise ValueError("`eval` needs a model: pass `resume` CHECKPOINT (or `detections` FILE, which needs none)")
    if settings.data.split != "val" and not run.eval:
        raise ValueError(f"`split` {settings.data.split} is for `eval`; training evaluates on val: leave it out")
    if run.track and not run.eval and not run.overfit:
        if not run.output_dir:
            raise ValueError("`track` writes into the output folder: pass `output_dir`")
        require_packages(run.track)
    if run.pretrained and run.eval:
        raise ValueError("`pretrained` has no effect with `eval`; pass the file with `resume`")
    if run.pretrained and run.resume and not is_auto(run.resume):
        raise ValueError("`pretrained` starts a run, `resume` continues one: pass one of them, or `resume` auto")
    if run.overfit and (run.eval or run.resume):
        flag = "`eval`" if run.eval else "`resume`"
        raise ValueError(f"`overfit` trains anew: leave {flag} out; `pretrained` FILE starts from weights")
    if is_auto(run.resume) and not run.output_dir:
        raise ValueError("`resume` auto looks for checkpoints in `output_dir`: pass the folder")
    if is_auto(run.resume) and run.overwrite:
        raise ValueError("`overwrite` starts anew, `resume` auto continues: pass one of them")
    if settings.speed.cuda_graphs and settings.speed.compile:
        raise ValueError("`cuda_graphs` records the network as it is, `compile` makes another one: pass one of them")
    if settings.speed.ops == "deformops":
        if settings.speed.deterministic:
            raise ValueError("`ops` deformops sums in any order, `deterministic` wants one: leave one of them out")
        by_deformops.package()
    if run.output_dir:
        folder = Path(run.output_dir).absolute()
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise ValueError(f"`output_dir` {run.output_dir} is not a folder that can be written to")


def build(settings: RunSettings, given: Mapping[str, Any], *, watchdog: Watchdog) -> Parts:
    """Data, network and losses, with the weights that the run starts from.

    `given` are the values of the flags that the user typed. Raises ValueError: settings, checkpoint or data that no run
    can use.
    """
    device, run = choose_device(settings.run.device), settings.run
    if settings.speed.cuda_graphs and device.type != "cuda":
        raise ValueError(f"`cuda_graphs` needs a GPU, and the run is on {device.type}: leave it out")
    folder = None
    if run.output_dir and not run.overfit:
        folder = CheckpointFolder(run.output_dir, keep=None if run.keep == -1 else run.keep)
    source = find_checkpoint(settings, given, folder)
    settings = source.applied(settings, given)
    pretrained = None
    if run.pretrained and not source.checkpoint:
        pretrained = Pretrained.read(run.pretrained, allow_http=run.allow_http)
        settings = pretrained.applied(settings, given)
    settings.check_family(given)
    if run.overfit:
        settings = overfit.applied(settings, given)
    if run.compare:  # by the network that a checkpoint may have chosen, and before the folder is touched
        trains = not run.eval and not run.overfit
        name = published_name(run.compare, settings.with_resolved_norm().flat()) if trains else ""
        settings = settings.replace(compare=name)
    if folder and not run.eval:
        claim_folder(source, folder, overwrite=run.overwrite)
    data = load_data(settings, source, given, folder)
    if not source.checkpoint:
        settings = settings.replace(num_classes=data.categories.num_classes)
    elif data.categories.num_classes > settings.trunk.num_classes:
        raise ValueError(
            f"{source.path} has {settings.trunk.num_classes} classes, but labels at {settings.data.coco_path} go up to "
            f"{data.categories.num_classes - 1}; use the data set that it was trained for, or start from its weights "
            "with `pretrained` instead of `resume`"
        )
    settings = settings.with_resolved_norm()
    if settings.optimisation.scale_lr and not run.eval:
        settings = learning_rate.scaled(settings, get_world_size())
    weights = _weights(source, settings)
    if weights is not None:
        check_network(settings.trunk, settings.family, weights, source=source.path)
    network, criterion, postprocess = build_network(settings)
    if settings.speed.ops == "deformops" and not any(isinstance(part, MSDeformAttn) for part in network.modules()):
        raise ValueError("`ops` deformops: this network has no deformable attention; leave it out")
    if weights is not None:
        load_weights(network, weights, source=source.path)
        _say_denoising(network, weights, path=source.path, training=not run.eval)
    else:
        _start_weights(network, settings, given, pretrained, data.categories)
    place(network, device, channels_last=settings.speed.channels_last)
    model: nn.Module = network
    # DistributedDataParallel counts every parameter of a compiled graph as used, also one without gradient. Where there
    # are such parameters, the first steps of `parallel` must run the graph, so that it counts the same in all steps.
    compiles, early = settings.speed.compile, not criterion.auxiliary
    if compiles and early:
        network.compile(dynamic=True)
    if get_world_size() > 1 and not run.eval:
        learned = settings.trunk.backbone_norm == "learned"
        model = parallel(network, criterion, sync_buffers=learned)
    if compiles and not early:
        network.compile(dynamic=True)
    return Parts(settings, source, data, device, network, model, criterion, postprocess, folder, watchdog)


def build_network(settings: RunSettings) -> tuple[Detector, SetCriterion, Callable[..., Any]]:
    """As `build_model`, with the modules of `freeze` frozen, and the backbone if its learning rate is 0. Raises
    ValueError."""
    check_memory(settings.trunk, settings.family)
    network, criterion, postprocess = build_model(settings.trunk, settings.family, settings.loss)
    frozen = settings.optimisation.freeze
    freeze(network, frozen if settings.optimisation.lr_backbone else (*frozen, "backbone"))
    return network, criterion, postprocess


def freeze(network: nn.Module, modules: Sequence[str]) -> None:
    """Let the parameters of modules, named as in checkpoints, keep their values. Raises ValueError."""
    for module in modules:
        parameters = [p for name, p in network.named_parameters() if f"{name}.".startswith(f"{module}.")]
        if not parameters:
            children = ", ".join(name for name, _ in network.named_children())
            raise ValueError(f"`freeze` {module}: there is no such module; there are {children}, and their parts")
        for parameter in parameters:
            parameter.requires_grad_(False)
    if modules and not any(parameter.requires_grad for parameter in network.parameters()):
        raise ValueError(f"`freeze` {' '.join(modules)} leaves nothing to train")


def build_optimizer(network: nn.Module, settings: RunSettings, device: torch.device) -> torch.optim.Optimizer:
    """AdamW with the groups of `parameter_groups`. Raises ValueError."""
    how = settings.optimisation
    groups = parameter_groups(
        network, lr=how.lr, lr_backbone=how.lr_backbone, lr_linear_proj_names=how.lr_linear_proj_names,
        lr_linear_proj_mult=how.lr_linear_proj_mult,
    )  # fmt: skip
    return torch.optim.AdamW(groups, lr=how.lr, weight_decay=how.weight_decay, fused=device.type in ("cpu", "cuda"))


def load_data(settings: RunSettings, source: Source, given: Mapping[str, Any], folder: CheckpointFolder | None) -> Data:
    """Data sets and loaders, and lines about what is wrong with the data. Raises ValueError."""
    checked: list[Split] = []
    read: dict[str, Annotations] = {}

    def load(split: str, categories: Categories | None) -> CocoDetection:
        annotations = read_split(split, settings.data, unannotated=settings.run.eval)
        read[split] = annotations
        dataset = build_dataset(
            split, settings.data, annotations=annotations, categories=categories, seed=settings.run.seed
        )
        if split == "train" and not annotations.usable().any():
            raise ValueError(
                f"{dataset.annotation_file}: none of its {len(annotations.entries):,} annotations is a usable object; "
                "train on objects that are not crowds (iscrowd 0) and whose boxes have an area inside their image"
            )
        if is_main():
            checked.append(check_loaded(annotations, dataset, split=split, num_queries=settings.trunk.num_queries))
        return dataset

    categories = checkpoint_categories(source.checkpoint) if source.checkpoint else None
    train_set = None if settings.run.eval else load("train", categories)
    categories = categories or (train_set.categories if train_set else None)
    if train_set and settings.run.overfit:
        train_set, val_set = overfit.data_sets(settings, train_set, read["train"])
    else:
        val_set = load(settings.data.split, categories)
    for line in start_lines(checked, Path(settings.data.coco_path)):
        log(line)
    processes = source.evaluating_processes(given) if settings.run.eval else None
    train_loader, val_loader = build_loaders(settings, train_set, val_set, evaluating_processes=processes)
    train = None
    if train_set and train_loader:
        assert isinstance(train_loader.sampler, TrainSampler)
        bad_images = BadImages(
            train_set, largest_share=settings.data.max_bad_images, folder=folder.path if folder else None,
            every=settings.run.print_every,
        )  # fmt: skip
        train = TrainData(train_set, train_loader.sampler, train_loader, bad_images)
    return Data(categories or val_set.categories, train, val_set, val_loader)


def build_loaders(
    settings: RunSettings,
    train_set: CocoDetection | None,
    val_set: CocoDetection,
    *,
    evaluating_processes: int | None = None,
) -> tuple[DataLoader | None, DataLoader]:
    """Batches for training, without the incomplete last one, and for evaluation, of images sorted by id, as published.

    `evaluating_processes` as of `Source.evaluating_processes`; None: those of this run. Raises ValueError: a step needs
    more images than there are.
    """
    batch_size, accumulate = settings.optimisation.batch_size, settings.optimisation.accumulate
    rank, world_size = get_rank(), get_world_size()
    options: dict[str, Any] = {
        "timeout": settings.run.timeout,
        "collate_fn": partial(collate, multiple=settings.data.pad_to_multiple),
        "num_workers": settings.data.num_workers,
        "persistent_workers": settings.data.num_workers > 0,  # started once, not for each epoch
        "pin_memory": torch.cuda.is_available(),
        "worker_init_fn": _init_worker,
        # A loader draws a number when its workers start, which in a resumed run is in another epoch. It must not come
        # from the random numbers of the network's dropout.
        "generator": torch.Generator(),
    }
    batches = evaluation_batches(
        order=val_set.images.by_id(), batch_size=batch_size, processes=evaluating_processes or world_size, rank=rank,
        world_size=world_size,
    )  # fmt: skip
    val_loader = Loader(val_set, batch_sampler=batches, **options)
    if train_set is None:
        return None, val_loader
    batch = batch_size * accumulate * world_size
    repeats = overfit.repeats(settings, len(train_set)) if settings.run.overfit else 1
    if len(train_set) * repeats < batch:
        times = f" `accumulate` {accumulate}" if accumulate > 1 else ""
        raise ValueError(
            f"`batch_size` {batch_size}{times} in {world_size} process(es) is more than the {len(train_set)} training "
            "images; make it smaller"
        )
    height, width = max(settings.data.train_sizes), settings.data.max_size
    bytes_of_batch = batch_size * 4 * height * max(height, width)  # colours and padding
    if line := shared_memory_warning(num_workers=settings.data.num_workers, batch_bytes=bytes_of_batch):
        log(line)
    shuffled = TrainSampler(
        length=len(train_set) * repeats, batch=batch, rank=rank, world_size=world_size, seed=settings.run.seed,
        buckets=_buckets(train_set, repeats, settings),
    )  # fmt: skip
    images: Dataset = ConcatDataset([train_set] * repeats) if repeats > 1 else train_set
    return Loader(images, batch_size=batch_size, sampler=shuffled, **options), val_loader


def _buckets(images: CocoDetection, repeats: int, settings: RunSettings) -> Buckets | None:
    """Those of `size_buckets`, if any. Raises ValueError: the sizes of images are not known."""
    if settings.data.size_buckets < 2:
        return None
    ratios = images.images.ratios()
    if unknown := ratios.count(0):
        raise ValueError(
            f"`size_buckets` {settings.data.size_buckets}: {images.annotation_file} has no width and height of "
            f"{unknown} images, such as image id {images.images[ratios.index(0)].id}; add them, or leave the flag out"
        )
    return Buckets(ratios=ratios * repeats, number=settings.data.size_buckets, group=settings.optimisation.batch_size)


def _init_worker(number: int) -> None:
    shield_worker(number)
    guard_worker()
    leave_lock_to_parent()


def _weights(source: Source, settings: RunSettings) -> dict[str, Tensor] | None:
    """Those of the checkpoint, if any. Raises ValueError."""
    if not source.checkpoint:
        return None
    weights = chosen_weights(source.checkpoint, raw=settings.run.raw_weights or not settings.run.eval)
    if weights is not source.checkpoint["model"]:
        log("these are averaged weights (`ema`); `raw_weights` takes those that were trained")
    if not settings.run.allow_nonfinite:
        require_finite(weights, source=source.path, remedy="; `allow_nonfinite` takes it as it is")
    return weights


def _say_denoising(network: Detector, weights: Mapping[str, Tensor], *, path: str, training: bool) -> None:
    """A line if the file has denoising's parameters and this network has none, or the other way round."""
    here, there = (any(n.startswith(TRAINING_ONLY) for n in names) for names in (network.state_dict(), weights))
    if there and not here:
        more = "; `denoising` GROUPS goes on with it" if training else ", which only training needs"
        log(f"{path} was trained with denoising: its label embedding is left out{more}")
    elif here and not there and training:
        log(f"{path} was trained without denoising: its label embedding starts from random weights")


def _start_weights(
    network: Detector,
    settings: RunSettings,
    given: Mapping[str, Any],
    pretrained: Pretrained | None,
    categories: Categories,
) -> None:
    """Those of the backbone, and over them what fits of the pretrained detector: with its backbone, unless the user
    gives weights for it. Raises ValueError."""
    wanted, raw = settings.run.backbone_weights, settings.run.raw_weights
    other = "backbone_weights" in given and wanted != "none"
    if other or not (pretrained and pretrained.has_backbone_of(network, raw=raw)):
        with main_process_first():
            load_backbone_weights(network, wanted)
    if pretrained:
        pretrained.load_into(network, categories, raw=raw, backbone=not other)
    elif wanted == "none" and settings.trunk.backbone_norm == "frozen":
        log("note: a random backbone whose norms and first stage stay frozen; `backbone_norm` learned trains them")
