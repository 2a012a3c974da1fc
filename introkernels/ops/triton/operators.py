"""The operators of introkernels/ops/schema.py, on Triton kernels."""

from __future__ import annotations

from introkernels.ops.composite import teacher_logits
from introkernels.ops.head.operators import chunk_loss_of, chunked_linear
from introkernels.ops.triton.losses import row_loss_backward, row_loss_forward
from introkernels.ops.triton.statistics import explanation_stats, introspective_forward

__all__ = [
    "explanation_stats",
    "introspective_forward",
    "linear",
    "row_loss_backward",
    "row_loss_forward",
    "teacher_logits",
]

linear = chunked_linear(chunk_loss_of(row_loss_forward, row_loss_backward))
