"""Detect objects in images and draw them.

    python demo.py --resume output/run/checkpoint.pth                        every image of ./images
    python demo.py --resume output/run/checkpoint.pth --images photo.jpg --output drawn --salient_points
    python demo.py --resume output/multiscale/checkpoint.pth --sampling_points 0.5,0.5

Writes det_res_NAME for every image. The network, its classes and the size of its input come from the checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from samdetr.cli import import_plugin
from samdetr.datasets.coco import CocoDetection
from samdetr.datasets.transforms import EvalTransforms
from samdetr.inference.detections import check_threshold, save_picture
from samdetr.inference.explain import check_points, explain, parse_position
from samdetr.inference.predictor import Predictor, load
from samdetr.inference.sources import DRAWN, Source, find_images
from samdetr.util.box_ops import cxcywh_to_xyxy
from samdetr.util.command_line import as_flags, run_command
from samdetr.util.drawing import contact_sheet, draw_detections
from samdetr.util.logger import log, progress


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "demo.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--resume", required=True, help="checkpoint: a file or URL, ours or an official one")
    parser.add_argument(
        "--allow_http", action="store_true", help="fetch --resume URL over http from other machines, too"
    )
    parser.add_argument("--raw_weights", action="store_true", help="not the averaged weights of --ema, if any")
    parser.add_argument("--images", default="images", help='an image, a folder, a pattern like "photos/*.jpg" or a URL')
    parser.add_argument("--output", default="", help="folder for the pictures; empty: beside the images")
    parser.add_argument("--threshold", default=0.5, type=float, help="least score of a detection that is drawn")
    parser.add_argument("--limit", default=None, type=int, help="draw only the first N images", metavar="N")
    parser.add_argument("--annotations", default="", help="COCO annotation file; its boxes are drawn beside")
    parser.add_argument("--salient_points", action="store_true", help="also draw where each shown query looks")
    parser.add_argument(
        "--sampling_points",
        default="",
        metavar="{X,Y,best}",
        help="also draw where the encoder's deformable attention looks from this place, in fractions of width and "
        "height (0.5,0.5: the middle), or from the centre of the best detection; and the decoder's, if it has one",
    )
    parser.add_argument("--device", default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--plugin", default="", metavar="MODULE", help="module or .py file that registers the family")
    args = parser.parse_args(argv)
    return run_command("demo.py", lambda: run(args), lambda text: as_flags(text.replace("`source`", "--resume")))


def run(args: argparse.Namespace) -> None:
    """Everything after the command line. Raises ValueError."""
    check_threshold(args.threshold)
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"`limit` {args.limit} must be at least 1")
    if args.plugin:
        import_plugin(args.plugin)
    position = parse_position(args.sampling_points) if args.sampling_points else None
    sources = find_images(args.images)[0][: args.limit]
    if args.output and Path(args.output).exists() and not Path(args.output).is_dir():
        raise ValueError(f"`output` {args.output} is not a folder")
    predictor = load(args.resume, device=args.device, raw=args.raw_weights, allow_http=args.allow_http)
    check_points(predictor, salient_points=args.salient_points, sampling_points=position)
    truth = read_truth(args.annotations, sources, predictor) if args.annotations else {}
    if not predictor.has_names:
        log(f"{args.resume} does not name its {predictor.categories.num_classes} classes; they are drawn as numbers")

    points = {"salient_points": args.salient_points, "sampling_points": position}
    for source in progress(sources, description="images", every=50):
        source, *expected = truth.get(source.name, (source,))
        found, pictures = explain(predictor, source.held(), threshold=args.threshold, **points)
        picture = found.draw()
        if expected:
            boxes, labels = expected
            names = predictor.categories.names
            right = draw_detections(found.image, boxes=boxes, labels=labels, scores=None, class_names=names)
            picture = contact_sheet([[picture, right]], [["detections", "ground truth"]])
        folder = Path(args.output) if args.output else source.folder
        folder.mkdir(parents=True, exist_ok=True)
        save_picture(picture, folder / f"{DRAWN}{source.name}")
        for kind, picture in pictures.items():
            save_picture(picture, folder / f"{DRAWN}{kind}_{Path(source.name).stem}.png")
    log(f"{len(sources)} picture(s) in {args.output or 'the folder of the images'}, named {DRAWN}*")


def read_truth(file: str, sources: Sequence[Source], predictor: Predictor) -> dict[str, tuple[Source, Tensor, Tensor]]:
    """By file name: image, boxes (n, 4) in pixels and labels (n,) of the images that the annotation file knows."""
    dataset = CocoDetection(
        image_folder=sources[0].folder,
        annotation_file=file,
        transforms=EvalTransforms(),
        train=True,  # one for evaluation requires that all images of the file are there
        categories=predictor.categories if predictor.has_names else None,
    )
    wanted, truth = {source.name: source for source in sources}, {}
    for index, record in enumerate(dataset.images):
        if record.file_name in wanted:
            image = dataset.read_image(index)  # in the frame of its boxes
            _, target = dataset[index]
            boxes = cxcywh_to_xyxy(target["boxes"]) * torch.tensor([image.width, image.height] * 2)
            source = replace(wanted[record.file_name], read=partial(dataset.read_image, index))
            truth[record.file_name] = source, boxes, target["labels"]
    return truth


if __name__ == "__main__":
    sys.exit(main())
