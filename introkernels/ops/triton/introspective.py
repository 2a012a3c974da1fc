"""The launch of the fused loss."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from introkernels.ops.options import LabelOptions, LossOptions
from introkernels.ops.triton.kernels.introspective import introspective_forward_kernel
from introkernels.ops.triton.launch import launch
from introkernels.ops.triton.losses import (
    REDUCE,
    Teacher,
    allocate_outputs,
    scratch_of,
    tile_of_warps,
    variant,
    weight_arguments,
)
from introkernels.ops.triton.losses import (
    forward as loss_forward,
)
from introkernels.ops.triton.statistics_config import share


def forward(
    logits: Tensor,
    target: Tensor,
    gradients: Tensor,
    inputs: Tensor,
    class_index: Tensor | None,
    center: bool,
    options: LossOptions,
    labels: LabelOptions,
) -> tuple[Tensor, ...]:
    """Loss, ce, kl, row_state and totals, then dots and sq_norms ``[B, K]`` in float64.

    The statistics are kept in float64 so that the backward makes exactly the same soft labels.
    """
    num_rows, num_classes = logits.shape
    dots = gradients.new_empty(gradients.shape[:2], dtype=torch.float64)
    sq_norms = torch.empty_like(dots)
    teacher = Teacher(dots, sq_norms, class_index)
    if num_rows == 0:
        # Without rows there is no last program to write the sums.
        return (*loss_forward(logits, teacher, target, options, labels), dots, sq_norms)
    work = share(gradients, inputs, center)
    outputs = allocate_outputs(logits, options.reduction)
    constants = variant(logits, teacher, options, labels)
    launch(
        introspective_forward_kernel,
        (work.num_programs,),
        *work.arguments(
            target, class_index, dots, sq_norms, options.ignore_index, ticket=work.several_programs
        ),
        logits,
        logits.stride(),
        scratch_of(teacher, logits),
        *weight_arguments(options.weight),
        *outputs,
        logits.new_zeros(1, dtype=torch.int32),
        num_rows,
        num_classes,
        options.temperature,
        options.ce_weight,
        options.kl_weight,
        options.label_smoothing,
        labels.similarity_temperature,
        labels.non_target_mass,
        **constants,
        **work.constants,
        TICKET=work.several_programs,
        N=min(
            triton.next_power_of_2(num_classes),
            tile_of_warps(work.constants["num_warps"], constants["dtype"]),
        ),
        REDUCE=REDUCE,
    )
    return (*outputs[:5], dots, sq_norms)
