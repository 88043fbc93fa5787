"""Train or evaluate a detector.

python main.py --coco_path data/coco --output_dir output/run
torchrun --nproc_per_node=4 main.py --batch_size 4 --smca --epochs 12 --lr_drop 10 --output_dir output/run
python main.py --coco_path data/coco --resume output/run/checkpoint.pth --eval
python main.py --replay output/run/replay.pth
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.data import DataLoader

from samdetr.datasets.bad_images import BadImages
from samdetr.datasets.build import build_dataset, collate, start_report
from samdetr.datasets.categories import COCO, Categories
from samdetr.datasets.coco_eval import CocoEvaluator
from samdetr.datasets.sampler import DistributedEvalSampler, TrainSampler
from samdetr.engine import evaluate
from samdetr.models.backbone import RESNETS
from samdetr.models.build import (
    FAMILIES,
    build_model,
    input_proj_norm,
    load_backbone_weights,
    read_checkpoint,
)
from samdetr.training import replay
from samdetr.training.checkpoints import NEWEST, CheckpointFolder
from samdetr.training.cluster.preemption import PREEMPTED, Signals, Stopped, Wish, end_now, shield_worker
from samdetr.training.cluster.wall_clock import WallClock
from samdetr.training.cluster.watchdog import Watchdog
from samdetr.training.ema import WeightAverage
from samdetr.training.guard import BadSteps, StepGuard
from samdetr.training.loop import Trainer
from samdetr.training.optim import SCHEDULES, build_scheduler, parameter_groups
from samdetr.training.profiler import StepProfiler
from samdetr.training.state import TrainingState
from samdetr.util.checkpoint import load_weights
from samdetr.util.command_line import run_command
from samdetr.util.distributed import (
    all_gather_object,
    get_rank,
    get_world_size,
    init_distributed,
    is_main,
    main_process_first,
    shutdown,
)
from samdetr.util.logger import log, write_json

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Parser(argparse.ArgumentParser):
    """Its defaults are those published for the family that --model names; the help shows SAM-DETR's."""

    def error(self, message: str) -> NoReturn:
        """One line; the usage of so many flags would hide it."""
        self.exit(2, f"{self.prog}: error: {message}; --help tells all flags\n")

    def parse_known_args(self, args=None, namespace=None):
        chosen, _ = super().parse_known_args(args)
        usual = {name: self.get_default(name) for name in FAMILIES[chosen.model].defaults}
        self.set_defaults(**FAMILIES[chosen.model].defaults)
        try:
            settings, rest = super().parse_known_args(args, namespace)
        finally:
            self.set_defaults(**usual)
        # Short for a choice of --sam_resample, which alone is kept.
        aligner = settings.__dict__.pop("aligner")
        if aligner and settings.sam_resample in ("off", None):
            settings.sam_resample = "points"
        elif aligner is False:
            settings.sam_resample = "off"
        return settings, rest


