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
from introkernels.ops.triton.launch import MOST_REGISTERS, launch
from introkernels.options import Options
from introkernels.types import REDUCTIONS

# Programs whose sums each thread of the last one adds up at once: four sums, four loads on the way,
# and no more registers than the loop over classes has.
SUMS_OF_A_THREAD = 2
# Rows of more classes have the four warps of a program to themselves.
MOST_CLASSES_OF_A_WARP = 2048
# Classes in a thread's part of a tile: some ten numbers of each live at once.
CLASSES_OF_A_THREAD = 8
# Registers that are enough for the loops of float32 with whole vectors. More programs at a time
# hide what a row waits for: .87 of a copy are predicted for an H200 at 64 registers and .94 at 48
# (forward, bfloat16, 8192 rows of 32000).
FORWARD_REGISTERS = 48
BACKWARD_REGISTERS = 64
# What a thread has of a short row in all.
CLASSES_OF_A_LANE = 32


class Tiles(NamedTuple):
    """The shape of a program's tiles ``[LANES, V, R, CHUNKS]``, and its warps."""

    lanes: int
    vector: int
    rows: int
    chunks: int
    num_warps: int

    @property
    def constants(self) -> dict[str, int]:
        """As kernels and their launches take them."""
        names = ("LANES", "V", "R", "CHUNKS", "num_warps")
        return dict(zip(names, self, strict=True))


def tiles(num_classes: int, vector: int) -> Tiles:
    """The tiles of a row loss whose loads fetch ``vector`` classes.

    What ends a row costs as much as ten classes of each of its lanes. So a row has no more lanes
    than leave each some 32 classes: those of a warp at 1000 classes, four at 100.
    """
    chunks = max(1, CLASSES_OF_A_THREAD // vector)
    if num_classes > MOST_CLASSES_OF_A_WARP:
        return Tiles(128, vector, 1, chunks, 4)
    lanes = min(32, triton.next_power_of_2(triton.cdiv(num_classes, CLASSES_OF_A_LANE)))
    num_warps = 4 if lanes == 32 else 1
    return Tiles(lanes, vector, 32 * num_warps // lanes, chunks, num_warps)


def vector_of(logits: Tensor, teacher_logits: Tensor) -> int:
    """Classes that one load of at most 16 bytes fetches from either of the two.

    It divides the number of classes and rows' strides, which the compiler has to know of.
    """
    if logits.stride(1) != 1 or teacher_logits.stride(1) != 1:
        return 1
    longest = 16 // max(logits.element_size(), teacher_logits.element_size())
    return math.gcd(longest, logits.shape[1], logits.stride(0), teacher_logits.stride(0))


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


def registers(enough: int, tile: Tiles, constants: dict[str, Any]) -> int:
    """The limit of registers: ``enough`` where the loop is the common one."""
    is_common = tile.vector > 1 and constants["dtype"] == tl.float32 and not constants["SMOOTHED"]
    return enough if is_common else MOST_REGISTERS


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
    tile = tiles(num_classes, vector)
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
        **tile.constants,
        maxnreg=registers(FORWARD_REGISTERS, tile, constants),
        BLOCK=32 * tile.num_warps * SUMS_OF_A_THREAD,
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
    tile = tiles(num_classes, vector)
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
        **tile.constants,
        maxnreg=registers(BACKWARD_REGISTERS, tile, constants),
    )
    return grad_logits
