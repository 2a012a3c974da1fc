"""The operators of introkernels/ops/schema.py, on Triton kernels."""

from __future__ import annotations

from torch import Tensor

from introkernels.ops.head.operators import ChunkedHead
from introkernels.ops.indices import check_indices
from introkernels.ops.options import LabelOptions, LossOptions
from introkernels.ops.triton import introspective, losses
from introkernels.ops.triton.losses import Teacher
from introkernels.ops.triton.statistics import explanation_stats

__all__ = [
    "distillation_backward",
    "distillation_forward",
    "explanation_stats",
    "introspective_forward",
    "linear_backward",
    "linear_forward",
    "similarity_backward",
    "similarity_forward",
]


def distillation_forward(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    temperature: float,
    ce_weight: float,
    kl_weight: float,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
) -> tuple[Tensor, ...]:
    check_indices(target, logits.shape[1], ignore_index)
    return losses.forward(
        logits,
        Teacher(teacher_logits),
        target,
        LossOptions(
            weight, temperature, ce_weight, kl_weight, ignore_index, label_smoothing, reduction
        ),
    )


def distillation_backward(
    grad_loss: Tensor,
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    row_state: Tensor,
    totals: Tensor,
    weight: Tensor | None,
    temperature: float,
    ce_weight: float,
    kl_weight: float,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
) -> Tensor:
    return losses.backward(
        grad_loss,
        logits,
        Teacher(teacher_logits),
        target,
        row_state,
        totals,
        LossOptions(
            weight, temperature, ce_weight, kl_weight, ignore_index, label_smoothing, reduction
        ),
    )


def similarity_forward(
    logits: Tensor,
    target: Tensor,
    dots: Tensor,
    sq_norms: Tensor,
    class_index: Tensor | None,
    weight: Tensor | None,
    temperature: float,
    ce_weight: float,
    kl_weight: float,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    similarity_temperature: float,
    similarity: int,
    label_mode: int,
    non_target_mass: float,
) -> tuple[Tensor, ...]:
    check_indices(target, logits.shape[1], ignore_index, class_index)
    return losses.forward(
        logits,
        Teacher(dots, sq_norms, class_index),
        target,
        LossOptions(
            weight, temperature, ce_weight, kl_weight, ignore_index, label_smoothing, reduction
        ),
        LabelOptions(similarity_temperature, similarity, label_mode, non_target_mass),
    )


def similarity_backward(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    dots: Tensor,
    sq_norms: Tensor,
    class_index: Tensor | None,
    row_state: Tensor,
    totals: Tensor,
    weight: Tensor | None,
    temperature: float,
    ce_weight: float,
    kl_weight: float,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    similarity_temperature: float,
    similarity: int,
    label_mode: int,
    non_target_mass: float,
) -> Tensor:
    return losses.backward(
        grad_loss,
        logits,
        Teacher(dots, sq_norms, class_index),
        target,
        row_state,
        totals,
        LossOptions(
            weight, temperature, ce_weight, kl_weight, ignore_index, label_smoothing, reduction
        ),
        LabelOptions(similarity_temperature, similarity, label_mode, non_target_mass),
    )


def introspective_forward(
    logits: Tensor,
    target: Tensor,
    gradients: Tensor,
    inputs: Tensor,
    class_index: Tensor | None,
    center: bool,
    weight: Tensor | None,
    temperature: float,
    ce_weight: float,
    kl_weight: float,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    similarity_temperature: float,
    similarity: int,
    label_mode: int,
    non_target_mass: float,
) -> tuple[Tensor, ...]:
    check_indices(target, logits.shape[1], ignore_index, class_index)
    return introspective.forward(
        logits,
        target,
        gradients,
        inputs,
        class_index,
        center,
        LossOptions(
            weight, temperature, ce_weight, kl_weight, ignore_index, label_smoothing, reduction
        ),
        LabelOptions(similarity_temperature, similarity, label_mode, non_target_mass),
    )


_head = ChunkedHead(similarity_forward, similarity_backward)
linear_forward, linear_backward = _head.linear_forward, _head.linear_backward
