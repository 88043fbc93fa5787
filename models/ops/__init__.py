"""Multi-scale deformable attention: a module, a function, and compiled kernels where a compiler is found; further
kernels for the CPU."""

from samdetr.models.ops.functional import ms_deform_attn as ms_deform_attn
from samdetr.models.ops.kernels import plain_path as plain_path
from samdetr.models.ops.module import MSDeformAttn as MSDeformAttn