def build_parser() -> Parser:
    parser = Parser(
        "main.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    number, whole = float, int

    group = parser.add_argument_group("optimisation")
    group.add_argument("--lr", default=1e-4, type=number)
    group.add_argument("--lr_backbone", default=1e-5, type=number, help="0 freezes the backbone")
    group.add_argument(
        "--lr_linear_proj_names", default=[], nargs="+", help="parameters whose names contain one of these"
    )
    group.add_argument("--lr_linear_proj_mult", default=0.1, type=number, help="... learn at lr times this")
    group.add_argument("--batch_size", default=2, type=whole, help="images per process")
    group.add_argument("--weight_decay", default=1e-4, type=number)
    group.add_argument("--epochs", default=50, type=whole)
    group.add_argument(
        "--lr_drop", default=40, type=whole, help="epochs after which the learning rate falls to a tenth"
    )
    group.add_argument("--lr_schedule", default="step", choices=SCHEDULES, help="how the learning rate falls")
    group.add_argument("--warmup_iters", default=0, type=whole, help="iterations of linear warm-up")
    group.add_argument("--clip_max_norm", default=0.1, type=number, help="largest gradient norm; 0 does not clip")
    group.add_argument(
        "--ema", default=0.0, type=number, metavar="DECAY", help="also average the weights, as with 0.9998; 0: not"
    )
    group.add_argument(
        "--max_bad_steps",
        default=10,
        type=whole,
        help="steps in a row with a loss or gradient that is not finite, after which the run stops; each is skipped",
    )
    group.add_argument(
        "--legacy_no_zero_grad",
        action="store_true",
        help="never zero gradients: add to the last step's, as the published SAP-DETR does without --amp",
    )

    group = parser.add_argument_group("network (with --resume, what is not given comes from the checkpoint)")
    group.add_argument(
        "-m", "--model", default="sam_detr", choices=FAMILIES, help="family; published defaults go with it"
    )
    group.add_argument("--multiscale", action="store_true", help="C3, C4 and C5, with a deformable encoder")
    group.add_argument("--backbone", default="resnet50", help=", ".join(RESNETS))
    group.add_argument(
        "--backbone_level", default=5, type=whole, choices=(3, 4, 5), help="the stage used: 4 is C4, stride 16"
    )
    group.add_argument(
        "--backbone_norm",
        default="frozen",
        choices=("frozen", "learned"),
        help="BatchNorm; learned: to train from scratch",
    )
    group.add_argument(
        "--backbone_weights",
        default="imagenet",
        metavar="{imagenet,none,FILE}",
        help="where training starts; not used with --resume",
    )
    group.add_argument("--dilation", action="store_true", help="C5 at stride 16 (DC5)")
    group.add_argument("--position_embedding", default="sine", choices=("sine",))
    group.add_argument(
        "--input_proj_norm",
        default="auto",
        choices=("auto", "group", "none"),
        help="GroupNorm after the input projection; auto: multi-scale, or epochs < 25",
    )
    group.add_argument("--enc_layers", default=6, type=whole)
    group.add_argument("--dec_layers", default=6, type=whole)
    group.add_argument("--dim_feedforward", default=2048, type=whole)
    group.add_argument("--hidden_dim", default=256, type=whole)
    group.add_argument("--dropout", default=0.1, type=number)
    group.add_argument("--nheads", default=8, type=whole)
    group.add_argument("--num_queries", default=300, type=whole)
    group.add_argument("--smca", action="store_true", help="spatial prior around the salient points")
    aligner = group.add_mutually_exclusive_group()
    aligner.add_argument(
        "--aligner",
        action="store_true",
        default=None,
        help="a Semantics Aligner in every decoder layer, where the family has none or --sam_resample says off",
    )
    aligner.add_argument("--no_aligner", dest="aligner", action="store_false", default=None, help="none")
    group.add_argument(
        "--sam_resample",
        default="points",
        choices=("points", "average", "maximum", "off"),
        help="what queries are resampled from; off: no Semantics Aligner",
    )
    group.add_argument("--sam_points", default=None, type=whole, help="salient points a query: 1, or nheads (default)")
    group.add_argument("--sam_range", default="box", choices=("box", "image"), help="where salient points may lie")
    group.add_argument(
        "--no_sam_reweight", dest="sam_reweight", action="store_false", help="do not gate new queries by old ones"
    )

    group = parser.add_argument_group("Deformable DETR")
    group.add_argument(
        "--num_feature_levels", default=4, type=whole, help="1: the last stage alone; beyond C3 to C5: smaller ones"
    )
    group.add_argument(
        "--with_box_refine", action="store_true", help="a layer's boxes are where the next one looks; heads of its own"
    )
    group.add_argument(
        "--two_stage", action="store_true", help="queries are the encoder's best proposals; needs --with_box_refine"
    )
    group.add_argument("--enc_n_points", default=4, type=whole, help="points a head looks at in each level, encoder")
    group.add_argument("--dec_n_points", default=4, type=whole, help="the same, decoder")
    parser.set_defaults(num_classes=91)  # COCO's, until the data set or the checkpoint tells

    group = parser.add_argument_group("loss")
    group.add_argument("--no_aux_loss", dest="aux_loss", action="store_false", help="loss at the last layer only")
    group.add_argument("--set_cost_class", default=2.0, type=number)
    group.add_argument("--set_cost_bbox", default=5.0, type=number)
    group.add_argument("--set_cost_giou", default=2.0, type=number)
    group.add_argument("--cls_loss_coef", default=2.0, type=number)
    group.add_argument("--bbox_loss_coef", default=5.0, type=number)
    group.add_argument("--giou_loss_coef", default=2.0, type=number)
    group.add_argument("--focal_alpha", default=0.25, type=number)

    group = parser.add_argument_group("SAP-DETR (with --resume, what is not given comes from the checkpoint)")
    group.add_argument("--num_select", default=300, type=whole, help="detections kept of an image")
    group.add_argument(
        "--transformer_activation", default="relu", choices=("relu", "prelu"), help="of the feed-forward branches"
    )
    group.add_argument(
        "--meshgrid_refpoints_xy", action="store_true", help="points start as a grid; always so, nothing else exists"
    )
    group.add_argument("--newconvinit", action="store_true", help="queries start as the features at their points")
    group.add_argument("--sdg", action="store_true", help="side-directed Gaussian")
    group.add_argument(
        "--bbox_embed_diff_each_layer", action="store_true", help="distance and point heads of its own for each layer"
    )
    group.add_argument("--obj_loss_coef", default=1.0, type=number, help="of the objectness loss")
    group.add_argument("--inner_loss_coef", default=2.0, type=number, help="of loss_inner, which has no gradient")
    group.add_argument(
        "--point_reference",
        default="late",
        choices=("late", "current"),
        help="which points a layer's heads move: late (published), those that entered the layer before",
    )
    group.add_argument(
        "--head_cell",
        default="published",
        choices=("published", "grid"),
        help="how far heads move a point: published, 1/20 of the image but for 306 queries; grid, a cell of the grid",
    )
    group.add_argument(
        "--objectness_target",
        default="attached",
        choices=("attached", "detached"),
        help="whether boxes learn from the IoU that objectness should tell: attached (published), they do",
    )

    group = parser.add_argument_group("data")
    group.add_argument("--dataset_file", default="coco", help="format of the data set; coco is the only one")
    group.add_argument("--coco_path", default="data/coco", help="folder with train2017/, val2017/ and annotations/")
    group.add_argument(
        "--train_sizes",
        default=list(range(480, 801, 32)),
        nargs="+",
        type=whole,
        help="short sides drawn from in training",
    )
    group.add_argument("--eval_size", default=800, type=whole, help="short side in evaluation")
    group.add_argument("--max_size", default=1333, type=whole, help="longest side")
    group.add_argument("--no_crop", dest="crop_augmentation", action="store_false", help="no random crops in training")
    group.add_argument("--cache_mode", action="store_true", help="hold the image files in memory, once a node")
    group.add_argument("--num_workers", default=2, type=whole)
    group.add_argument(
        "--max_bad_images",
        default=0.001,
        type=number,
        help="share of the training images that may be unreadable; others take their place",
    )

    group = parser.add_argument_group("speed")
    group.add_argument(
        "--amp", default="off", choices=AMP, help="16-bit arithmetic in the network; matching and losses stay float32"
    )
    group.add_argument("--compile", action="store_true", help="torch.compile the network, for any size of image")
    group.add_argument("--tf32", action="store_true", help="products of float32 rounded to 10 bits on recent GPUs")
    group.add_argument("--no_tf32", dest="tf32", action="store_false", help="the default")
    group.add_argument(
        "--channels_last", action="store_true", default=None, help="memory format of images; the default on a CPU"
    )
    group.add_argument("--no_channels_last", dest="channels_last", action="store_false")
    group.add_argument("--accumulate", default=1, type=whole, help="batches to a step, as one large batch")
    group.add_argument("--pad_to_multiple", default=1, type=whole, help="pad batches to multiples of so many pixels")
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="the same numbers in every run, or an error",
    )
    group.add_argument("--profile", default=0, type=whole, help="show where the time of the first so many steps goes")

    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", default="", help="where to save; empty: nowhere")
    group.add_argument("--device", default="auto", help="auto: a GPU where there is one")
    group.add_argument("--seed", default=42, type=whole)
    group.add_argument(
        "--resume",
        default="",
        metavar="{FILE,URL,auto,auto:FILE}",
        help="checkpoint to go on from, ours or an official one; auto: the newest good one in --output_dir, where "
        "there is one, else FILE",
    )
    group.add_argument("--start_epoch", default=0, type=whole)
    group.add_argument("--eval", action="store_true", help="evaluate, do not train")
    group.add_argument("--raw_weights", action="store_true", help="with --eval: not the averaged ones of --ema")
    group.add_argument("--eval_every_epoch", default=1, type=whole)
    group.add_argument(
        "--patience", default=0, type=whole, help="stop after so many evaluations without a higher AP; 0: never"
    )
    group.add_argument(
        "--max_hours", default=0.0, type=number, help="save and end after so many, those before a --resume included"
    )
    group.add_argument("--replay", default="", metavar="FILE", help="repeat the step that a run stopped at, and tell")
    group.add_argument("--save_every_epoch", default=1, type=whole, help="epochs between checkpoints of their own name")
    group.add_argument("--save_every_iterations", default=0, type=whole, help="also save after so many; 0: not")
    group.add_argument("--save_every_minutes", default=0.0, type=number, help="also save after so many; 0: not")
    group.add_argument(
        "--keep", type=whole, help="older checkpoints that stay; unset: all of --save_every_epoch, one in between"
    )
    group.add_argument(
        "--timeout", default=1800.0, type=number, help="seconds without a sign of a process until the others stop"
    )
    group.add_argument(
        "--print_every", default=50, type=whole, help="iterations between lines where output is no terminal"
    )
    group.add_argument(
        "--world_size", default=1, type=whole, help="number of processes, where the launcher does not tell"
    )
    group.add_argument("--dist_url", default="env://", help="where the processes meet")
    group.add_argument(
        "--local_rank", "--local-rank", default=0, type=whole, help="of torch.distributed.launch; LOCAL_RANK tells it"
    )
    return parser


