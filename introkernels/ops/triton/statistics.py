"""The launch of the explanation statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from introkernels import checks
from introkernels.ops.schema import loss_dtype
from introkernels.ops.triton.kernels.statistics import explanation_stats_kernel
from introkernels.ops.triton.launch import launch
from introkernels.ops.triton.statistics_config import share


def explanation_stats(
    gradients: Tensor,
    inputs: Tensor,
    target: Tensor,
    class_index: Tensor | None,
    center: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """``dots`` and ``sq_norms [B, K]`` of explanations ``E_c = g_c * x``.

    Float64 for float64 gradients, else float32.

    Args:
        gradients: ``[B, K, *S]``, floating, of any strides; never copied.
        inputs: ``[B, *S]``, floating.
        target: ``[B]`` int64.
        class_index: ``[B, K]`` int64, the classes of each row, or None for all.
        center: whether the mean over the classes given is taken away from the explanations.
        ignore_index: the target of rows whose statistics are zeros.

    Raises:
        IndexError: a target or a class is out of range.
        ValueError: a row of ``class_index`` lacks its target or repeats a class.

    Both are found on the CPU and under ``INTROKERNELS_CHECK=1`` only; otherwise dots are NaN where
    the target is none of the row's classes.
    """
    if not target.is_meta:
        classes = gradients.shape[1] if class_index is None else torch.iinfo(torch.int64).max
        checks.target_in_range(target, classes, ignore_index)
        checks.class_index_values(class_index, target, None, ignore_index)
    shape = gradients.shape[:2]
    dots = gradients.new_empty(shape, dtype=loss_dtype(gradients))
    sq_norms = torch.empty_like(dots)
    if shape[1] == 0:
        return dots, sq_norms
    work = share(gradients, inputs, center)
    launch(
        explanation_stats_kernel,
        (work.num_programs,),
        *work.arguments(
            target, class_index, dots, sq_norms, ignore_index, ticket=work.num_slices > 1
        ),
        **work.constants,
    )
    return dots, sq_norms
