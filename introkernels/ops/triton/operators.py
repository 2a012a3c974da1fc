"""The operators of introkernels/ops/schema.py, on Triton kernels."""

from __future__ import annotations

from introkernels.ops.composite import teacher_logits
from introkernels.ops.head.operators import (
    chunk_loss_of,
    chunked_linear,
    chunked_linear_distillation,
)
from introkernels.ops.triton.losses import row_loss_backward, row_loss_forward
from introkernels.ops.triton.statistics import explanation_stats, introspective_forward

__all__ = [
    "explanation_stats",
    "introspective_forward",
    "linear",
    "linear_distillation",
    "row_loss_backward",
    "row_loss_forward",
    "teacher_logits",
]

_chunk_loss = chunk_loss_of(row_loss_forward, row_loss_backward)
linear = chunked_linear(_chunk_loss)
linear_distillation = chunked_linear_distillation(_chunk_loss)
