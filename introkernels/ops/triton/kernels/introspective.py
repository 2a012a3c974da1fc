"""The fused loss: statistics, soft labels and loss in one launch that reads the gradients once."""

import triton
import triton.language as tl

from introkernels.ops.triton.kernels.losses import float64_options, rows_forward
from introkernels.ops.triton.kernels.reduction import finish_losses
from introkernels.ops.triton.kernels.statistics import row_statistics
from introkernels.ops.triton.kernels.teachers import as_numbers


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "ignore_index",
        "num_explained",
        "num_slices",
        "num_groups",
        "classes_of_group",
        "row_stride",
        "class_stride",
        "inputs_row_stride",
        "target_stride",
        "index_row_stride",
        "index_stride",
    ]
)
def introspective_forward_kernel(
    gradients,
    inputs,
    target,
    class_index,
    dots,
    sq_norms,
    partial,
    counters,
    ignore_index,
    num_explained,
    num_slices,
    num_groups,
    classes_of_group,
    sizes,
    strides,
    row_stride,
    class_stride,
    inputs_row_stride,
    target_stride,
    index_row_stride,
    index_stride,
    logits,
    logits_strides,
    scratch,
    weight,
    weight_stride,
    loss,
    ce,
    kl,
    row_state,
    totals,
    terms,
    counter,
    num_rows,
    num_classes,
    temperature: "fp64",
    ce_weight: "fp64",
    kl_weight: "fp64",
    label_smoothing: "fp64",
    similarity_temperature: "fp64",
    non_target_mass: "fp64",
    CENTER: tl.constexpr,
    VECTOR: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_SLICES: tl.constexpr,
    BLOCK_SUMS: tl.constexpr,
    ONE_A_WARP: tl.constexpr,
    ONE_TILE: tl.constexpr,
    ONE_SLICE: tl.constexpr,
    WIDE: tl.constexpr,
    TICKET: tl.constexpr,
    REDUCTION: tl.constexpr,
    PROJECTION: tl.constexpr,
    SPLIT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    EXACT: tl.constexpr,
    N: tl.constexpr,
    REDUCE: tl.constexpr,
    dtype: tl.constexpr,
):
    """One program for each row, slice of D and group of classes, as for the statistics alone.

    The last one of a row to arrive goes on to the loss of the row, N classes at a time, and the
    last of these to that of the batch. Reads the B * K * D gradients once; beside them it moves
    B * (D + C + 4 K) numbers and 32 bytes for each slice of an explanation.
    """
    row, y, position, complete = row_statistics(
        gradients,
        inputs,
        target,
        class_index,
        dots,
        sq_norms,
        partial,
        counters,
        ignore_index,
        num_explained,
        num_slices,
        num_groups,
        classes_of_group,
        sizes,
        strides,
        row_stride,
        class_stride,
        inputs_row_stride,
        target_stride,
        index_row_stride,
        index_stride,
        CENTER,
        VECTOR,
        CHUNKS,
        WIDTH,
        BLOCK_K,
        BLOCK_SLICES,
        BLOCK_SUMS,
        ONE_A_WARP,
        ONE_TILE,
        ONE_SLICE,
        WIDE,
        TICKET,
    )
    if complete:
        # All threads have written the row's statistics before any of them reads them.
        tl.debug_barrier()
        temperature, ce_weight, kl_weight, label_smoothing, labels = float64_options(
            temperature,
            ce_weight,
            kl_weight,
            label_smoothing,
            similarity_temperature,
            non_target_mass,
        )
        rows = row + tl.arange(0, 1)
        targets = y + tl.zeros((1,), tl.int64)
        live = targets != ignore_index
        known = live & (position >= 0) & (targets >= 0) & (targets < num_classes)
        ce_of_row, kl_of_row, target_weight = rows_forward(
            logits,
            logits_strides,
            targets,
            rows < num_rows,
            live,
            known,
            (
                dots,
                as_numbers((num_explained, 1)),
                sq_norms,
                as_numbers((num_explained, 1)),
                class_index,
                as_numbers((index_row_stride, index_stride)),
                scratch,
            ),
            weight,
            weight_stride,
            row_state,
            rows,
            num_classes,
            num_explained,
            temperature,
            label_smoothing,
            labels,
            PROJECTION,
            SPLIT,
            WEIGHTED,
            EXACT,
            1,
            N,
            dtype,
        )
        finish_losses(
            ce_of_row,
            kl_of_row,
            target_weight,
            live,
            rows,
            num_rows,
            (loss, ce, kl),
            terms,
            totals,
            counter,
            num_rows,
            temperature,
            ce_weight,
            kl_weight,
            REDUCTION,
            REDUCE,
        )
