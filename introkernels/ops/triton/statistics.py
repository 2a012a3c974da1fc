"""Launches of the explanation statistics, and of the loss that begins with them."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from introkernels.ops import composite
from introkernels.ops.indices import check_explained, check_indices
from introkernels.ops.schema import loss_dtype
from introkernels.ops.triton.kernels.introspective import introspective_forward_kernel
from introkernels.ops.triton.kernels.statistics import explanation_stats_kernel
from introkernels.ops.triton.launch import launch
from introkernels.ops.triton.losses import (
    SHORT_ROWS,
    allocate_outputs,
    variant,
    weight_arguments,
)
from introkernels.ops.triton.statistics_config import share
from introkernels.options import Options
from introkernels.types import SIMILARITIES

# Whose sums the last program adds up at once.
ROWS_AT_ONCE = 256


def explanation_stats(
    gradients: Tensor,
    inputs: Tensor,
    target: Tensor,
    class_index: Tensor | None,
    center: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Gradients may have any strides and are never copied.

    Indices are checked on the CPU and under ``INTROKERNELS_CHECK=1`` only; otherwise dots are NaN
    where the target is none of the row's classes.
    """
    check_explained(gradients, target, class_index, ignore_index)
    dots, sq_norms = _empty_statistics(gradients)
    if dots.shape[1] == 0:
        return dots, sq_norms
    work = share(gradients, inputs, center)
    launch(
        explanation_stats_kernel,
        (work.num_programs,),
        *work.arguments(
            target, class_index, dots, sq_norms, ignore_index, ticket=work.num_slices > 1
        ),
        SHAPE=work.shape,
        **work.options,
    )
    return dots, sq_norms


def introspective_forward(
    logits: Tensor,
    target: Tensor,
    gradients: Tensor,
    inputs: Tensor,
    class_index: Tensor | None,
    weight: Tensor | None,
    floats: list[float],
    ints: list[int],
) -> tuple[Tensor, ...]:
    options = Options.of(floats, ints)
    num_rows, num_classes = logits.shape
    check_indices(target, num_classes, options.ignore_index, class_index)
    if num_rows == 0:
        # Without rows there is no last program to write the sums.
        return composite.introspective_forward(
            logits, target, gradients, inputs, class_index, weight, floats, ints
        )
    teacher = logits.new_empty(logits.shape, dtype=loss_dtype(logits))
    work = share(gradients, inputs, options.center)
    outputs = allocate_outputs(logits, options.reduction, num_rows)
    constants = variant(logits, options)
    threads = 32 * work.options["num_warps"]
    launch(
        introspective_forward_kernel,
        (work.num_programs,),
        *work.arguments(
            target,
            class_index,
            *_empty_statistics(gradients),
            options.ignore_index,
            ticket=work.several_programs,
        ),
        logits,
        *logits.stride(),
        teacher,
        *weight_arguments(weight),
        *outputs,
        num_rows,
        num_classes,
        options.temperature,
        options.ce_weight,
        options.kl_weight,
        options.label_smoothing,
        options.similarity_temperature,
        **constants,
        SHAPE=work.shape,
        **work.options,
        TICKET=work.several_programs,
        PROJECTION=SIMILARITIES[options.similarity] == "projection",
        N=min(triton.next_power_of_2(num_classes), threads * SHORT_ROWS.of_thread),
        LANES=min(triton.next_power_of_2(num_classes), threads),
        BLOCK=ROWS_AT_ONCE,
    )
    return (*outputs[:4], teacher)


def _empty_statistics(gradients: Tensor) -> tuple[Tensor, Tensor]:
    dots = gradients.new_empty(gradients.shape[:2], dtype=loss_dtype(gradients))
    return dots, torch.empty_like(dots)
