"""Fewer bits: float16 and int8, and the AP that they cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from samdetr.datasets.categories import Categories
from samdetr.datasets.coco_eval import CocoEvaluator
from samdetr.datasets.ground_truth import GroundTruth
from samdetr.inference.detections import Detections
from samdetr.inference.engines import need

Calibration = Sequence[Tensor]  # batches (1, 3, H, W) of normalised images
# What is computed in 16 bits. Boxes, position encodings and sampling weights need theirs.
PRODUCTS = ("Conv", "MatMul", "Gemm")


def halve(file: Path) -> None:
    """Products, and their weights, in float16; all else, and what goes in and comes out, in float32."""
    onnx = need("onnx", what="`half`")
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = onnx.load(file)
    kinds = {node.op_type for node in model.graph.node}
    model = convert_float_to_float16(model, keep_io_types=True, op_block_list=sorted(kinds - {*PRODUCTS}))
    onnx.save(model, file)


def quantise(file: Path, images: Calibration) -> None:
    """Convolutions in int8, with scales from these images. Linear layers in int8, too, cost the quick start's network
    0.17 of its AP, convolutions alone nothing."""
    need("onnxruntime", "onnx", what="`int8`")
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(images)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.rest, None)
            return None if batch is None else {"images": batch.numpy()}

    quant_pre_process(file, file, skip_symbolic_shape=True)  # convolutions take up the norms behind them
    quantize_static(
        file,
        file,
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def average_precision(
    found: Sequence[Detections], ids: Sequence[int], truth: GroundTruth, categories: Categories
) -> dict[str, float]:
    """COCO's metrics of the detections in images of these ids."""
    evaluator = CocoEvaluator(truth, categories)
    evaluator.update(
        {i: {"scores": each.scores, "labels": each.labels, "boxes": each.boxes} for i, each in zip(ids, found)}
    )
    return evaluator.summarize()


def as_truth(found: Sequence[Detections], categories: Categories) -> GroundTruth:
    """Detections in the images 0, 1, ... as what others are measured by."""
    rows = [row for index, each in enumerate(found) for row in each.to_coco(index)]
    boxes = np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)
    return GroundTruth(
        images=np.arange(len(found)),
        categories=np.array(sorted(categories.category_ids.values()), np.int64),
        image_ids=np.array([row["image_id"] for row in rows], np.int64),
        category_ids=np.array([row["category_id"] for row in rows], np.int64),
        boxes=boxes,
        areas=boxes[:, 2] * boxes[:, 3],
        crowd=np.zeros(len(rows), bool),
    )
