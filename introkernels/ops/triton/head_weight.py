"""What is known of all classes or all rows before the first product of a head."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from introkernels.ops.head.call import HeadCall
from introkernels.ops.schema import loss_dtype
from introkernels.ops.triton import losses
from introkernels.ops.triton.kernels.head import sum_targets, survey_weight
from introkernels.ops.triton.launch import launch
from introkernels.ops.triton.losses import compute_dtype, weight_arguments

# Columns and classes of a program that looks at all classes: lines of a cache are read as a whole,
# and a weight of few thousand columns keeps a GPU busy.
SURVEY_COLUMNS = 32
SURVEY_CLASSES = 64


def survey(call: HeadCall) -> tuple[Tensor, Tensor | None]:
    """The largest magnitudes of the weight as it is explained, and its mean where it is wanted."""
    num_classes, width = call.weight.shape
    dtype = loss_dtype(call.features)
    mean = call.weight.new_empty((2, width), dtype=dtype) if call.center else None
    num_parts = triton.cdiv(width, SURVEY_COLUMNS)
    largest = call.weight.new_empty(num_parts, dtype=dtype)
    launch(
        survey_weight,
        (num_parts,),
        call.weight,
        call.weight.stride(),
        mean,
        largest,
        num_classes,
        width,
        N=SURVEY_CLASSES,
        K=SURVEY_COLUMNS,
        dtype=compute_dtype(call.features),
        num_warps=4,
    )
    return largest, mean


def gradient_of_rows(call: HeadCall, grad_loss: Tensor | None) -> Tensor:
    """The incoming gradient ``[B]``: ones where there is none.

    Unlike those of ``expand``, the strides of these don't tell whether there is one row: kernels
    are compiled for a stride of 1.
    """
    if grad_loss is not None:
        return grad_loss
    one = call.features.new_ones(1, dtype=loss_dtype(call.features))
    return one.as_strided((call.features.shape[0],), (0,))


def sum_of_targets(call: HeadCall) -> Tensor:
    """``totals`` ahead of a forward."""
    totals = call.features.new_empty(2, dtype=torch.float64)
    launch(
        sum_targets,
        (1,),
        call.target,
        call.target.stride(0),
        *weight_arguments(call.loss.weight),
        totals,
        call.features.shape[0],
        call.weight.shape[0],
        call.loss.ignore_index,
        BLOCK=losses.REDUCE,
        dtype=compute_dtype(call.features),
        num_warps=4,
    )
    return totals
