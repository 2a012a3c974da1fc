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
# A row has so many lanes that its classes are shared out as below, or more where rows are too few
# for so many threads to be busy: then all that counts is when the last row is done.
BUSY_THREADS = 65536


class Loop(NamedTuple):
    """How a loop over classes is shared out.

    Attributes:
        of_thread: classes in a thread's part of a tile, some ten numbers of each of which live at
            once.
        of_lane: what a thread has of a row of up to ``MOST_CLASSES_OF_A_WARP`` classes in all.
        registers: that are enough with float32 and whole vectors. Fewer let more programs in, which
            hide what a row waits for.
    """

    of_thread: int
    of_lane: int
    registers: int


# What ends a row takes as long as fifteen classes of each of its lanes, in the backward eight: .85
# of a copy are predicted for an H200 with 128 classes a lane, .77 with 64 and .65 with 32 (forward,
# bfloat16, 1000 classes). What a tile takes beside its classes is shared by more of them in a
# larger one; of rows that are no longer than some tiles, it would leave more empty.
MOST_CLASSES_OF_SHORT_ROWS = 256
SHORT_ROWS = Loop(8, 64, 48)
ROWS_OF_A_WARP = Loop(16, 128, 72)
# With 72 registers, the code for sm_100 would spill one.
LONG_ROWS = Loop(16, 128, 76)
BACKWARD = Loop(8, 32, 56)


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


def tiles(shape: torch.Size, vector: int, loop: Loop) -> Tiles:
    """The tiles of a row loss for logits of ``shape``, whose loads fetch ``vector`` classes."""
    num_rows, num_classes = shape
    chunks = max(1, loop.of_thread // vector)
    if num_classes > MOST_CLASSES_OF_A_WARP:
        return Tiles(128, vector, 1, chunks, 4)
    # With a single lane, neighbours in a row would not be fetched together.
    lanes = triton.next_power_of_2(triton.cdiv(num_classes, loop.of_lane))
    lanes = max(2, min(32, lanes))
    most = min(32, triton.cdiv(num_classes, loop.of_thread))
    while lanes < most and 2 * lanes * num_rows <= BUSY_THREADS:
        lanes *= 2
    return Tiles(lanes, vector, 64 // lanes, chunks, 2)


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


def forward_loop(num_classes: int, common: bool) -> Loop:
    """The loop of the forward."""
    if num_classes <= MOST_CLASSES_OF_SHORT_ROWS or not common:
        return SHORT_ROWS
    return ROWS_OF_A_WARP if num_classes <= MOST_CLASSES_OF_A_WARP else LONG_ROWS


def is_common(vector: int, constants: dict[str, Any]) -> bool:
    """Whether a loop is that of float32 with whole vectors, without label smoothing."""
    return vector > 1 and constants["dtype"] == tl.float32 and not constants["SMOOTHED"]


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
    common = is_common(vector, constants)
    loop = forward_loop(num_classes, common)
    tile = tiles(logits.shape, vector, loop)
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
        maxnreg=loop.registers if common else MOST_REGISTERS,
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
    tile = tiles(logits.shape, vector, BACKWARD)
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
        maxnreg=BACKWARD.registers if is_common(vector, constants) else MOST_REGISTERS,
    )
    return grad_logits