def check_settings(args: argparse.Namespace) -> None:
    """Refuse values that no run can use, before anything is read or written. Raises ValueError."""
    at_least = {
        1: "batch_size epochs lr_drop dec_layers dim_feedforward hidden_dim nheads num_queries num_select eval_size "
        "max_size num_feature_levels enc_n_points dec_n_points eval_every_epoch save_every_epoch print_every "
        "accumulate pad_to_multiple timeout max_bad_steps",
        0: "lr lr_backbone weight_decay clip_max_norm enc_layers warmup_iters num_workers seed start_epoch focal_alpha "
        "dropout set_cost_class set_cost_bbox set_cost_giou cls_loss_coef bbox_loss_coef giou_loss_coef "
        "obj_loss_coef inner_loss_coef profile save_every_iterations save_every_minutes keep ema patience max_hours "
        "max_bad_images",
    }
    for least, names in at_least.items():
        for name in names.split():
            if getattr(args, name) is not None and not getattr(args, name) >= least:  # so that NaN is refused too
                raise ValueError(f"--{name} {getattr(args, name)} must be at least {least}")
    for name in ("dropout", "focal_alpha", "max_bad_images"):
        if getattr(args, name) > 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at most 1")
    if args.ema >= 1:
        raise ValueError(f"--ema {args.ema} must be less than 1, which would never follow the weights")
    if args.timeout > 1e9:  # 30 years; sockets take no infinity
        raise ValueError(f"--timeout {args.timeout} must be at most 1e9 seconds")
    if min(args.train_sizes) < 1:
        raise ValueError(f"--train_sizes {min(args.train_sizes)} must be at least 1")
    if args.eval and not args.resume:
        raise ValueError("--eval needs a model: pass --resume CHECKPOINT")
    if is_auto(args.resume) and not args.output_dir:
        raise ValueError("--resume auto looks for checkpoints in --output_dir: pass the folder")
    if args.output_dir and not _can_be_written(Path(args.output_dir)):
        raise ValueError(f"--output_dir {args.output_dir} is not a folder that can be written to")


