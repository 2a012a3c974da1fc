"""The kernels of the losses on given teacher logits and on explanation statistics.

Forward: a program owns R rows and walks their classes once, N at a time: it reads the logits and
teacher logits (or two statistics) of its rows and writes 72 bytes a row. Backward: the same walk,
which writes the gradient of each class beside the reads.
"""

import triton
import triton.language as tl

from introkernels.ops.triton.kernels.math import NEVER, widened
from introkernels.ops.triton.kernels.reduction import REDUCTION_MEAN, finish_losses
from introkernels.ops.triton.kernels.rows import add_tile, finish_rows, gradient_tile, no_classes
from introkernels.ops.triton.kernels.teachers import (
    as_numbers,
    load_tile,
    prepare_teacher,
    teacher_tile,
)

ROW_STATE = tl.constexpr(9)


@triton.jit
def float64_options(
    temperature, ce_weight, kl_weight, label_smoothing, similarity_temperature, non_target_mass
):
    """The options as float64 tensors, whatever a kernel received them as."""
    return (
        tl.full((), temperature, tl.float64),
        tl.full((), ce_weight, tl.float64),
        tl.full((), kl_weight, tl.float64),
        tl.full((), label_smoothing, tl.float64),
        (
            tl.full((), similarity_temperature, tl.float64),
            tl.full((), non_target_mass, tl.float64),
        ),
    )


@triton.jit
def load_targets(target, target_stride, rows, num_rows, num_classes, ignore_index):
    """Targets ``[R]``, the rows that are not ignored, and those of them that name a class."""
    # A row past the end counts as ignored.
    y = tl.load(target + rows * target_stride, mask=rows < num_rows, other=0)
    live = (rows < num_rows) & (y != ignore_index)
    return y, live, live & (y >= 0) & (y < num_classes)


@triton.jit
def load_weights(weight, weight_stride, columns, mask, dtype: tl.constexpr):
    """Class weights of ``columns``, ones without any."""
    if weight is None:
        weights = tl.where(mask, 1.0, 0.0)
    else:
        weights = tl.load(weight + columns.to(tl.int64) * weight_stride, mask=mask, other=0)
    return widened(weights, dtype)


@triton.jit
def load_row_state(row_state, rows, mask, dtype: tl.constexpr):
    """The nine numbers that a forward kept of each row; those of an empty row elsewhere."""
    start = row_state + rows * ROW_STATE
    return (
        tl.load(start, mask=mask, other=0).to(dtype),
        tl.load(start + 1, mask=mask, other=0).to(dtype),
        tl.load(start + 2, mask=mask, other=0).to(dtype),
        tl.load(start + 3, mask=mask, other=0).to(dtype),
        tl.load(start + 4, mask=mask, other=0).to(dtype),
        tl.load(start + 5, mask=mask, other=0).to(dtype),
        tl.load(start + 6, mask=mask, other=0).to(dtype),
        tl.load(start + 7, mask=mask, other=0).to(dtype),
        tl.load(start + 8, mask=mask, other=0).to(dtype),
    )


