"""The method's own operators, each with a plain PyTorch form and compiled kernels where they pay: multi-scale
deformable attention, sampling in boxes, and attention with a separable prior."""

from samdetr.models.ops.kernels import plain_path as plain_path
from samdetr.models.ops.module import MSDeformAttn as MSDeformAttn
from samdetr.models.ops.ms_deform_attn import ms_deform_attn as ms_deform_attn
from samdetr.models.ops.prior_attention import prior_attention as prior_attention
from samdetr.models.ops.roi_sampling import roi_sampling as roi_sampling
