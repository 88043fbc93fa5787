"""Train or evaluate a detector.

python main.py --coco_path data/coco --output_dir output/run
torchrun --nproc_per_node=4 main.py --batch_size 4 --smca --epochs 12 --lr_drop 10 --output_dir output/run
python main.py --coco_path data/coco --resume output/run/checkpoint.pth --eval
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from datasets import build_dataset, collate, start_report
from datasets.bad_images import BadImages
from datasets.categories import COCO, Categories
from datasets.coco_eval import CocoEvaluator
from datasets.sampler import DistributedEvalSampler
from engine import evaluate, train_one_epoch
from models.backbone import RESNETS
from models.build import (
    FAMILIES,
    build_model,
    input_proj_norm,
    load_backbone_weights,
    read_checkpoint,
)
from util.checkpoint import load_weights, save_file
from util.command_line import run_command
from util.distributed import get_rank, get_world_size, init_distributed, is_main, main_process_first, shutdown
from util.logger import append_json_line, log, read_json_lines, write_json
from util.optim import SCHEDULES, build_scheduler, parameter_groups
from util.profiler import StepProfiler
from util.visualize import plot_training_curves

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Parser(argparse.ArgumentParser):
    """Its defaults are those published for the family that --model names; the help shows SAM-DETR's."""

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
    group.add_argument("--resume", default="", help="checkpoint to go on from: a file or URL, ours or an official one")
    group.add_argument("--start_epoch", default=0, type=whole)
    group.add_argument("--eval", action="store_true", help="evaluate, do not train")
    group.add_argument("--eval_every_epoch", default=1, type=whole)
    group.add_argument("--save_every_epoch", default=1, type=whole)
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
        "accumulate pad_to_multiple",
        0: "lr lr_backbone weight_decay clip_max_norm enc_layers warmup_iters num_workers seed start_epoch focal_alpha "
        "dropout set_cost_class set_cost_bbox set_cost_giou cls_loss_coef bbox_loss_coef giou_loss_coef "
        "obj_loss_coef inner_loss_coef profile max_bad_images",
    }
    for least, names in at_least.items():
        for name in names.split():
            if not getattr(args, name) >= least:  # so that NaN is refused too
                raise ValueError(f"--{name} {getattr(args, name)} must be at least {least}")
    for name in ("dropout", "focal_alpha", "max_bad_images"):
        if getattr(args, name) > 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at most 1")
    if min(args.train_sizes) < 1:
        raise ValueError(f"--train_sizes {min(args.train_sizes)} must be at least 1")
    if args.eval and not args.resume:
        raise ValueError("--eval needs a model: pass --resume CHECKPOINT")
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
    order = DistributedSampler(train_set, num_replicas=get_world_size(), rank=get_rank(), seed=args.seed)
    return DataLoader(train_set, args.batch_size, sampler=order, drop_last=True, **options), val_loader


def compiled_graphs() -> int:
    """How often torch.compile compiled; it stops, and runs uncompiled what is left, at 8 for one piece of code."""
    from torch._dynamo.utils import counters  # takes seconds to import

    return counters["stats"]["unique_graphs"]


