"""MSDeformAttn: multi-scale deformable attention with its projections (Zhu et al., Deformable DETR, ICLR 2021)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from samdetr.models.ops.exporting import exporting
from samdetr.models.ops.ms_deform_attn import check_level_shapes, ms_deform_attn
from samdetr.models.ops.ms_deform_attn.plain import coordinate_dtype


class MSDeformAttn(nn.Module):
    """Every query looks, with every head, at a few points of every level, near its reference.

    Parameters have the published names and initial values:

        sampling_offsets.weight     0
        sampling_offsets.bias       head n looks along angle 2 pi n / heads; point p lies p + 1 cells away (largest
                                    of |x|, |y|), the same on every level
        attention_weights           0: all points count alike
        value_proj, output_proj     xavier uniform, bias 0
    """

    def __init__(self, *, hidden_dim: int, num_levels: int, num_heads: int, num_points: int):
        super().__init__()
        sizes = {"num_levels": num_levels, "num_heads": num_heads, "num_points": num_points}
        for name, number in sizes.items():
            if number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}")
        if hidden_dim < 1 or hidden_dim % num_heads:
            raise ValueError(f"hidden_dim: {hidden_dim} is no multiple of num_heads, {num_heads}")
        self.num_levels, self.num_heads, self.num_points = num_levels, num_heads, num_points
        self.sampling_offsets = nn.Linear(hidden_dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(hidden_dim, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(hidden_dim, hidden_dim)
        self.output_proj = nn.Linear(hidden_dim, hidden_dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the table above. Call it again where a later pass over all matrices of a model has overwritten it."""
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)  # (heads, 2), on a square around the centre
        distances = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        ring = directions[:, None, None] * distances[:, None]  # (heads, 1, points, 2)
        self.sampling_offsets.bias.copy_(ring.expand(-1, self.num_levels, -1, -1).flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference: Tensor,
        value: Tensor,
        level_shapes: Sequence[tuple[int, int]],
        padding: Tensor | None = None,
    ) -> Tensor:
        """Attends -> (B, Q, hidden_dim).

        Args:
            query: (B, Q, hidden_dim), content plus position.
            reference: (B, Q, levels, 2), x, y as fractions of each level's padded map: offsets are in its cells; or
                (B, Q, levels, 4), with width and height: offsets are in halves of the box, divided by the points.
            value: (B, L, hidden_dim), the levels' cells in rows, one level after the other.
            level_shapes: height and width of each level, Python ints.
            padding: (B, L), True at cells that count as zeros (no renormalisation of the weights, as published).
        """
        hidden_dim = self.value_proj.in_features
        for name, tensor in (("query", query), ("value", value)):
            if tensor.ndim != 3 or tensor.shape[2] != hidden_dim:
                raise ValueError(f"{name}: expected 3 dimensions, the last of {hidden_dim}, got {tuple(tensor.shape)}")
        check_level_shapes(level_shapes, value.shape[1])
        self._check_reference(query, reference, level_shapes)
        value = self.value_proj(value)
        if padding is not None and (padding.shape != value.shape[:2] or padding.dtype != torch.bool):
            expected = f"{tuple(value.shape[:2])} of torch.bool"
            raise ValueError(f"padding: expected {expected}, got {tuple(padding.shape)} of {padding.dtype}")
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0)
        value = value.unflatten(-1, (self.num_heads, -1))
        locations, weights = self.locate(query, reference, level_shapes), self.weigh(query)
        return self.output_proj(ms_deform_attn(value, level_shapes, locations, weights))

    def locate(self, query: Tensor, reference: Tensor, level_shapes: Sequence[tuple[int, int]]) -> Tensor:
        """Where the heads look -> (B, Q, heads, levels, points, 2), as fractions of each level's padded map."""
        self._check_reference(query, reference, level_shapes)
        offsets = self.sampling_offsets(query)
        dtype = coordinate_dtype(offsets)  # with 16 bits, points would miss their cells
        offsets = offsets.to(dtype).unflatten(-1, (self.num_heads, self.num_levels, self.num_points, 2))
        reference = reference.to(dtype)[:, :, None, :, None]  # (B, Q, 1, levels, 1, 2 or 4)
        if reference.shape[-1] == 2:
            # An exported file may take other sizes; a CUDA graph cannot read memory of the host again.
            if exporting() or (query.is_cuda and torch.cuda.is_current_stream_capturing()):
                one = offsets.new_ones(())
                sizes = torch.stack([one * size for height, width in level_shapes for size in (width, height)])
                return reference + offsets / sizes.view(-1, 2)[:, None]
            sizes = torch.tensor([(width, height) for height, width in level_shapes], dtype=dtype)
            # From ordinary memory a non_blocking copy waits for nothing on the device, a plain one does.
            return reference + offsets / sizes.to(query.device, non_blocking=True)[:, None]
        return reference[..., :2] + offsets / self.num_points * reference[..., 2:] * 0.5

    def weigh(self, query: Tensor) -> Tensor:
        """How much each point counts -> (B, Q, heads, levels, points), each head's summing to 1."""
        weights = self.attention_weights(query)
        weights = weights.to(coordinate_dtype(weights)).unflatten(-1, (self.num_heads, -1)).softmax(-1)
        return weights.unflatten(-1, (self.num_levels, self.num_points))

    def _check_reference(self, query: Tensor, reference: Tensor, level_shapes: Sequence[tuple[int, int]]) -> None:
        batch, queries, _ = query.shape
        if len(level_shapes) != self.num_levels:
            raise ValueError(f"level_shapes: expected {self.num_levels} levels, got {level_shapes}")
        if reference.shape[:-1] != (batch, queries, self.num_levels) or reference.shape[-1] not in (2, 4):
            raise ValueError(
                f"reference: expected {(batch, queries, self.num_levels)} with 2 or 4 numbers each, "
                f"got {tuple(reference.shape)}"
            )
