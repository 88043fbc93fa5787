"""Detect objects in images and videos, draw them, and write them as JSON.

    python demo.py --resume output/run/checkpoint.pth --images photos clip.mp4 --output drawn
    python demo.py --resume output/run/checkpoint.pth --images photo.jpg --output drawn --salient_points
    python demo.py --resume output/multiscale/checkpoint.pth --sampling_points 0.5,0.5
    python demo.py --resume output/run/checkpoint.pth --images 0      the first camera, until Ctrl-C

Prints a line for each image. Writes det_res_NAME for every image; detections.json (COCO results) and images.json (their
images and classes); for every video an annotated one and the detections of each frame. The network, its classes and the
size of its input come from the checkpoint.

Exit status: 0; 2 after one line about wrong input, files that could not be read included; 130 after Ctrl-C, with what
was done until then.
"""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback if Ctrl-C comes while the imports run

import argparse
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePath

import torch

from samdetr.cli import import_plugin
from samdetr.datasets.coco import CocoDetection
from samdetr.datasets.transforms import EvalTransforms
from samdetr.inference.batch import Truth, Work, stoppable
from samdetr.inference.detections import check_threshold, picture_path
from samdetr.inference.explain import check_points, parse_position
from samdetr.inference.outputs import DETECTIONS, IMAGES, OutputFolder, output_names
from samdetr.inference.predictor import Predictor, load
from samdetr.inference.sources import DRAWN, SUFFIXES, VIDEOS, Source, find_files, from_file, from_url, is_url, name_of
from samdetr.inference.video import Video, video_of
from samdetr.util.box_ops import cxcywh_to_xyxy
from samdetr.util.command_line import as_flags, run_command
from samdetr.util.logger import describe_by, log, printable

INTERRUPTED = 130  # as of shells: 128 + SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "demo.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--resume", required=True, help="checkpoint: a file or URL, ours or an official one")
    parser.add_argument("--allow_http", action="store_true", help="fetch URLs over http from other machines, too")
    parser.add_argument("--raw_weights", action="store_true", help="not the averaged weights of --ema, if any")
    parser.add_argument(
        "--images",
        default=["images"],
        nargs="+",
        help='images or videos: files, folders, patterns like "photos/*.jpg", URLs; a number is a camera',
    )
    parser.add_argument("--output", default="", help="folder for what is written; empty: a new one, output/predict")
    parser.add_argument("--overwrite", action="store_true", help="replace files in --output that others have written")
    parser.add_argument("--threshold", default=0.5, type=float, help="least score of a detection that counts")
    parser.add_argument(
        "--nms",
        type=float,
        metavar="IOU",
        help="keep only the best of boxes of one class that overlap by more than this, from 0 to 1; default: keep all",
    )
    parser.add_argument(
        "--limit", default=None, type=int, help="only the first N images and videos, N frames of each", metavar="N"
    )
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
    describe_by(describe)
    try:
        return run_command("demo.py", lambda: run(args), describe)
    finally:
        describe_by(str)


def describe(text: str) -> str:
    """A message with its arguments as flags."""
    return as_flags(text.replace("`source`", "--resume"))


