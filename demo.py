"""Detect objects in images and draw them.

    python demo.py --resume output/run/checkpoint.pth                        every image of ./images
    python demo.py --resume output/run/checkpoint.pth --images photo.jpg --output drawn --salient_points
    python demo.py --resume output/multiscale/checkpoint.pth --sampling_points 0.5,0.5

Writes det_res_NAME for every image. The network, its classes and the size of its input come from the checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from samdetr.datasets.categories import Categories
from samdetr.datasets.coco import CocoDetection
from samdetr.datasets.images import read_image
from samdetr.datasets.transforms import EvalTransforms
from samdetr.inference.watch import Sampling, cell_of, watch, watch_sampling
from samdetr.main import build_parser, checkpoint_categories, choose_device, chosen_weights, take_network_settings
from samdetr.models.build import build_model, read_checkpoint
from samdetr.models.ops import MSDeformAttn
from samdetr.models.sap_detr.decoder import SAPDecoder
from samdetr.models.semantics_aligner import SemanticsAligner
from samdetr.util.box_ops import cxcywh_to_xyxy
from samdetr.util.checkpoint import load_weights
from samdetr.util.command_line import run_command
from samdetr.util.files import whole_file
from samdetr.util.logger import log, progress
from samdetr.util.padded_images import pad_images
from samdetr.util.visualize import contact_sheet, draw_detections, side_by_side
from samdetr.util.visualize_points import draw_salient_points, draw_sampling_points, sampling_sheet, view_around

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"}
PREFIX = "det_res_"
MOST_QUERIES = 6  # rows of a picture of points


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "demo.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--resume", required=True, help="checkpoint: a file or URL, ours or an official one")
    parser.add_argument(
        "--raw_weights", action="store_true", help="not the averaged ones of --ema, where there are some"
    )
    parser.add_argument("--images", default="images", help="an image, or a folder of images")
    parser.add_argument("--output", default="", help="folder for the pictures; empty: beside the images")
    parser.add_argument("--threshold", default=0.5, type=float, help="least score of a detection that is drawn")
    parser.add_argument("--limit", default=None, type=int, help="draw the first so many images only")
    parser.add_argument("--annotations", default="", help="COCO annotation file; its boxes are drawn beside")
    parser.add_argument("--salient_points", action="store_true", help="also draw where each shown query looks")
    parser.add_argument(
        "--sampling_points",
        default="",
        metavar="{X,Y,best}",
        help="also draw where the encoder's deformable attention looks from this place, in fractions of width and "
        "height (0.5,0.5: the middle), or from the centre of the best detection; and the decoder's, where it has one",
    )
    parser.add_argument("--device", default="auto", help="auto: a GPU where there is one")
    args = parser.parse_args(argv)
    return run_command("demo.py", lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Everything after the command line. Raises ValueError."""
    if not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold {args.threshold} is not between 0 and 1")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit} must be at least 1")
    position = parse_position(args.sampling_points) if args.sampling_points else None
    paths = find_images(Path(args.images))[: args.limit]
    if args.output and Path(args.output).exists() and not Path(args.output).is_dir():
        raise ValueError(f"--output {args.output} is not a folder")
    device = choose_device(args.device)

    checkpoint = read_checkpoint(args.resume)
    settings = build_parser().parse_args([])
    take_network_settings(settings, set(), checkpoint)
    network, _, postprocess = build_model(settings)
    load_weights(network, chosen_weights(checkpoint, raw=args.raw_weights), source=args.resume)
    network.to(device).eval()
    if args.salient_points and not any(_has(network, kind) for kind in SALIENT):
        raise ValueError(f"--salient_points: the network of {args.resume} has none, it is a {settings.model}")
    if args.sampling_points and not _has(network.encoder, MSDeformAttn):
        raise ValueError(
            f"--sampling_points: the encoder of {args.resume} has no deformable attention; "
            "pass a multi-scale SAM-DETR or a Deformable DETR"
        )
    transforms = EvalTransforms(short_side=settings.eval_size, max_size=settings.max_size)
    categories = checkpoint_categories(checkpoint)
    truth = read_truth(args.annotations, paths, categories, transforms) if args.annotations else {}
    if categories is None:
        log(f"{args.resume} does not name its {settings.num_classes} classes; they are drawn as numbers")
        categories = Categories(num_classes=settings.num_classes, category_ids={}, names={})

    for path in progress(paths, description="images", every=50):
        image = truth[path.name][0] if path.name in truth else open_image(path)
        tensor = transforms(image)
        with ExitStack() as hooks:
            seen = [hooks.enter_context(watch(network, kind, look)) for kind, look in SALIENT.items()]
            found = detect(network, postprocess, tensor, image.size, device)
        layers = [layer for calls in seen for call in calls for layer in call]
        # A class head has outputs for the gaps between category ids too.
        keep = found["scores"] >= args.threshold
        if categories.names:
            keep &= torch.isin(found["labels"], torch.tensor(list(categories.names)))
        found = {name: value[keep] for name, value in found.items()}

        folder = Path(args.output) if args.output else path.parent
        folder.mkdir(parents=True, exist_ok=True)
        picture = draw_detections(
            image, boxes=found["boxes"], labels=found["labels"], scores=found["scores"], class_names=categories.names
        )
        if path.name in truth:
            _, boxes, labels = truth[path.name]
            right = draw_detections(image, boxes=boxes, labels=labels, scores=None, class_names=categories.names)
            picture = side_by_side(picture, right, ("detections", "ground truth"))
        save(picture, folder / f"{PREFIX}{path.name}")
        if args.salient_points and len(found["scores"]):
            save(draw_points(image, found, layers, categories.names), folder / f"{PREFIX}points_{path.stem}.png")
        if args.sampling_points and (position or len(found["scores"])):
            where = position or (found["boxes"][0].view(2, 2).mean(0) / torch.tensor(image.size)).tolist()
            # Once more: of which positions and queries to keep the points is known only now, and all are too many.
            best = found["queries"][:MOST_QUERIES]
            with (
                watch_sampling(network.encoder, cell_of(where)) as encoder_layers,
                watch_sampling(network.decoder, lambda *_, queries=best: queries) as decoder_layers,
            ):
                detect(network, postprocess, tensor, image.size, device)
            save(draw_sampling(image, encoder_layers), folder / f"{PREFIX}sampling_{path.stem}.png")
            if decoder_layers and len(best):
                picture = draw_query_sampling(image, found, decoder_layers, categories.names)
                save(picture, folder / f"{PREFIX}sampling_queries_{path.stem}.png")
    log(f"{len(paths)} picture(s) in {args.output or 'the folder of the images'}, named {PREFIX}*")