def _can_be_written(folder: Path) -> bool:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def choose_device(name: str) -> torch.device:
    """Raises ValueError for a device that is not here. Touches no GPU: each process must choose its own first."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise ValueError(f"--device {name} is no device; leave it out, or pass cpu or cuda") from None
    here = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= here.get(device.type, 0):
        raise ValueError(f"--device {name} is not here ({torch.cuda.device_count()} GPUs); leave it out or pass cpu")
    return device


def set_arithmetic(*, tf32: bool, deterministic: bool) -> None:
    """For the whole process. PyTorch's own default lets convolutions use TF32 and products not."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
    torch.use_deterministic_algorithms(deterministic)


def take_network_settings(args: argparse.Namespace, given: set[str], checkpoint: dict[str, Any]) -> None:
    """Let the checkpoint decide what shapes the network, but for flags that the user gave: if these do not fit, loading
    the weights says so. What the weights themselves tell always follows them. Raises ValueError for another family."""
    told = checkpoint["settings"]
    if args.model != told["model"]:
        if "model" in given:
            raise ValueError(f"--model {args.model} does not fit the checkpoint, a {told['model']}; leave the flag out")
        for name, value in vars(build_parser().parse_args(["--model", told["model"]])).items():
            if name not in given:
                setattr(args, name, value)
    for name, value in told.items():
        if name not in given or name in ("input_proj_norm", "num_classes"):
            setattr(args, name, value)


def chosen_weights(checkpoint: dict[str, Any], *, raw: bool) -> dict[str, torch.Tensor]:
    """Those to detect with: the averaged ones, where the file has some, unless `raw`."""
    if raw or not checkpoint.get("ema"):
        return checkpoint["model"]
    log("these are averaged weights (--ema); --raw_weights takes those that were trained")
    return checkpoint["ema"]["model"]