@triton.jit
def rows_forward(
    logits,
    logits_strides,
    y,
    present,
    live,
    known,
    teacher,
    weight,
    weight_stride,
    row_state,
    rows,
    num_classes,
    num_explained,
    temperature,
    label_smoothing,
    labels,
    PROJECTION: tl.constexpr,
    SPLIT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    EXACT: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    dtype: tl.constexpr,
):
    """Terms of R rows: ce, kl and the target's weight, ``[R]``; what the backward needs is stored.

    ``present`` are the rows that exist, ``live`` those not ignored, ``known`` those whose target is
    a class: the others of those are NaN, and nothing of them is read.
    """
    prepared = prepare_teacher(
        teacher,
        logits,
        logits_strides,
        rows,
        known,
        y,
        num_classes,
        num_explained,
        temperature,
        labels,
        PROJECTION,
        SPLIT,
        R,
        N,
        dtype,
    )
    known = prepared[3]
    inverse_temperature = 1 / temperature
    state = no_classes(R, dtype)
    for begin in range(0, num_classes, N):
        columns = begin + tl.arange(0, N)
        mask = known[:, None] & (columns < num_classes)[None, :]
        is_target = columns[None, :] == y[:, None]
        z = load_tile(logits, logits_strides, rows, columns, mask, NEVER, dtype)
        t = teacher_tile(
            teacher,
            prepared,
            rows,
            columns,
            mask,
            is_target,
            num_classes,
            labels[0],
            PROJECTION,
            dtype,
        )
        w = load_weights(weight, weight_stride, columns, columns < num_classes, dtype)[None, :]
        state = add_tile(state, z, t, is_target, w, inverse_temperature, WEIGHTED, EXACT)
    at_target = logits + rows * logits_strides[0] + y * logits_strides[1]
    z_target = widened(tl.load(at_target, mask=known, other=NEVER), dtype)
    w_target = load_weights(weight, weight_stride, y, known, dtype)
    ce, kl, numbers = finish_rows(
        state, z_target, w_target, label_smoothing, WEIGHTED, teacher[2] is None
    )
    unknown = live & ~known
    ce = tl.where(unknown, float("nan"), tl.where(live, ce, 0))
    kl = tl.where(unknown, float("nan"), tl.where(live, kl, 0))
    for i in tl.static_range(ROW_STATE):
        number = tl.where(live, numbers[i], 0).to(tl.float64)
        tl.store(row_state + rows * ROW_STATE + i, number, mask=present)
    return ce, kl, w_target


@triton.jit(do_not_specialize=["num_rows", "num_programs", "ignore_index"])
def loss_forward(
    logits,
    logits_strides,
    target,
    target_stride,
    first,
    first_strides,
    second,
    second_strides,
    class_index,
    index_strides,
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
    num_programs,
    num_classes,
    num_explained,
    ignore_index,
    temperature: "fp64",
    ce_weight: "fp64",
    kl_weight: "fp64",
    label_smoothing: "fp64",
    similarity_temperature: "fp64",
    non_target_mass: "fp64",
    REDUCTION: tl.constexpr,
    PROJECTION: tl.constexpr,
    SPLIT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    EXACT: tl.constexpr,
    VECTOR: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    REDUCE: tl.constexpr,
    dtype: tl.constexpr,
):
    """Loss, ce and kl of all rows with one read of the logits and of the teacher.

    ``first`` to ``scratch`` are a teacher (see teachers.py). Reads B * C logits and as many teacher
    logits or pairs of statistics; writes 104 bytes a row, of which 32 are read again.
    """
    temperature, ce_weight, kl_weight, label_smoothing, labels = float64_options(
        temperature, ce_weight, kl_weight, label_smoothing, similarity_temperature, non_target_mass
    )
    num_classes = num_classes * VECTOR
    logits_strides = as_numbers(logits_strides, VECTOR)
    teacher = (
        first,
        as_numbers(first_strides, VECTOR if class_index is None else 1),
        second,
        as_numbers(second_strides, VECTOR if class_index is None else 1),
        class_index,
        as_numbers(index_strides),
        scratch,
    )
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    y, live, known = load_targets(target, target_stride, rows, num_rows, num_classes, ignore_index)
    ce_of_rows, kl_of_rows, target_weight = rows_forward(
        logits,
        logits_strides,
        y,
        rows < num_rows,
        live,
        known,
        teacher,
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
        R,
        N,
        dtype,
    )
    finish_losses(
        ce_of_rows,
        kl_of_rows,
        target_weight,
        live,
        rows,
        num_rows,
        (loss, ce, kl),
        terms,
        totals,
        counter,
        num_programs,
        temperature,
        ce_weight,
        kl_weight,
        REDUCTION,
        REDUCE,
    )


