"""The fused loss: statistics, teacher logits and loss, with one read of the gradients."""

import triton
import triton.language as tl

from introkernels.ops.triton.kernels.reduction import finish_losses
from introkernels.ops.triton.kernels.rows import NEVER, load_targets, rows_forward
from introkernels.ops.triton.kernels.statistics import NOT_SPECIALIZED, row_statistics


@triton.jit
def _root(x):
    # In float32 only the precise one leaves teacher logits within their bounds.
    if x.dtype == tl.float64:
        root = tl.sqrt(x)
    else:
        root = tl.sqrt_rn(x)
    return root


@triton.jit
def similarity_logits(
    dots, sq_norms, sq_norm_target, similarity_temperature, PROJECTION: tl.constexpr
):
    """``(s - 1) / tau`` for the similarities s of explanations to the target's."""
    if PROJECTION:
        norm = sq_norm_target
    else:
        # Two roots rather than the root of the product, which would underflow.
        norm = _root(sq_norms) * _root(sq_norm_target)
    s = tl.where(norm == 0, 0, dots / norm)
    # A norm that overflowed says nothing of the angle; dot / inf would pass for a right one.
    s = tl.where(norm == float("inf"), float("nan"), s)
    # In this order NaN passes.
    s = tl.where(s < -1, -1, s)
    s = tl.where(s > 1, 1, s)
    return (s - 1) / similarity_temperature


@triton.jit
def write_teacher_logits(
    teacher,
    dots,
    sq_norms,
    class_index,
    index_stride,
    y,
    position,
    num_classes,
    num_explained,
    similarity_temperature,
    PROJECTION: tl.constexpr,
    N: tl.constexpr,
):
    """The teacher logits of a row from its statistics; all arguments point to the row's first.

    Dots of NaN, where the target is none of the explained classes, make a row of NaN; where one of
    these is no class, the classes that nobody explained do.
    """
    dtype: tl.constexpr = teacher.dtype.element_ty
    similarity_temperature = tl.full((), similarity_temperature, dots.dtype.element_ty)
    if class_index is not None:
        # Every class is without a label until an explanation names it.
        outside = tl.zeros((N,), tl.int32)
        for begin in range(0, num_explained, N):
            k = begin + tl.arange(0, N)
            c = tl.load(
                class_index + k.to(tl.int64) * index_stride, mask=k < num_explained, other=0
            )
            outside += ((c < 0) | (c >= num_classes)).to(tl.int32)
        unnamed = tl.where(tl.sum(outside, 0) == 0, NEVER, float("nan")).to(dtype)
        for begin in range(0, num_classes, N):
            c = begin + tl.arange(0, N)
            tl.store(teacher + c, unnamed, mask=c < num_classes)
        tl.debug_barrier()
    sq_norm_target = tl.load(sq_norms + tl.maximum(position, 0))
    for begin in range(0, num_explained, N):
        k = begin + tl.arange(0, N)
        inside = k < num_explained
        c = k.to(tl.int64)
        if class_index is not None:
            c = tl.load(class_index + c * index_stride, mask=inside, other=0)
        t = similarity_logits(
            tl.load(dots + k, mask=inside, other=0.0),
            tl.load(sq_norms + k, mask=inside, other=0.0),
            sq_norm_target,
            similarity_temperature,
            PROJECTION,
        )
        t = tl.where(c == y, 0, t).to(dtype)
        tl.store(teacher + c, t, mask=inside & (c >= 0) & (c < num_classes))
    # All threads have written the row's logits before any of them reads them.
    tl.debug_barrier()


@triton.jit(do_not_specialize=["num_rows", "num_explained", *NOT_SPECIALIZED])
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
    logits_row_stride,
    logits_stride,
    teacher,
    weight,
    weight_stride,
    loss,
    ce,
    kl,
    state,
    sums,
    counter,
    num_rows,
    num_classes,
    temperature: "fp64",
    ce_weight: "fp64",
    kl_weight: "fp64",
    label_smoothing: "fp64",
    similarity_temperature: "fp64",
    SHAPE: tl.constexpr,
    TICKET: tl.constexpr,
    REDUCTION: tl.constexpr,
    PROJECTION: tl.constexpr,
    SMOOTHED: tl.constexpr,
    N: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
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
        SHAPE,
        TICKET,
    )
    if complete:
        # All threads have written the row's statistics before any of them reads them.
        tl.debug_barrier()
        if class_index is not None:
            class_index += row * index_row_stride
        write_teacher_logits(
            teacher + row * num_classes,
            dots + row * num_explained,
            sq_norms + row * num_explained,
            class_index,
            index_stride,
            y,
            position,
            num_classes,
            num_explained,
            similarity_temperature,
            PROJECTION,
            N,
        )
        rows = row + tl.arange(0, 1)
        targets, live, known = load_targets(
            target, target_stride, rows, num_rows, num_classes, ignore_index
        )
        ce_of_row, kl_of_row, target_weight = rows_forward(
            logits,
            logits_row_stride,
            logits_stride,
            teacher,
            num_classes,
            1,
            weight,
            weight_stride,
            state,
            rows,
            num_rows,
            targets,
            live,
            known,
            num_classes,
            temperature,
            label_smoothing,
            SMOOTHED,
            LANES,
            1,
            1,
            N // LANES,
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
            state,
            sums,
            counter,
            row,
            num_rows,
            temperature,
            ce_weight,
            kl_weight,
            REDUCTION,
            LANES,
            BLOCK,
        )