def check_family(args: argparse.Namespace, given: set[str]) -> None:
    """Refuse flags of other families, which would have no effect. Raises ValueError."""
    others = {name for family in FAMILIES.values() for name in family.settings}
    for name in sorted(given & others - set(FAMILIES[args.model].settings)):
        flags = [action.option_strings[0] for action in build_parser()._actions if action.dest == name]
        raise ValueError(
            f"{' or '.join(flags)} has no effect on --model {args.model}; leave it out, or choose another model"
        )


def checkpoint_categories(checkpoint: dict[str, Any]) -> Categories | None:
    """The classes that a checkpoint was trained for; official files have none, but those of COCO are known."""
    num_classes = checkpoint["settings"].get("num_classes")
    if "categories" in checkpoint:
        return Categories.from_list(checkpoint["categories"], num_classes=num_classes)
    return COCO if checkpoint["official"] and num_classes == COCO.num_classes else None


def build_loaders(args: argparse.Namespace, train_set, val_set) -> tuple[DataLoader | None, DataLoader]:
    """Batches for training (None without a training set; incomplete last ones dropped, as published) and evaluation."""
    options = {
        "collate_fn": partial(collate, multiple=args.pad_to_multiple),
        "num_workers": args.num_workers,
        "persistent_workers": args.num_workers > 0,  # started once, not anew for each epoch
        "pin_memory": torch.cuda.is_available(),
        "worker_init_fn": shield_worker,
        # A loader draws a number when its workers start, which in a resumed run is another epoch: not from the numbers
        # that the network's dropout draws.
        "generator": torch.Generator(),
    }
    order = DistributedEvalSampler(length=len(val_set), rank=get_rank(), world_size=get_world_size())
    val_loader = DataLoader(val_set, args.batch_size, sampler=order, **options)
    if train_set is None:
        return None, val_loader
    if len(train_set) < args.batch_size * args.accumulate * get_world_size():
        times = f" --accumulate {args.accumulate}" if args.accumulate > 1 else ""
        raise ValueError(
            f"--batch_size {args.batch_size}{times} in {get_world_size()} process(es) is more than the "
            f"{len(train_set)} training images; make it smaller"
        )
    order = TrainSampler(
        length=len(train_set),
        batch=args.batch_size * args.accumulate * get_world_size(),
        rank=get_rank(),
        world_size=get_world_size(),
        seed=args.seed,
    )
    return DataLoader(train_set, args.batch_size, sampler=order, **options), val_loader


def compiled_graphs() -> int:
    """How often torch.compile compiled; it stops, and runs uncompiled what is left, at 8 for one piece of code."""
    from torch._dynamo.utils import counters  # takes seconds to import

    return counters["stats"]["unique_graphs"]


@dataclass(frozen=True)
class Run:
    """The parts of a run that both training and evaluation need."""

    args: argparse.Namespace
    given: set[str]
    device: torch.device
    checkpoint: dict[str, Any] | None
    network: nn.Module
    model: nn.Module  # the network, or DDP around it
    criterion: nn.Module
    postprocess: Callable[..., Any]
    categories: Categories
    train_loader: DataLoader | None
    bad_images: BadImages | None
    val_loader: DataLoader
    folder: CheckpointFolder | None
    watchdog: Watchdog
    own: bool  # whether training goes on with the run whose log and checkpoints are in the folder

    @property
    def settings(self) -> dict[str, Any]:
        return {**vars(self.args), "world_size": get_world_size()}

    def evaluate(self) -> tuple[dict[str, Any], CocoEvaluator]:
        """Figures of the network as it is, and what holds the detections."""
        evaluator = CocoEvaluator(self.val_loader.dataset.ground_truth, self.categories)
        stats = evaluate(
            model=self.model,
            criterion=self.criterion,
            postprocess=self.postprocess,
            loader=self.watchdog.watched(self.val_loader),
            evaluator=evaluator,
            device=self.device,
            amp=AMP[self.args.amp],
            print_every=self.args.print_every,
        )
        log(evaluator.table())
        return stats, evaluator


def place(network: nn.Module, args: argparse.Namespace, device: torch.device) -> None:
    """Put the network where it computes."""
    network.to(device)
    if args.channels_last or (args.channels_last is None and device.type == "cpu"):
        network.to(memory_format=torch.channels_last)  # convolutions run faster so; a step of the quick start by 15 %


