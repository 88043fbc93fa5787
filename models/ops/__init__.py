"""Multi-scale deformable attention: a module, a function, and compiled kernels where a compiler is found."""

from models.ops.functional import ms_deform_attn as ms_deform_attn
from models.ops.module import MSDeformAttn as MSDeformAttn
from models.ops.registration import plain_path as plain_path