def run(args: argparse.Namespace) -> int:
    """Everything after the command line. Returns the exit status. Raises ValueError."""
    check_threshold(args.threshold)
    if args.nms is not None:
        check_threshold(args.nms, name="nms")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"`limit` {args.limit} must be at least 1")
    if args.plugin:
        import_plugin(args.plugin)
    position = parse_position(args.sampling_points) if args.sampling_points else None
    found = find_inputs(args.images, allow_http=args.allow_http)[: args.limit]
    sources = [source for source in found if isinstance(source, Source)]
    videos = [source for source in found if isinstance(source, Video)]
    points = {"salient_points": args.salient_points, "sampling_points": position}
    if videos and (args.salient_points or position):
        raise ValueError(f"{printable(videos[0].name)} is a video; points are drawn in images alone, leave it out")
    kinds = [*(["points"] * args.salient_points), *(["sampling", "sampling_queries"] if position else [])]
    names = output_names([*map(_file_name, sources), *map(_file_name, videos)], kinds=kinds)
    stems = [PurePath(name).stem.removeprefix(DRAWN) for name in names[: len(sources)]]
    json_names = [DETECTIONS, IMAGES] if sources else []
    json_names += [PurePath(name).with_suffix(".json").name for name in names[len(sources) :]]
    folder = OutputFolder(args.output, overwrite=args.overwrite)
    folder.claim([*names, *json_names, *(f"{DRAWN}{kind}_{stem}.png" for kind in kinds for stem in stems)])

    predictor = load(args.resume, device=args.device, raw=args.raw_weights, allow_http=args.allow_http)
    predictor.nms = args.nms
    check_points(predictor, **points)
    truth = read_truth(args.annotations, sources, predictor) if args.annotations else {}
    if not predictor.has_names:
        log(f"{args.resume} does not name its {predictor.categories.num_classes} classes; they are drawn as numbers")

    work = Work(predictor, folder, threshold=args.threshold, truth=truth, points=points)
    try:
        with stoppable() as stopped:
            try:
                if sources:
                    work.images(sources, names, stopped)
                for video, name in zip(videos, names[len(sources) :]):
                    if not stopped():
                        work.video(video, name, stopped, limit=args.limit)
            finally:
                work.finish(resume=args.resume, threshold=args.threshold, nms=args.nms, complete=not stopped())
    except BrokenPipeError:  # nobody reads what is printed
        raise
    except OSError as error:
        raise ValueError(f"cannot write to `output` {folder.path}: {error.strerror or error}") from None
    work.report()
    if stopped():
        log("stopped by Ctrl-C; what was done is written")
        return INTERRUPTED
    if work.faults:
        unread = ", ".join([*[name for name, _ in work.faults[:5]], *(["..."] if len(work.faults) > 5 else [])])
        raise ValueError(f"{len(work.faults)} of {len(found)} could not be read (see the lines above): {unread}")
    return 0


def find_inputs(items: Sequence[str], *, allow_http: bool) -> list[Source | Video]:
    """What the words after --images stand for, each file once. Raises ValueError."""
    found: list[Source | Video] = []
    seen: set[Path] = set()
    for item in items:
        if is_url(item):
            is_video = PurePath(name_of(item)).suffix.lower() in VIDEOS
            found.append((video_of if is_video else from_url)(item, allow_http=allow_http))
        elif item.isascii() and item.isdecimal() and not Path(item).exists():
            found.append(video_of(int(item)))
        else:
            for path in find_files(Path(item), SUFFIXES | VIDEOS)[0]:
                where = path.absolute()
                if where not in seen:
                    seen.add(where)
                    found.append(video_of(path) if path.suffix.lower() in VIDEOS else from_file(path))
    return found


def _file_name(source: Source | Video) -> str:
    """The name of what is written for it, before `det_res_`."""
    if isinstance(source, Video):
        return PurePath(source.name).with_suffix(".mp4").name
    return picture_path(source.name).name


def read_truth(file: str, sources: Sequence[Source], predictor: Predictor) -> Truth:
    """Objects of the images that the annotation file knows; its file names are relative to the folder of the first."""
    folder = sources[0].folder if sources else Path()
    dataset = CocoDetection(
        image_folder=folder,
        annotation_file=file,
        transforms=EvalTransforms(),
        train=True,  # one for evaluation requires that all images of the file are there
        categories=predictor.categories if predictor.has_names else None,
    )
    wanted = {source.path: source for source in sources}
    truth: Truth = {}
    for index, record in enumerate(dataset.images):
        path = folder / record.file_name
        if path in wanted:
            with suppress(ValueError):  # an image that cannot be read, as prediction will say
                image = dataset.read_image(index)  # in the frame of its boxes
                _, target = dataset[index]
                boxes = cxcywh_to_xyxy(target["boxes"]) * torch.tensor([image.width, image.height] * 2)
                source = replace(wanted[path], read=partial(dataset.read_image, index))
                truth[path] = source, boxes, target["labels"], record.id
    return truth


if __name__ == "__main__":
    sys.exit(main())