def open_checkpoint(args: argparse.Namespace, folder: CheckpointFolder | None) -> dict[str, Any] | None:
    """What --resume says, read; `args.resume` becomes the file, or empty where "auto" finds none. Raises ValueError."""
    auto, otherwise = is_auto(args.resume), args.resume.partition(":")[2] if is_auto(args.resume) else args.resume
    newest = folder and folder.path / NEWEST
    found = path = None
    if auto or (not args.eval and newest and same_file(args.resume, newest)):
        # The main process looks, so that all processes take the same file.
        found = folder.newest_good(read_checkpoint) if is_main() else None
        path = all_gather_object(found and str(found[0]))[0]
    if path is None and auto:
        if args.eval and not otherwise:
            raise ValueError(f"--resume auto: no good checkpoint is in {folder.path}; pass a file")
        log(f"no checkpoint in {folder.path} yet; the run starts {f'from {otherwise}' if otherwise else 'afresh'}")
    args.resume = path or otherwise
    if not args.resume:
        return None
    return found[1] if found else read_checkpoint(args.resume)


def is_auto(resume: str) -> bool:
    return resume == "auto" or resume.startswith("auto:")


def same_file(one: str, other: Path) -> bool:
    return other.exists() and os.path.exists(one) and os.path.samefile(one, other)


def build(args: argparse.Namespace, given: set[str], watchdog: Watchdog) -> Run:
    """Data, network and losses, with the weights that the run starts from. Raises ValueError."""
    device = choose_device(args.device)
    folder = CheckpointFolder(args.output_dir, keep=args.keep) if args.output_dir else None
    own = is_auto(args.resume)
    checkpoint = open_checkpoint(args, folder)
    if checkpoint:
        own = "iteration" in checkpoint and folder and Path(args.resume).parent.resolve() == folder.path.resolve()
    own = bool(own) and "start_epoch" not in given
    categories = None
    if checkpoint:
        take_network_settings(args, given, checkpoint)
        categories = checkpoint_categories(checkpoint)
        if "sampler" in checkpoint and "seed" not in given:
            args.seed = checkpoint["sampler"]["seed"]  # the order of the images goes on
    check_family(args, given)
    train_set = None if args.eval else build_dataset("train", args, categories)
    categories = categories or (train_set.categories if train_set else None)
    val_set = build_dataset("val", args, categories)
    categories = categories or val_set.categories
    for line in start_report(train_set, val_set):
        log(line)
    bad_images = None
    if train_set:
        bad_images = BadImages(
            train_set, largest_share=args.max_bad_images, folder=folder and folder.path, every=args.print_every
        )
    if not checkpoint:
        args.num_classes = categories.num_classes
    elif categories.num_classes > args.num_classes:
        raise ValueError(
            f"{args.resume} has {args.num_classes} classes, but labels at {args.coco_path} go up to "
            f"{categories.num_classes - 1}; use the data set that it was trained for"
        )
    train_loader, val_loader = build_loaders(args, train_set, val_set)

    args.input_proj_norm = input_proj_norm(args)
    network, criterion, postprocess = build_model(args)
    if checkpoint:
        weights = chosen_weights(checkpoint, raw=args.raw_weights or not args.eval)
        load_weights(network, weights, source=args.resume)
    else:
        with main_process_first():
            load_backbone_weights(network, args.backbone_weights)
        if args.backbone_weights == "none" and args.backbone_norm == "frozen":
            log("note: a random backbone whose norms and first stage stay frozen; --backbone_norm learned trains them")
    place(network, args, device)
    if args.compile:
        network.compile(dynamic=True)
    n_parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    log(f"{n_parameters:,} trainable parameters; {get_world_size()} process(es) on {device.type}")
    model: nn.Module = network
    if get_world_size() > 1:
        # Without auxiliary losses the heads of the earlier layers get no gradient.
        model = nn.parallel.DistributedDataParallel(
            network,
            find_unused_parameters=not args.aux_loss,
            broadcast_buffers=args.backbone_norm == "learned",  # frozen norms never differ
        )
    return Run(
        args=args,
        given=given,
        device=device,
        checkpoint=checkpoint,
        network=network,
        model=model,
        criterion=criterion,
        postprocess=postprocess,
        categories=categories,
        train_loader=train_loader,
        bad_images=bad_images,
        val_loader=val_loader,
        folder=folder,
        watchdog=watchdog,
        own=own,
    )


def write_evaluation(run: Run) -> None:
    """--eval: show the figures, and write them and the detections."""
    stats, evaluator = run.evaluate()
    if run.folder and is_main():
        with run.folder.writing() as output:
            write_json(output / "detections.json", evaluator.results, indent=None)
            write_json(output / "eval.json", {**stats, "resume": run.args.resume, "settings": run.settings})
        log(f"detections and figures are in {run.folder.path}")


