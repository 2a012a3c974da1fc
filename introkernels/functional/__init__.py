"""The public losses: check the call, choose the operators, apply the autograd Function.

All functions take tensors of any strides in float64, float32, bfloat16 or float16, where float32
and the half types mix. They never write to their arguments and accumulate in float32 at least.
"""

from introkernels.functional.distillation import distillation_loss
from introkernels.functional.introspective import introspective_loss
from introkernels.functional.linear import linear_introspective_loss
from introkernels.functional.linear_distillation import linear_distillation_loss
from introkernels.functional.similarity import similarity_loss
from introkernels.functional.statistics import explanation_stats

__all__ = [
    "distillation_loss",
    "explanation_stats",
    "introspective_loss",
    "linear_distillation_loss",
    "linear_introspective_loss",
    "similarity_loss",
]