def parse_position(text: str) -> tuple[float, float] | None:
    """The value of --sampling_points: x and y in [0, 1], or None for the best detection. Raises ValueError."""
    if text == "best":
        return None
    try:
        x, y = (float(number) for number in text.split(","))
        if 0 <= x <= 1 and 0 <= y <= 1:
            return x, y
    except ValueError:
        pass
    raise ValueError(f"--sampling_points {text} is neither X,Y, two numbers between 0 and 1 like 0.5,0.5, nor best")


def find_images(source: Path) -> list[Path]:
    """The image itself, or the images of a folder, without what this program wrote there. Raises ValueError."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise ValueError(f"--images {source}: no such file or folder")
    paths = sorted(p for p in source.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith((PREFIX, ".")))
    if not paths:
        raise ValueError(f"--images {source} holds no image ({', '.join(sorted(SUFFIXES))})")
    return paths


def open_image(path: Path) -> Image.Image:
    try:
        return read_image(path)
    except Exception as error:  # PIL raises many kinds for a broken file
        raise ValueError(f"{path} cannot be read ({' '.join(str(error).split())}); replace or remove it") from error


def read_truth(
    file: str, paths: Sequence[Path], categories: Categories | None, transforms: EvalTransforms
) -> dict[str, tuple[Image.Image, Tensor, Tensor]]:
    """By file name: image, boxes (n, 4) in pixels and labels (n,) of the images that the annotation file knows."""
    dataset = CocoDetection(
        image_folder=paths[0].parent, annotation_file=file, transforms=transforms, train=False, categories=categories
    )
    wanted = {path.name for path in paths}
    truth = {}
    for index, record in enumerate(dataset.images):
        if record.file_name in wanted:
            _, target = dataset[index]
            image = dataset.read_image(index)
            boxes = cxcywh_to_xyxy(target["boxes"]) * torch.tensor([image.width, image.height] * 2)
            truth[record.file_name] = image, boxes, target["labels"]
    return truth


@torch.no_grad()
def detect(
    network: nn.Module, postprocess: Any, tensor: Tensor, size: tuple[int, int], device: torch.device
) -> dict[str, Tensor]:
    """Detections in one transformed image, in pixels of a picture of `size` (width, height), on the CPU."""
    outputs = network(pad_images([tensor]).to(device))
    (found,) = postprocess(outputs, torch.tensor([size[::-1]], device=device))
    return {name: value.cpu() for name, value in found.items()}


def _has(part: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(module, kind) for module in part.modules())


# Salient points of decoder layers, as reference boxes (Q, 4), cx, cy, w, h, and points (Q, P, 2) relative to the image.
Layers = list[tuple[Tensor, Tensor]]


def see_aligner(aligner: SemanticsAligner, arguments: dict[str, Any], aligned: Any) -> Layers:
    """The points that a layer found in the boxes that it was given."""
    return [(arguments["boxes"][0].cpu(), aligned.points[0].cpu())]


def see_sap_decoder(decoder: SAPDecoder, arguments: dict[str, Any], predictions: list[dict[str, Tensor]]) -> Layers:
    """Every layer's point, with the box around it."""
    return [(layer["pred_boxes"][0].cpu(), layer["pred_points"][0, :, None].cpu()) for layer in predictions]