def starting_point(run: Run, sampler: TrainSampler) -> tuple[int, int | None]:
    """The epoch to go on with, and the steps of it that are done: None where it starts as if all before were another
    run's. Raises ValueError for a checkpoint within an epoch that these settings cannot go on in."""
    args, checkpoint = run.args, run.checkpoint
    if not checkpoint or "epoch" not in checkpoint or "start_epoch" in run.given:
        return args.start_epoch, None
    epoch, done, order = checkpoint["epoch"], checkpoint.get("iteration"), checkpoint.get("sampler")
    if done is None or order["position"] + order["batch"] > len(run.train_loader.dataset):  # the epoch is through
        # Only its log line may be missing, if this is the same run.
        if run.own and done is not None and not run.folder.has_logged(epoch):
            return epoch, sampler.steps
        return epoch + 1, None
    for flag, here in (("seed", sampler.seed), ("batch", sampler.batch)):
        if order[flag] != here:
            what = "--seed" if flag == "seed" else "images a step (processes x --batch_size x --accumulate)"
            raise ValueError(
                f"{args.resume} lies in the middle of epoch {epoch} of a run with {what} {order[flag]}, here {here}: "
                "go on with the same, or from a checkpoint at an epoch's end"
            )
    return epoch, done


def build_optimizer(network: nn.Module, args: argparse.Namespace, device: torch.device) -> torch.optim.Optimizer:
    groups = parameter_groups(
        network,
        lr=args.lr,
        lr_backbone=args.lr_backbone,
        lr_linear_proj_names=args.lr_linear_proj_names,
        lr_linear_proj_mult=args.lr_linear_proj_mult,
    )
    return torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay, fused=device.type in ("cpu", "cuda"))


def train(run: Run, signals: Signals) -> None:
    """Train to the last epoch. Raises Stopped where the run ends early, ValueError."""
    args, network, checkpoint, sampler = run.args, run.network, run.checkpoint, run.train_loader.sampler
    optimizer = build_optimizer(network, args, run.device)
    epoch, done = starting_point(run, sampler)
    args.start_epoch = epoch
    scheduler = build_scheduler(
        optimizer,
        schedule=args.lr_schedule,
        total_steps=args.epochs * sampler.steps,
        drop_step=args.lr_drop * sampler.steps,
        warmup_steps=args.warmup_iters,
        first_step=epoch * sampler.steps + (done or 0),
    )
    keep_gradients = args.legacy_no_zero_grad and args.amp == "off"  # with --amp the published loop zeroes them, too
    guard = StepGuard(network, device=run.device, limit=args.max_bad_steps, keep_gradients=keep_gradients)
    average = WeightAverage(network, decay=args.ema) if args.ema else None
    clock = WallClock(hours=args.max_hours) if args.max_hours else None
    state = TrainingState(
        model=network,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=torch.amp.GradScaler(run.device.type) if args.amp == "fp16" else None,
        keep_gradients=keep_gradients,
        ema=average,
        extras={"bad_steps": guard, **({"clock": clock} if clock else {})},
        seed=args.seed,
        batch=sampler.batch,
        facts={"settings": run.settings, "categories": run.categories.to_list()},
        epoch=epoch,
    )
    alike = False
    if checkpoint:
        log(f"going on from {args.resume} with epoch {epoch}" + (f", step {done}" if done else ""))
        if checkpoint["official"] or "optimizer" not in checkpoint:
            log("the optimiser starts anew: this file has no state of it that fits our parameters")
        else:
            state.restore(checkpoint, source=args.resume)
        if average and not checkpoint.get("ema"):
            log("the average of the weights starts from these: this file has none")
        elif not average and checkpoint.get("ema"):
            log("the average of the weights is left out; --ema goes on with it")
        if done is not None:
            alike = state.restore_place(checkpoint, iteration=done)
    if run.folder and is_main():
        run.folder.clean()
        if run.own:
            run.folder.forget_log(epoch)
    # The main process reads, so that all know the same.
    earlier = all_gather_object(run.folder.logged() if run.own and is_main() else [])[0]
    if epoch >= args.epochs:
        log(f"nothing to do up to --epochs {args.epochs}; --start_epoch 0 starts over from these weights")
    if clock and clock.is_up:
        log(f"--max_hours {args.max_hours} are used up ({clock.seconds / 3600:.2f}); a larger number goes on")
        return

    def figures() -> dict[str, Any]:
        found = run.evaluate()[0]
        if average:
            log("and with averaged weights:")
            with average.in_place():
                found |= {f"ema_{name}": value for name, value in run.evaluate()[0].items()}
        return found

    def wish() -> Wish:
        if not clock or not clock.is_up:
            return Wish.GO_ON
        log(f"--max_hours {args.max_hours} are used up")
        return Wish.FINISH

    def after_epoch() -> None:
        if args.compile:
            log(f"torch.compile: {compiled_graphs()} graphs so far")

    trainer = Trainer(
        state=state,
        model=run.model,
        loader=run.train_loader,
        evaluate=figures,
        folder=run.folder,
        signals=signals,
        watched=lambda loader: run.bad_images.watch(run.watchdog.watched(loader)),
        options={
            "criterion": run.criterion,
            "device": run.device,
            "clip_max_norm": args.clip_max_norm,
            "accumulate": args.accumulate,
            "amp": AMP[args.amp],
            "guard": guard,
            "average": average,
            "profiler": StepProfiler(steps=args.profile, device=run.device),
            "print_every": args.print_every,
        },
        epochs=args.epochs,
        eval_every_epoch=args.eval_every_epoch,
        patience=args.patience,
        earlier=earlier,
        wish=wish,
        save_every_epoch=args.save_every_epoch,
        save_every_iterations=args.save_every_iterations,
        save_every_minutes=args.save_every_minutes,
    )
    try:
        trainer.run(random_numbers_go_on=alike, after_epoch=after_epoch)
    except BadSteps as error:
        text = replay.keep(
            error,
            state=state,
            criterion=run.criterion,
            device=run.device,
            amp=AMP[args.amp],
            folder=run.folder,
        )
        raise ValueError(text) from None


