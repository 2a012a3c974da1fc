"""Launches of the row loss, forward and backward."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from introkernels.ops.indices import check_indices
from introkernels.ops.schema import loss_dtype, state_like
from introkernels.ops.triton.kernels.losses import loss_backward, loss_forward
from introkernels.ops.triton.launch import launch
from introkernels.options import Options
from introkernels.types import REDUCTIONS

# Programs whose sums the last one adds up at once.
BLOCK = 1024


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


def vector_of(logits: Tensor, teacher_logits: Tensor) -> int:
    """The largest power of two, up to 16, that divides the number of classes and rows' strides.

    Loads of whole vectors take that the compiler knows where they may begin and end. Triton tells
    it of multiples of 16 by itself; 1000 classes are a multiple of 8.
    """
    return math.gcd(16, logits.shape[1], logits.stride(0), teacher_logits.stride(0))


def weight_arguments(weight: Tensor | None) -> tuple[Any, ...]:
    """Class weights as kernels take them."""
    return weight, 1 if weight is None else weight.stride(0)


def variant(logits: Tensor, options: Options) -> dict[str, Any]:
    """What the kernels of a loss are compiled for."""
    return {
        "REDUCTION": options.reduction,
        "SMOOTHED": options.label_smoothing > 0,
        "dtype": tl.float64 if logits.dtype == torch.float64 else tl.float32,
    }


class LossOutputs(NamedTuple):
    """What a forward gives, then what its programs tell each other."""

    loss: Tensor
    ce: Tensor
    kl: Tensor
    state: Tensor
    sums: Tensor
    counter: Tensor


def allocate_outputs(logits: Tensor, reduction: int, num_programs: int) -> LossOutputs:
    """Outputs and scratch of a forward for the rows of ``logits``."""
    shape = (logits.shape[0],) if REDUCTIONS[reduction] == "none" else ()
    dtype = loss_dtype(logits)
    return LossOutputs(
        logits.new_empty(shape, dtype=dtype),
        logits.new_empty(shape, dtype=dtype),
        logits.new_empty(shape, dtype=dtype),
        state_like(logits),
        logits.new_empty((4, num_programs), dtype=torch.float64),
        logits.new_zeros(1, dtype=torch.int32),
    )


def _arguments(
    logits: Tensor, teacher_logits: Tensor, target: Tensor, weight: Tensor | None, vector: int
) -> tuple[Any, ...]:
    """What the kernels of both directions begin with."""
    return (
        logits,
        logits.stride(0) // vector,
        logits.stride(1),
        teacher_logits,
        teacher_logits.stride(0) // vector,
        teacher_logits.stride(1),
        target,
        target.stride(0),
        *weight_arguments(weight),
    )


def row_loss_forward(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    floats: list[float],
    ints: list[int],
) -> tuple[Tensor, ...]:
    options = Options.of(floats, ints)
    num_rows, num_classes = logits.shape
    check_indices(target, num_classes, options.ignore_index)
    vector = vector_of(logits, teacher_logits)
    constants = variant(logits, options)
    tile = tiles(num_classes, constants["dtype"])
    # A launch without programs would leave the sums of no rows unwritten.
    num_programs = max(1, triton.cdiv(num_rows, tile.rows))
    outputs = allocate_outputs(logits, options.reduction, num_programs)
    launch(
        loss_forward,
        (num_programs,),
        *_arguments(logits, teacher_logits, target, weight, vector),
        *outputs,
        num_rows,
        num_programs,
        num_classes // vector,
        options.ignore_index,
        options.temperature,
        options.ce_weight,
        options.kl_weight,
        options.label_smoothing,
        **constants,
        VECTOR=vector,
        R=tile.rows,
        N=tile.classes,
        BLOCK=BLOCK,
        num_warps=tile.num_warps,
    )
    return tuple(outputs[:4])


def row_loss_backward(
    grad_loss: Tensor,
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    state: Tensor,
    floats: list[float],
    ints: list[int],
) -> Tensor:
    options = Options.of(floats, ints)
    num_rows, num_classes = logits.shape
    vector = vector_of(logits, teacher_logits)
    grad_logits = logits.new_empty(logits.shape)
    constants = variant(logits, options)
    tile = tiles(num_classes, constants["dtype"])
    launch(
        loss_backward,
        (triton.cdiv(num_rows, tile.rows),),
        *_arguments(logits, teacher_logits, target, weight, vector),
        state,
        grad_loss,
        grad_loss.stride(0) if grad_loss.dim() else 0,
        grad_logits,
        num_rows,
        num_classes // vector,
        options.ignore_index,
        options.temperature,
        options.ce_weight,
        options.kl_weight,
        options.label_smoothing,
        **constants,
        VECTOR=vector,
        R=tile.rows,
        N=tile.classes,
        num_warps=tile.num_warps,
    )
    return grad_logits