@triton.jit(do_not_specialize=["num_rows", "ignore_index"])
def loss_backward(
    logits,
    logits_strides,
    target,
    target_stride,
    first,
    first_strides,
    second,
    second_strides,
    class_index,
    index_strides,
    scratch,
    weight,
    weight_stride,
    row_state,
    totals,
    grad_loss,
    grad_loss_stride,
    grad_logits,
    num_rows,
    num_classes,
    num_explained,
    ignore_index,
    temperature: "fp64",
    ce_weight: "fp64",
    kl_weight: "fp64",
    label_smoothing: "fp64",
    similarity_temperature: "fp64",
    non_target_mass: "fp64",
    REDUCTION: tl.constexpr,
    PROJECTION: tl.constexpr,
    SPLIT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    EXACT: tl.constexpr,
    VECTOR: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    dtype: tl.constexpr,
):
    """Gradient ``grad_logits [B, C]``, contiguous, from what :func:`loss_forward` kept.

    Reads what the forward reads, 72 bytes a row, and writes B * C numbers.
    """
    temperature, ce_weight, kl_weight, label_smoothing, labels = float64_options(
        temperature, ce_weight, kl_weight, label_smoothing, similarity_temperature, non_target_mass
    )
    num_classes = num_classes * VECTOR
    logits_strides = as_numbers(logits_strides, VECTOR)
    teacher = (
        first,
        as_numbers(first_strides, VECTOR if class_index is None else 1),
        second,
        as_numbers(second_strides, VECTOR if class_index is None else 1),
        class_index,
        as_numbers(index_strides),
        scratch,
    )
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    y, live, known = load_targets(target, target_stride, rows, num_rows, num_classes, ignore_index)
    prepared = prepare_teacher(
        teacher,
        logits,
        logits_strides,
        rows,
        known,
        y,
        num_classes,
        num_explained,
        temperature,
        labels,
        PROJECTION,
        SPLIT,
        R,
        N,
        dtype,
    )
    known = prepared[3]
    numbers = load_row_state(row_state, rows, known, dtype)

    scale = tl.load(grad_loss + rows * grad_loss_stride, mask=known, other=0).to(tl.float64)
    ce_scale, kl_scale = scale * ce_weight, scale * kl_weight * temperature
    if REDUCTION == REDUCTION_MEAN:
        ce_scale /= tl.load(totals)
        kl_scale /= tl.load(totals + 1)
    # A term of weight 0 is left out, whatever the incoming gradient is.
    ce_scale = tl.where(ce_weight > 0, ce_scale, 0)
    kl_scale = tl.where(kl_weight > 0, kl_scale, 0)
    if second is None:
        kl_scale = tl.where(numbers[4] == 0, float("nan"), kl_scale)
    else:
        kl_scale = tl.where(numbers[4] == 0, 0, kl_scale)
    w_target = load_weights(weight, weight_stride, y, known, tl.float64)
    target_scale = ce_scale * (1 - label_smoothing) * w_target

    for begin in range(0, num_classes, N):
        columns = begin + tl.arange(0, N)
        inside = (columns < num_classes)[None, :]
        mask = known[:, None] & inside
        is_target = columns[None, :] == y[:, None]
        z = load_tile(logits, logits_strides, rows, columns, mask, NEVER, dtype)
        t = teacher_tile(
            teacher,
            prepared,
            rows,
            columns,
            mask,
            is_target,
            num_classes,
            labels[0],
            PROJECTION,
            dtype,
        )
        w = load_weights(weight, weight_stride, columns, columns < num_classes, dtype)[None, :]
        grad = gradient_tile(
            numbers,
            z,
            t,
            is_target,
            w,
            ce_scale.to(dtype),
            target_scale.to(dtype),
            kl_scale.to(dtype),
            1 / temperature,
            WEIGHTED,
            EXACT,
        )
        grad = tl.where((live & ~known)[:, None], float("nan"), grad)
        offsets = (rows * num_classes)[:, None] + columns[None, :]
        tl.store(grad_logits + offsets, grad, mask=(rows < num_rows)[:, None] & inside)