def repeat_step(source: str, device: torch.device) -> int:
    """--replay: what the step gives here; 0 where it is finite, 1 where it is not. Raises ValueError."""
    content = replay.read(source)
    settings = build_parser().parse_args(["--model", content["settings"]["model"]])
    for name in vars(settings).keys() & content["settings"].keys():
        setattr(settings, name, content["settings"][name])
    set_arithmetic(tf32=settings.tf32, deterministic=settings.deterministic)
    network, criterion, _ = build_model(settings)
    load_weights(network, content["model"], source=source)
    place(network, settings, device)
    optimizer = build_optimizer(network, settings, device)
    optimizer.load_state_dict(content["optimizer"])
    log(f"epoch {content['epoch']}, iteration {content['iteration']}, image ids {replay.image_ids(content)}")
    repeated = replay.repeat(content, network=network, criterion=criterion, device=device, amp=AMP[settings.amp])
    for line in repeated.lines():
        log(line)
    if repeated.finite:
        log(f"the step is finite; {replay.take(network, optimizer, clip_max_norm=settings.clip_max_norm)}")
    return 0 if repeated.finite else 1


def run(args: argparse.Namespace, given: set[str]) -> int:
    """Everything after the command line; the exit status. `given` are the names of the flags that the user passed.
    Raises ValueError."""
    check_settings(args)
    if args.replay:
        return repeat_step(args.replay, choose_device(args.device))
    set_arithmetic(tf32=args.tf32, deterministic=args.deterministic)
    ranks = init_distributed(
        dist_url=args.dist_url,
        world_size=args.world_size,
        device=choose_device(args.device).type,
        timeout=timedelta(seconds=args.timeout),
    )
    torch.manual_seed(args.seed + ranks.rank)
    try:
        with Watchdog(timeout=args.timeout) as watchdog:
            if args.eval:
                write_evaluation(build(args, given, watchdog))
                return 0
            signals = Signals(announce=lambda message: watchdog.tell(message, status=PREEMPTED))
            with signals if args.output_dir else nullcontext():  # where nothing can be saved they end it, as ever
                with signals.nothing_to_save():
                    parts = build(args, given, watchdog)
                train(parts, signals)
    except Stopped as stopped:
        return stopped.status
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 1 for a --replay that is not finite, 2 after one line about what is wrong with the input, 75
    where the run is to be started again."""
    parser = build_parser()
    args = parser.parse_args(argv)
    unset = argparse.Namespace(**dict.fromkeys(vars(args)))
    given = {name for name, value in vars(parser.parse_args(argv, unset)).items() if value is not None}
    try:
        return run_command("main.py", lambda: run(args, given))
    finally:
        shutdown()


if __name__ == "__main__":
    status = main()
    if status == PREEMPTED:  # at once: the launcher ends the other processes as soon as one has ended
        end_now(status)
    sys.exit(status)
