"""SAP-DETR's salient points: a fixed grid, each point movable within its cell, and boxes as distances from points.

Legend: B batch, Q queries. Points are x, y and distances left, top, right, bottom, in widths and heights of the image.
"""

import math

import torch
from torch import Tensor

from samdetr.models.layers import inverse_sigmoid

# Clamps logits: a coordinate of 0 becomes 0.001, not 0.00001 as in the other families.
EPS = 1e-3
PUBLISHED_QUERIES = 306


def grid_shape(num_queries: int) -> tuple[int, int]:
    """Columns and rows of the grid. Raises ValueError for a number that makes no grid."""
    if num_queries == PUBLISHED_QUERIES:
        return 18, 17
    side = math.isqrt(num_queries)
    if side * side != num_queries:
        raise ValueError(
            f"`num_queries` {num_queries} makes no grid of points: it must be {PUBLISHED_QUERIES} (18 x 17) or a "
            f"square number, e.g. {side * side} or {(side + 1) ** 2}"
        )
    return side, side


def grid_cell(num_queries: int) -> tuple[float, float]:
    """Width and height of a cell of the grid. Raises ValueError."""
    columns, rows = grid_shape(num_queries)
    return 1 / columns, 1 / rows


def grid_logits(num_queries: int) -> Tensor:
    """Logits (Q, 2) of the points, row by row; they start in the top left corners of their cells. Raises ValueError."""
    columns, rows = grid_shape(num_queries)
    y, x = torch.meshgrid(torch.arange(rows) / rows, torch.arange(columns) / columns, indexing="ij")
    return inverse_sigmoid(torch.stack([x, y], -1).flatten(0, 1), EPS)


def move_points(offset: Tensor, points: Tensor, start: Tensor, cell: Tensor) -> Tensor:
    """Points moved by offsets (B, Q, 2), right and down from their `start` and less than `cell` (2,).

    As published, the distance that a point has moved is not divided by the cell before the offset is added to its
    logit. With an offset of 0 a point therefore moves back, to about its share of the cell times the cell.
    """
    return start + cell * (offset + inverse_sigmoid(points - start, EPS)).sigmoid()


def move_sides(offset: Tensor, distances: Tensor) -> Tensor:
    """Distances changed by offsets (B, Q, 4) of their logits."""
    return (offset + inverse_sigmoid(distances, EPS)).sigmoid()


def boxes_around(points: Tensor, distances: Tensor) -> Tensor:
    """Boxes (B, Q, 4) as cx, cy, w, h, their sides at the given distances from the points; they may leave the image."""
    near, far = distances[..., :2], distances[..., 2:]
    return torch.cat([points + (far - near) / 2, near + far], -1)


def corners_around(points: Tensor, distances: Tensor) -> Tensor:
    """The same as left, top, right, bottom."""
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], -1)