def restore_optimizer(optimizer: torch.optim.Optimizer, checkpoint: dict[str, Any], *, source: str) -> None:
    """Take over the optimiser's state; the learning rates follow from the schedule. Raises ValueError."""
    scheduled = [(group["lr"], group["initial_lr"]) for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
    except ValueError:
        raise ValueError(
            f"{source} was trained with other groups of parameters; pass the --lr_backbone (0 or not) and "
            "--lr_linear_proj_names that it was trained with"
        ) from None
    for group, (lr, initial_lr) in zip(optimizer.param_groups, scheduled):
        group["lr"], group["initial_lr"] = lr, initial_lr


def restore_gradients(network: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Take over the gradients of the last step, if the checkpoint has them."""
    gradients = checkpoint.get("gradients", {})
    for name, weight in network.named_parameters():
        if name in gradients:
            weight.grad = gradients[name].to(weight)


def run(args: argparse.Namespace, given: set[str]) -> None:
    """Everything after the command line. `given` are the names of the flags that the user passed. Raises ValueError."""
    check_settings(args)
    device = choose_device(args.device)
    set_arithmetic(tf32=args.tf32, deterministic=args.deterministic)
    ranks = init_distributed(dist_url=args.dist_url, world_size=args.world_size, device=device.type)
    torch.manual_seed(args.seed + ranks.rank)

    # Data, and the classes that it has.
    checkpoint = read_checkpoint(args.resume) if args.resume else None
    categories = None
    if checkpoint:
        take_network_settings(args, given, checkpoint)
        categories = checkpoint_categories(checkpoint)
    check_family(args, given)
    train_set = None if args.eval else build_dataset("train", args, categories)
    categories = categories or (train_set.categories if train_set else None)
    val_set = build_dataset("val", args, categories)
    categories = categories or val_set.categories
    for line in start_report(train_set, val_set):
        log(line)
    bad_images = None
    if train_set:
        folder = Path(args.output_dir) if args.output_dir else None
        bad_images = BadImages(train_set, largest_share=args.max_bad_images, folder=folder, every=args.print_every)
    if not checkpoint:
        args.num_classes = categories.num_classes
    elif categories.num_classes > args.num_classes:
        raise ValueError(
            f"{args.resume} has {args.num_classes} classes, but labels at {args.coco_path} go up to "
            f"{categories.num_classes - 1}; use the data set that it was trained for"
        )
    train_loader, val_loader = build_loaders(args, train_set, val_set)

    # Network, losses, optimiser.
    args.input_proj_norm = input_proj_norm(args)
    network, criterion, postprocess = build_model(args)
    if checkpoint:
        load_weights(network, checkpoint["model"], source=args.resume)
    else:
        with main_process_first():
            load_backbone_weights(network, args.backbone_weights)
        if args.backbone_weights == "none" and args.backbone_norm == "frozen":
            log("note: a random backbone whose norms and first stage stay frozen; --backbone_norm learned trains them")
    network.to(device)
    if args.channels_last or (args.channels_last is None and device.type == "cpu"):
        network.to(memory_format=torch.channels_last)  # convolutions run faster so; a step of the quick start by 15 %
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

    def evaluate_now() -> tuple[dict[str, Any], CocoEvaluator]:
        evaluator = CocoEvaluator(val_set.ground_truth, categories)
        stats = evaluate(
            model=model,
            criterion=criterion,
            postprocess=postprocess,
            loader=val_loader,
            evaluator=evaluator,
            device=device,
            amp=AMP[args.amp],
            print_every=args.print_every,
        )
        log(evaluator.table())
        return stats, evaluator

    output = Path(args.output_dir) if args.output_dir else None
    settings = {**vars(args), "world_size": get_world_size()}
    if args.eval:
        stats, evaluator = evaluate_now()
        if output and is_main():
            output.mkdir(parents=True, exist_ok=True)
            write_json(output / "detections.json", evaluator.results, indent=None)
            write_json(output / "eval.json", {**stats, "resume": args.resume, "settings": settings})
            log(f"detections and figures are in {output}")
        return

    groups = parameter_groups(
        network,
        lr=args.lr,
        lr_backbone=args.lr_backbone,
        lr_linear_proj_names=args.lr_linear_proj_names,
        lr_linear_proj_mult=args.lr_linear_proj_mult,
    )
    optimizer = torch.optim.AdamW(
        groups, lr=args.lr, weight_decay=args.weight_decay, fused=device.type in ("cpu", "cuda")
    )
    if checkpoint and "epoch" in checkpoint and "start_epoch" not in given:
        args.start_epoch = checkpoint["epoch"] + 1
    steps = len(train_loader) // args.accumulate  # of an epoch
    scheduler = build_scheduler(
        optimizer,
        schedule=args.lr_schedule,
        total_steps=args.epochs * steps,
        drop_step=args.lr_drop * steps,
        warmup_steps=args.warmup_iters,
        first_step=args.start_epoch * steps,
    )
    keep_gradients = args.legacy_no_zero_grad and args.amp == "off"  # with --amp the published loop zeroes them, too
    scaler = torch.amp.GradScaler(device.type) if args.amp == "fp16" else None
    if checkpoint:
        log(f"going on from {args.resume} with epoch {args.start_epoch}")
        if checkpoint["official"] or "optimizer" not in checkpoint:
            log("the optimiser starts anew: this file has no state of it that fits our parameters")
        else:
            restore_optimizer(optimizer, checkpoint, source=args.resume)
            if keep_gradients:
                restore_gradients(network, checkpoint)
            if scaler and "scaler" in checkpoint:
                scaler.load_state_dict(checkpoint["scaler"])

    if args.start_epoch >= args.epochs:
        log(f"nothing to do up to --epochs {args.epochs}; --start_epoch 0 starts over from these weights")
    profiler = StepProfiler(steps=args.profile, device=device)
    start = time.time()
    for epoch in range(args.start_epoch, args.epochs):
        # Each epoch draws its own numbers, so that a run that is resumed at its start goes on as if never interrupted.
        torch.manual_seed(args.seed + ranks.rank + 1_000_003 * epoch)
        train_loader.sampler.set_epoch(epoch)
        train_set.set_epoch(epoch)
        train_stats = train_one_epoch(
            model=model,
            criterion=criterion,
            loader=bad_images.watch(train_loader),
            optimizer=optimizer,
            scheduler=scheduler,
            device=device,
            epoch=epoch,
            clip_max_norm=args.clip_max_norm,
            zero_grad=not keep_gradients,
            accumulate=args.accumulate,
            amp=AMP[args.amp],
            scaler=scaler,
            profiler=profiler,
            print_every=args.print_every,
        )
        if args.compile:
            log(f"torch.compile: {compiled_graphs()} graphs so far")
        if output and is_main():
            # The first things written: by now every training image was read and no loss was odd.
            output.mkdir(parents=True, exist_ok=True)
            write_json(output / "settings.json", settings)
            content = {
                "model": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "lr_scheduler": scheduler.state_dict(),
                "epoch": epoch,
                "settings": settings,
                "categories": categories.to_list(),
            }
            if scaler:
                content["scaler"] = scaler.state_dict()
            if keep_gradients:  # what the next step adds to
                content["gradients"] = {
                    name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None
                }
            save_file(content, output / "checkpoint.pth")
            if (epoch + 1) % args.save_every_epoch == 0:
                save_file(content, output / f"checkpoint{epoch:04}.pth")
        line = {f"train_{name}": value for name, value in train_stats.items()}
        if (epoch + 1) % args.eval_every_epoch == 0 or epoch + 1 == args.epochs:
            line |= {f"test_{name}": value for name, value in evaluate_now()[0].items()}
        if output and is_main():
            append_json_line(output / "log.txt", {**line, "epoch": epoch, "n_parameters": n_parameters})
            plot_training_curves(read_json_lines(output / "log.txt"), output / "curves.png")
    log(f"training took {timedelta(seconds=round(time.time() - start))}")


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 after one line about what is wrong with the input."""
    parser = build_parser()
    args = parser.parse_args(argv)
    unset = argparse.Namespace(**dict.fromkeys(vars(args)))
    given = {name for name, value in vars(parser.parse_args(argv, unset)).items() if value is not None}
    try:
        return run_command("main.py", lambda: run(args, given))
    finally:
        shutdown()


if __name__ == "__main__":
    sys.exit(main())
