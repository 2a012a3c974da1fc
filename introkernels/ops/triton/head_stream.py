"""The linear head by kernels that never store a number of every row and class."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from introkernels.ops.head.call import HeadCall, Needs
from introkernels.ops.triton import losses
from introkernels.ops.triton.head_weight import gradient_of_rows, survey
from introkernels.ops.triton.kernels.head_stream import (
    stream_backward,
    stream_forward,
    survey_rows,
)
from introkernels.ops.triton.launch import launch
from introkernels.ops.triton.losses import weight_arguments
from introkernels.types import LABEL_MODES, SIMILARITIES

# Rows, classes and dimensions of a tile, and its warps. 64 rows by 4 warps are the least that the
# tensor cores of all targets take at full rate. In a large tile a thread holds 16 numbers of each
# product; a backward's numbers, or the parts of a product of three, would not fit beside as many.
LARGE_TILE = {"M": 64, "N": 32, "K": 16, "num_warps": 4}
SMALL_TILE = {"M": 64, "N": 16, "K": 16, "num_warps": 4}

# How many bfloat16 numbers hold one of a dtype. Two would do for float16, but compilers then spill
# registers to let more programs run at once.
PARTS = {torch.bfloat16: 1, torch.float16: 3, torch.float32: 3}


def in_one_part(call: HeadCall) -> bool:
    """Whether the numbers of features and weight are bfloat16 as they are."""
    return PARTS[call.features.dtype] == PARTS[call.weight.dtype] == 1


def stages(call: HeadCall) -> int:
    """Tiles of a walk that are loaded while one is multiplied, that one included.

    What is loaded ahead takes registers, of which three parts leave none.
    """
    return 2 if in_one_part(call) else 1


def serves(call: HeadCall) -> bool:
    """Whether there are kernels for this call.

    There are none for float64, which tensor cores don't have everywhere, nor for split labels,
    whose normaliser would take another walk over the classes.
    """
    return call.features.dtype != torch.float64 and LABEL_MODES[call.labels.label_mode] != "split"


def variant(call: HeadCall) -> dict[str, Any]:
    """What the kernels are compiled for."""
    return {
        "REDUCTION": call.loss.reduction,
        "PROJECTION": SIMILARITIES[call.labels.similarity] == "projection",
        "WEIGHTED": call.loss.weight is not None or call.loss.label_smoothing > 0,
        "FEATURE_PARTS": PARTS[call.features.dtype],
        "WEIGHT_PARTS": PARTS[call.weight.dtype],
    }


class Prepared:
    """What every kernel of a call is handed: the head, its surveys, targets and class weights."""

    def __init__(self, call: HeadCall) -> None:
        num_rows, width = call.features.shape
        num_classes = call.weight.shape[0]
        self.largest, mean = survey(call)
        scales = call.features.new_empty((num_rows, 2), dtype=torch.float32)
        norms = call.features.new_empty(num_rows, dtype=torch.float32)
        # A program's rows share 1024 numbers at a time.
        columns = min(triton.next_power_of_2(max(width, 1)), 256)
        rows = min(32, 1024 // columns)
        launch(
            survey_rows,
            (triton.cdiv(num_rows, rows),),
            call.features,
            call.features.stride(),
            call.weight,
            call.weight.stride(),
            mean,
            self.largest,
            call.target,
            call.target.stride(0),
            scales,
            norms,
            self.largest.shape[0],
            num_rows,
            num_classes,
            width,
            call.loss.ignore_index,
            R=rows,
            K=columns,
            num_warps=4,
        )
        self.tensors = (
            call.features,
            call.features.stride(),
            call.weight,
            call.weight.stride(),
            call.bias,
            1 if call.bias is None else call.bias.stride(0),
            mean,
            self.largest,
            call.target,
            call.target.stride(0),
            scales,
            norms,
            *weight_arguments(call.loss.weight),
        )
        self.options = (
            call.loss.ignore_index,
            call.loss.temperature,
            call.loss.ce_weight,
            call.loss.kl_weight,
            call.loss.label_smoothing,
            call.labels.similarity_temperature,
        )


def forward(call: HeadCall, needs: Needs) -> tuple[Tensor, ...]:
    """Loss, ce, kl, row_state, totals and the gradients that are needed."""
    num_rows, width = call.features.shape
    prepared = Prepared(call)
    outputs = losses.allocate_outputs(call.features, call.loss.reduction)
    tile = LARGE_TILE if in_one_part(call) else SMALL_TILE
    # A launch without programs would leave the sums of no rows unwritten.
    num_programs = max(1, triton.cdiv(num_rows, tile["M"]))
    launch(
        stream_forward,
        (num_programs,),
        *prepared.tensors,
        *outputs,
        call.features.new_zeros(1, dtype=torch.int32),
        prepared.largest.shape[0],
        num_rows,
        num_programs,
        call.weight.shape[0],
        width,
        *prepared.options,
        **variant(call),
        **tile,
        num_stages=stages(call),
        REDUCE=losses.REDUCE,
    )
    ones = gradient_of_rows(call, None)
    grads = gradients(call, prepared, needs, ones, outputs.row_state, outputs.totals)
    return (*outputs[:5], *grads)


def backward(
    call: HeadCall, needs: Needs, grad_loss: Tensor | None, row_state: Tensor, totals: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for an incoming gradient ``[B]``, ones without it, in the dtype of the loss."""
    grad_of_rows = gradient_of_rows(call, grad_loss)
    return gradients(call, Prepared(call), needs, grad_of_rows, row_state, totals)


def gradients(
    call: HeadCall,
    prepared: Prepared,
    needs: Needs,
    grad_loss: Tensor,
    row_state: Tensor,
    totals: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of features, weight and bias in float32; empty ones that nobody needs."""
    num_rows, width = call.features.shape
    num_classes = call.weight.shape[0]

    def empty_unless(needed: bool, *shape: int) -> Tensor:
        # Without rows there is nothing to add up, and nobody to write the sum.
        new = call.features.new_empty if num_rows else call.features.new_zeros
        return new(shape if needed else (0,), dtype=torch.float32)

    grad_features = empty_unless(needs.features, num_rows, width)
    grad_weight = empty_unless(needs.weight, num_classes, width)
    grad_bias = empty_unless(needs.bias, num_classes)
    # Who walks the classes for its rows, then who walks the rows for its classes.
    passes = (
        (triton.cdiv(num_rows, SMALL_TILE["M"]), grad_features, None, None),
        (
            triton.cdiv(num_classes, SMALL_TILE["N"]),
            None,
            grad_weight if needs.weight else None,
            grad_bias if needs.bias else None,
        ),
    )
    wanted = (needs.features, needs.weight or needs.bias)
    for (num_programs, *outputs), is_wanted in zip(passes, wanted, strict=True):
        if is_wanted and num_rows:
            launch(
                stream_backward,
                (num_programs,),
                *prepared.tensors,
                row_state,
                totals,
                grad_loss,
                grad_loss.stride(0),
                *outputs,
                prepared.largest.shape[0],
                num_rows,
                num_classes,
                width,
                *prepared.options,
                **variant(call),
                **SMALL_TILE,
                num_stages=stages(call),
            )
    return grad_features, grad_weight, grad_bias
