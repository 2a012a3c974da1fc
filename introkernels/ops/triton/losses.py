"""Launches of the loss kernels: distillation and similarity, forward and backward."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from introkernels.ops.options import LabelOptions, LossOptions
from introkernels.ops.schema import loss_dtype, row_state_like
from introkernels.ops.triton.kernels.losses import loss_backward, loss_forward
from introkernels.ops.triton.launch import launch
from introkernels.types import LABEL_MODES, REDUCTIONS, SIMILARITIES

HALF_TYPES = (torch.bfloat16, torch.float16)


# Given teacher logits are at no similarity: kernels don't read these.
GIVEN = LabelOptions(1.0, 0, 0, 0.0)


class Teacher(NamedTuple):
    """Teacher logits ``[B, C]``, or dots and sq_norms ``[B, K]`` of explained classes."""

    first: Tensor
    second: Tensor | None = None
    class_index: Tensor | None = None


def compute_dtype(logits: Tensor) -> Any:
    """What kernels compute in: float64 for float64 logits, else float32."""
    return tl.float64 if logits.dtype == torch.float64 else tl.float32


class Tiles(NamedTuple):
    """How many rows and classes a program holds at once, and its warps."""

    rows: int
    classes: int
    num_warps: int


def tile_of_warps(num_warps: int, dtype: Any) -> int:
    """Classes in all rows of a tile that so many warps hold.

    A thread has 8 classes (4 of float64): some ten numbers of each live at once.
    """
    return num_warps * (128 if dtype == tl.float64 else 256)


def tiles(num_classes: int, dtype: Any) -> Tiles:
    """The tiles of a row loss.

    Rows of more than a tile of 4 warps go in tiles of twice as many classes: each tile costs a few
    reductions over all threads. Shorter rows share a program of two warps, so that it is worth its
    start; at most 16 rows, as each has numbers of its own that take registers.
    """
    usual = tile_of_warps(4, dtype)
    if num_classes > usual:
        return Tiles(1, 2 * usual, 4)
    classes = triton.next_power_of_2(num_classes)
    rows = max(1, min(16, tile_of_warps(2, dtype) // classes))
    return Tiles(rows, classes, max(1, rows * classes // tile_of_warps(1, dtype)))


def scratch_of(teacher: Teacher, logits: Tensor) -> Tensor | None:
    """Where kernels put the teacher logits of explained classes among all ``[B, C]``."""
    if teacher.class_index is None:
        return None
    return logits.new_empty(logits.shape, dtype=loss_dtype(logits))


def vector_of(logits: Tensor, teacher: Teacher) -> int:
    """The largest power of two, up to 16, that divides the number of classes and rows' strides.

    Loads of whole vectors take that the compiler knows where they may begin and end. Triton tells
    it of multiples of 16 by itself; 1000 classes are a multiple of 8.
    """
    numbers = [logits.shape[1], logits.stride(0)]
    if teacher.class_index is None:
        numbers += [teacher.first.stride(0)]
        numbers += [] if teacher.second is None else [teacher.second.stride(0)]
    return math.gcd(16, *numbers)


def in_vectors(tensor: Tensor, vector: int) -> tuple[int, int]:
    """The strides of a matrix, that of its rows counted in vectors."""
    return tensor.stride(0) // vector, tensor.stride(1)


def teacher_arguments(teacher: Teacher, logits: Tensor, vector: int) -> tuple[Any, ...]:
    """A teacher as kernels take it: tensors, their strides and scratch."""
    first, second, index = teacher
    vector = vector if index is None else 1
    strides = in_vectors(first, vector)
    return (
        first,
        strides,
        second,
        strides if second is None else in_vectors(second, vector),
        index,
        strides if index is None else index.stride(),
        scratch_of(teacher, logits),
    )


def weight_arguments(weight: Tensor | None) -> tuple[Any, ...]:
    """Class weights as kernels take them."""
    return weight, 1 if weight is None else weight.stride(0)


def variant(
    logits: Tensor, teacher: Teacher, options: LossOptions, labels: LabelOptions
) -> dict[str, Any]:
    """What the kernels of a loss are compiled for."""
    dtype = compute_dtype(logits)
    exact = not (logits.dtype in HALF_TYPES and teacher.first.dtype in HALF_TYPES)
    return {
        "REDUCTION": options.reduction,
        "PROJECTION": SIMILARITIES[labels.similarity] == "projection",
        "SPLIT": LABEL_MODES[labels.label_mode] == "split",
        "WEIGHTED": options.weight is not None or options.label_smoothing > 0,
        # Float64 has digits to spare; half types of both sides leave float32 as many.
        "EXACT": exact and dtype == tl.float32,
        "dtype": dtype,
    }


class LossOutputs(NamedTuple):
    """What a forward gives, then what its programs tell each other."""

    loss: Tensor
    ce: Tensor
    kl: Tensor
    row_state: Tensor
    totals: Tensor
    terms: Tensor


def allocate_outputs(logits: Tensor, reduction: int) -> LossOutputs:
    """Outputs and scratch of a forward for the rows of ``logits``."""
    rows = logits.shape[0]
    shape = (rows,) if REDUCTIONS[reduction] == "none" else ()
    dtype = loss_dtype(logits)
    return LossOutputs(
        logits.new_empty(shape, dtype=dtype),
        logits.new_empty(shape, dtype=dtype),
        logits.new_empty(shape, dtype=dtype),
        row_state_like(logits),
        logits.new_empty(2, dtype=torch.float64),
        logits.new_empty((4, rows), dtype=torch.float64),
    )


# Rows that the last program adds up at once.
REDUCE = 1024


def forward(
    logits: Tensor,
    teacher: Teacher,
    target: Tensor,
    options: LossOptions,
    labels: LabelOptions = GIVEN,
) -> tuple[Tensor, ...]:
    """Loss, ce, kl, row_state and totals of a loss on a teacher."""
    num_rows, num_classes = logits.shape
    vector = vector_of(logits, teacher)
    outputs = allocate_outputs(logits, options.reduction)
    constants = variant(logits, teacher, options, labels)
    tile = tiles(num_classes, constants["dtype"])
    # A launch without programs would leave the sums of no rows unwritten.
    num_programs = max(1, triton.cdiv(num_rows, tile.rows))
    launch(
        loss_forward,
        (num_programs,),
        logits,
        in_vectors(logits, vector),
        target,
        target.stride(0),
        *teacher_arguments(teacher, logits, vector),
        *weight_arguments(options.weight),
        *outputs,
        logits.new_zeros(1, dtype=torch.int32),
        num_rows,
        num_programs,
        num_classes // vector,
        teacher.first.shape[1],
        options.ignore_index,
        options.temperature,
        options.ce_weight,
        options.kl_weight,
        options.label_smoothing,
        labels.similarity_temperature,
        labels.non_target_mass,
        **constants,
        VECTOR=vector,
        R=tile.rows,
        N=tile.classes,
        REDUCE=REDUCE,
        num_warps=tile.num_warps,
    )
    return tuple(outputs[:5])


def backward(
    grad_loss: Tensor,
    logits: Tensor,
    teacher: Teacher,
    target: Tensor,
    row_state: Tensor,
    totals: Tensor,
    options: LossOptions,
    labels: LabelOptions = GIVEN,
) -> Tensor:
    """The gradient ``[B, C]`` of the logits, contiguous."""
    num_rows, num_classes = logits.shape
    vector = vector_of(logits, teacher)
    grad_logits = logits.new_empty(logits.shape)
    constants = variant(logits, teacher, options, labels)
    tile = tiles(num_classes, constants["dtype"])
    launch(
        loss_backward,
        (triton.cdiv(num_rows, tile.rows),),
        logits,
        in_vectors(logits, vector),
        target,
        target.stride(0),
        *teacher_arguments(teacher, logits, vector),
        *weight_arguments(options.weight),
        row_state,
        totals,
        grad_loss,
        grad_loss.stride(0) if grad_loss.dim() else 0,
        grad_logits,
        num_rows,
        num_classes // vector,
        teacher.first.shape[1],
        options.ignore_index,
        options.temperature,
        options.ce_weight,
        options.kl_weight,
        options.label_smoothing,
        labels.similarity_temperature,
        labels.non_target_mass,
        **constants,
        VECTOR=vector,
        R=tile.rows,
        N=tile.classes,
        num_warps=tile.num_warps,
    )
    return grad_logits
