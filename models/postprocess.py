"""From the detector's dict to detections in pixels."""

from typing import Any

import torch
from torch import Tensor

from samdetr.util.box_ops import cxcywh_to_xyxy


@torch.no_grad()
def postprocess(outputs: dict[str, Any], orig_sizes: Tensor, *, top_k: int = 100) -> list[dict[str, Tensor]]:
    """The best (query, class) pairs of each image.

    Args:
        outputs: `pred_logits` (B, Q, classes) and `pred_boxes` (B, Q, 4).
        orig_sizes: (B, 2), height and width of the images in pixels.
        top_k: at most this number; fewer if there are fewer pairs.
    Returns:
        For each image `scores`, `labels`, `queries` (k,) and `boxes` (k, 4) as left, top, right, bottom in pixels,
        best first. `queries` are the indices of the queries. Boxes are not clipped, as published.
    """
    return in_pixels(best_detections(outputs, top_k=top_k), orig_sizes)


def best_detections(outputs: dict[str, Any], *, top_k: int) -> dict[str, Tensor]:
    """The same of all images at once: `scores`, `labels`, `queries` (B, k); `boxes` (B, k, 4) relative to the image."""
    scores = outputs["pred_logits"].sigmoid().flatten(1)  # (B, Q * classes)
    scores, best = scores.topk(min(top_k, scores.shape[1]), dim=1)
    num_classes = outputs["pred_logits"].shape[-1]
    queries, labels = best // num_classes, best % num_classes
    boxes = cxcywh_to_xyxy(outputs["pred_boxes"]).gather(1, queries[..., None].expand(-1, -1, 4))
    return {"scores": scores, "labels": labels, "queries": queries, "boxes": boxes}


def in_pixels(found: dict[str, Tensor], orig_sizes: Tensor) -> list[dict[str, Tensor]]:
    """What `best_detections` returns, image by image, with boxes in pixels of images of these sizes (B, 2), height and
    width."""
    boxes = found["boxes"] * orig_sizes.flip(1).repeat(1, 2)[:, None].to(found["boxes"])
    return [dict(zip(found, values)) for values in zip(*{**found, "boxes": boxes}.values())]
