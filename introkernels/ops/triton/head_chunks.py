"""The linear head by products of the matrix library, for a chunk of rows at a time."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from introkernels.ops.head.call import HeadCall, Needs
from introkernels.ops.head.chunks import Chunk, allocate_chunk, walk
from introkernels.ops.head.precision import full_float32
from introkernels.ops.head.products import Gradients, Weight, multiply
from introkernels.ops.schema import loss_dtype
from introkernels.ops.triton import losses
from introkernels.ops.triton.head_weight import gradient_of_rows, sum_of_targets, survey
from introkernels.ops.triton.kernels.head import (
    chunk_forward,
    explain_rows,
    explain_weight,
)
from introkernels.ops.triton.kernels.losses import loss_backward
from introkernels.ops.triton.launch import launch
from introkernels.ops.triton.losses import Teacher, weight_arguments
from introkernels.types import REDUCTIONS


def prepare_weight(call: HeadCall) -> tuple[Weight, Tensor]:
    """Look at the weight once, and make of it what all chunks share.

    Beside the weight as products take it: the largest magnitudes of its parts, which tell the power
    of two that it is scaled by.
    """
    num_classes, width = call.weight.shape
    dtype = loss_dtype(call.features)
    largest, mean = survey(call)
    squares = call.weight.new_empty((num_classes, width), dtype=dtype)
    wide = call.weight.to(dtype)
    explained = torch.empty_like(squares) if call.center else wide
    # 32 numbers of a thread at most, for loads of 16 bytes.
    launch(
        explain_weight,
        (triton.cdiv(num_classes, 16), triton.cdiv(width, 128)),
        wide,
        wide.stride(),
        mean,
        largest,
        explained if call.center else None,
        squares,
        largest.shape[0],
        num_classes,
        width,
        N=16,
        K=128,
        dtype=losses.compute_dtype(call.features),
        num_warps=4,
    )
    return Weight(wide, explained, squares), largest


def explain(call: HeadCall, weight: Weight, largest: Tensor, chunk: Chunk, first_row: int) -> None:
    """Fill a chunk's matrices of features; its rows start at ``first_row``."""
    num_rows = chunk.logits.shape[0]
    num_classes, width = call.weight.shape
    # A program's rows share 1024 numbers at a time.
    columns = min(triton.next_power_of_2(max(width, 1)), 256)
    rows = min(32, 1024 // columns)
    launch(
        explain_rows,
        (triton.cdiv(num_rows, rows),),
        call.features,
        call.features.stride(),
        call.target,
        call.target.stride(0),
        weight.explained,
        weight.explained.stride(),
        largest,
        chunk.features,
        chunk.squares,
        chunk.squares_of_target,
        largest.shape[0],
        first_row,
        num_rows,
        num_classes,
        width,
        call.loss.ignore_index,
        R=rows,
        K=columns,
        dtype=losses.compute_dtype(call.features),
        num_warps=4,
    )


def lose_rows(
    call: HeadCall,
    chunk: Chunk,
    first_row: int,
    outputs: losses.LossOutputs,
    counter: Tensor,
    num_programs: int,
) -> None:
    """The forward of a chunk's rows; the last chunk's reduces those of all ``num_programs``."""
    num_rows, num_classes = chunk.logits.shape
    teacher = Teacher(chunk.dots, chunk.sq_norms)
    constants = losses.variant(chunk.logits, teacher, call.loss, call.labels)
    vector = losses.vector_of(chunk.logits, teacher)
    tile = losses.tiles(num_classes, losses.compute_dtype(call.features))
    launch(
        chunk_forward,
        # A launch without programs would leave the sums of no rows unwritten.
        (max(1, triton.cdiv(num_rows, tile.rows)),),
        chunk.logits,
        chunk.dots,
        chunk.sq_norms,
        losses.in_vectors(chunk.logits, vector),
        call.target,
        call.target.stride(0),
        *weight_arguments(call.loss.weight),
        *outputs,
        counter,
        first_row,
        num_rows,
        call.features.shape[0],
        num_programs,
        num_classes // vector,
        call.loss.ignore_index,
        call.loss.temperature,
        call.loss.ce_weight,
        call.loss.kl_weight,
        call.loss.label_smoothing,
        call.labels.similarity_temperature,
        call.labels.non_target_mass,
        **constants,
        VECTOR=vector,
        R=tile.rows,
        N=tile.classes,
        REDUCE=losses.REDUCE,
        num_warps=tile.num_warps,
    )


def differentiate(
    call: HeadCall,
    chunk: Chunk,
    first_row: int,
    grad_loss: Tensor,
    row_state: Tensor,
    totals: Tensor,
) -> None:
    """Put the gradient of a chunk's logits, for ``grad_loss`` of each row, in their place."""
    num_rows, num_classes = chunk.logits.shape
    rows = slice(first_row, first_row + num_rows)
    teacher = Teacher(chunk.dots, chunk.sq_norms)
    constants = losses.variant(chunk.logits, teacher, call.loss, call.labels)
    vector = losses.vector_of(chunk.logits, teacher)
    tile = losses.tiles(num_classes, losses.compute_dtype(call.features))
    launch(
        loss_backward,
        (triton.cdiv(num_rows, tile.rows),),
        chunk.logits,
        losses.in_vectors(chunk.logits, vector),
        call.target[rows],
        call.target.stride(0),
        *losses.teacher_arguments(teacher, chunk.logits, vector),
        *weight_arguments(call.loss.weight),
        row_state[rows],
        totals,
        grad_loss[rows],
        grad_loss.stride(0),
        # A program reads a class of its rows before it writes that class, and no row of others.
        chunk.logits,
        num_rows,
        num_classes // vector,
        num_classes,
        call.loss.ignore_index,
        call.loss.temperature,
        call.loss.ce_weight,
        call.loss.kl_weight,
        call.loss.label_smoothing,
        call.labels.similarity_temperature,
        call.labels.non_target_mass,
        **constants,
        VECTOR=vector,
        R=tile.rows,
        N=tile.classes,
        num_warps=tile.num_warps,
    )


def forward(call: HeadCall, needs: Needs) -> tuple[Tensor, ...]:
    """Loss, ce, kl, row_state, totals and the gradients that are needed."""
    num_rows, num_classes = call.features.shape[0], call.weight.shape[0]
    outputs = losses.allocate_outputs(call.features, call.loss.reduction)
    totals = outputs.totals
    counter = call.features.new_zeros(1, dtype=torch.int32)
    makes_gradients = any(needs)
    if makes_gradients and REDUCTIONS[call.loss.reduction] == "mean":
        # Gradients of the first rows need what the last row adds to the divisor.
        totals = sum_of_targets(call)
    memory = allocate_chunk(call)
    step = len(memory.logits)
    tile = losses.tiles(num_classes, losses.compute_dtype(call.features))
    begins = range(0, num_rows, step) if num_rows else (0,)
    counts = [min(step, num_rows - first_row) for first_row in begins]
    num_programs = max(1, sum(triton.cdiv(count, tile.rows) for count in counts))
    gradients = Gradients(call, needs)
    ones = gradient_of_rows(call, None)
    with full_float32():
        weight, largest = prepare_weight(call)
        for first_row, count in zip(begins, counts, strict=True):
            chunk = memory.of_rows(count)
            explain(call, weight, largest, chunk, first_row)
            multiply(weight, call.bias, chunk)
            lose_rows(call, chunk, first_row, outputs, counter, num_programs)
            if makes_gradients:
                differentiate(call, chunk, first_row, ones, outputs.row_state, totals)
                gradients.add(weight, chunk.features, chunk.logits, first_row)
    return (*outputs[:4], totals, *gradients.finish())


def backward(
    call: HeadCall, needs: Needs, grad_loss: Tensor | None, row_state: Tensor, totals: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for an incoming gradient ``[B]``, ones without it, in the dtype of the loss."""
    gradients = Gradients(call, needs)
    grad_of_rows = gradient_of_rows(call, grad_loss)
    with full_float32():
        weight, largest = prepare_weight(call)
        for first_row, chunk in walk(call):
            explain(call, weight, largest, chunk, first_row)
            multiply(weight, call.bias, chunk)
            differentiate(call, chunk, first_row, grad_of_rows, row_state, totals)
            gradients.add(weight, chunk.features, chunk.logits, first_row)
    return gradients.finish()