SALIENT: dict[type[nn.Module], Any] = {SemanticsAligner: see_aligner, SAPDecoder: see_sap_decoder}


def best_queries(
    found: dict[str, Tensor], names: dict[int, str], *, columns: int
) -> Iterator[tuple[int, int, list[str]]]:
    """For each of the best detections: its row, its query, and captions of a column for each layer."""
    best = zip(*(found[key][:MOST_QUERIES].tolist() for key in ("queries", "labels", "scores")))
    for row, (query, label, score) in enumerate(best):
        title = f"{names.get(label, label)} {score:.2f}, query {query}"
        yield row, query, [f"{title}, layer {layer + 1}" for layer in range(columns)]


def draw_points(image: Image.Image, found: dict[str, Tensor], layers: Layers, names: dict[int, str]) -> Image.Image:
    """A row for each of the best detections, a column for each decoder layer."""
    size = torch.tensor([image.width, image.height])
    rows, captions = [], []
    for _, query, titles in best_queries(found, names, columns=len(layers)):
        boxes = torch.stack([cxcywh_to_xyxy(box[query]) * size.repeat(2) for box, _ in layers])  # (layers, 4)
        view = view_around(boxes, size=image.size)
        rows.append(
            [draw_salient_points(image, box=b, points=p[query] * size, view=view) for b, (_, p) in zip(boxes, layers)]
        )
        captions.append(titles)
    return contact_sheet(rows, captions)


def draw_query_sampling(
    image: Image.Image, found: dict[str, Tensor], layers: list[Sampling], names: dict[int, str]
) -> Image.Image:
    """A row for each of the best detections, of which `layers` have the points; a column for each decoder layer."""
    size = torch.tensor(image.size)
    rows, captions = [], []
    for row, _, titles in best_queries(found, names, columns=len(layers)):
        references = torch.stack([layer.reference[row, 0, :2] for layer in layers]) * size
        places = torch.stack([layer.points[row].flatten(1, 2) for layer in layers]) * size  # (layers, heads, n, 2)
        areas = torch.stack([layer.weights[row].flatten(1) for layer in layers]) * places.shape[2]
        seen = torch.cat([places.flatten(0, 2).clamp(min=0).minimum(size), references, found["boxes"][row].view(2, 2)])
        view = view_around(seen.repeat(1, 2), size=image.size, share=0.1)
        rows.append(
            [
                draw_sampling_points(image, reference=reference, points=points, areas=area, view=view)
                for reference, points, area in zip(references, places, areas)
            ]
        )
        captions.append(titles)
    return contact_sheet(rows, captions)


def draw_sampling(image: Image.Image, layers: list[Sampling]) -> Image.Image:
    """A column for each layer, of the one query that was watched."""
    size = torch.tensor(image.size)
    return sampling_sheet(
        image,
        references=torch.stack([layer.reference[0, 0, :2] for layer in layers]) * size,
        points=torch.stack([layer.points[0] for layer in layers]) * size,
        weights=torch.stack([layer.weights[0] for layer in layers]),
    )


def save(picture: Image.Image, path: Path) -> None:
    with whole_file(path) as temporary:
        picture.save(temporary, **({"quality": 92} if path.suffix.lower() in (".jpg", ".jpeg") else {}))


if __name__ == "__main__":
    sys.exit(main())
