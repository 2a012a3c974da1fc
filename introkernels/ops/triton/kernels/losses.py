"""The kernels of the row loss.

Forward: a program owns R rows and walks their classes once, a tile at a time: it reads the logits
and teacher logits of its rows and writes 40 bytes a row, 56 with label smoothing. Backward: the
same walk, which writes the gradient of each class beside the reads.
"""

import triton
import triton.language as tl

from introkernels.ops.triton.kernels.reduction import REDUCTION_MEAN, finish_losses
from introkernels.ops.triton.kernels.rows import (
    LOG2_E,
    NEVER,
    ROW_STATE,
    UNIT,
    first_tile,
    load_targets,
    load_tile,
    load_weights,
    rows_forward,
)


@triton.jit(do_not_specialize=["num_rows", "num_programs", "ignore_index"])
def loss_forward(
    logits,
    logits_row_stride,
    logits_stride,
    teacher,
    teacher_row_stride,
    teacher_stride,
    target,
    target_stride,
    weight,
    weight_stride,
    loss,
    ce,
    kl,
    state,
    sums,
    counter,
    num_rows,
    num_programs,
    num_classes,
    ignore_index,
    temperature: "fp64",
    ce_weight: "fp64",
    kl_weight: "fp64",
    label_smoothing: "fp64",
    REDUCTION: tl.constexpr,
    SMOOTHED: tl.constexpr,
    LANES: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    dtype: tl.constexpr,
):
    """Loss, ce and kl of all rows with one read of the logits and of the teacher logits.

    Strides of rows and the number of classes count vectors of ``V`` numbers.
    """
    num_classes = num_classes * V
    program = tl.program_id(0).to(tl.int64)
    rows = program * R + tl.arange(0, R)
    y, live, known = load_targets(target, target_stride, rows, num_rows, num_classes, ignore_index)
    ce_of_rows, kl_of_rows, target_weight = rows_forward(
        logits,
        logits_row_stride * V,
        logits_stride,
        teacher,
        teacher_row_stride * V,
        teacher_stride,
        weight,
        weight_stride,
        state,
        rows,
        num_rows,
        y,
        live,
        known,
        num_classes,
        temperature,
        label_smoothing,
        SMOOTHED,
        LANES,
        V,
        R,
        CHUNKS,
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
        state,
        sums,
        counter,
        program,
        num_programs,
        temperature,
        ce_weight,
        kl_weight,
        REDUCTION,
        LANES,
        BLOCK,
    )


@triton.jit(do_not_specialize=["num_rows", "ignore_index"])
def loss_backward(
    logits,
    logits_row_stride,
    logits_stride,
    teacher,
    teacher_row_stride,
    teacher_stride,
    target,
    target_stride,
    weight,
    weight_stride,
    state,
    grad_loss,
    grad_loss_stride,
    grad_logits,
    num_rows,
    num_classes,
    ignore_index,
    temperature: "fp64",
    ce_weight: "fp64",
    kl_weight: "fp64",
    label_smoothing: "fp64",
    REDUCTION: tl.constexpr,
    SMOOTHED: tl.constexpr,
    LANES: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    CHUNKS: tl.constexpr,
    dtype: tl.constexpr,
):
    """Gradient ``grad_logits [B, C]``, contiguous, from what :func:`loss_forward` kept.

    Reads what the forward read and wrote, and writes B * C numbers. That of class c is
    ``of_p1 p1_c - hard [c = y] - share weight_c + kl_scale (p_c - q_c)`` with ``p1 = softmax(z)``.
    """
    temperature = tl.full((), temperature, dtype)
    label_smoothing = tl.full((), label_smoothing, dtype)
    num_classes = num_classes * V
    logits_row_stride = logits_row_stride * V
    teacher_row_stride = teacher_row_stride * V
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    y, live, known = load_targets(target, target_stride, rows, num_rows, num_classes, ignore_index)

    of_row = state + rows * ROW_STATE
    z_max = tl.load(of_row, mask=known, other=0).to(dtype)
    t_max = tl.load(of_row + 1, mask=known, other=0).to(dtype)
    sum_1 = tl.load(of_row + 2, mask=known, other=1).to(dtype)
    sum_t = tl.load(of_row + 3, mask=known, other=1).to(dtype)
    teacher_sum = tl.load(of_row + 4, mask=known, other=1).to(dtype)

    scale = tl.load(grad_loss + rows * grad_loss_stride, mask=known, other=0).to(dtype)
    ce_scale = scale * tl.full((), ce_weight, dtype)
    kl_scale = scale * tl.full((), kl_weight, dtype) * temperature
    if REDUCTION == REDUCTION_MEAN:
        totals = state + tl.full((), num_rows, tl.int64) * ROW_STATE
        ce_scale /= tl.load(totals).to(dtype)
        kl_scale /= tl.load(totals + 1).to(dtype)
    # A term of weight 0 is left out, whatever the incoming gradient is.
    ce_scale = tl.where(ce_weight > 0, ce_scale, 0)
    kl_scale = tl.where(kl_weight > 0, kl_scale, 0)
    hard = ce_scale * (1 - label_smoothing) * load_weights(weight, weight_stride, y, known, dtype)
    share = tl.zeros((R,), dtype)
    of_p1 = hard
    if SMOOTHED:
        share = ce_scale * label_smoothing / tl.load(of_row + 5, mask=known, other=1).to(dtype)
        of_p1 = hard + share * tl.load(of_row + 6, mask=known, other=0).to(dtype)
    of_p1 /= sum_1
    of_p = kl_scale / sum_t
    # Where no class has a soft label, this infinity times 0 makes the gradient NaN.
    of_q = kl_scale / teacher_sum

    base_2: tl.constexpr = LOG2_E / UNIT
    base_2_t = base_2 / temperature
    N: tl.constexpr = LANES * V * CHUNKS
    vector, column, offsets = first_tile(logits_stride, teacher_stride, LANES, V, CHUNKS)
    of_logits = logits + rows * logits_row_stride
    of_teacher = teacher + rows * teacher_row_stride
    of_grad = grad_logits + rows * num_classes
    exists_row = (rows < num_rows)[None, None, :, None]
    for begin in range(0, num_classes, N):
        of_rows = of_logits, of_teacher
        z, t, inside = load_tile(of_rows, offsets, begin, vector, num_classes, known, V, dtype)
        of_z = z * UNIT - z_max[None, None, :, None]
        of_t = t * UNIT - t_max[None, None, :, None]
        p1 = of_p1[None, None, :, None] * tl.exp2(of_z * base_2)
        p = of_p[None, None, :, None] * tl.exp2(of_z * base_2_t)
        q = of_q[None, None, :, None] * tl.exp2(of_t * base_2_t)
        # Where the target lies in this tile, so that 32 bits tell its class from others.
        place = tl.where((y >= begin) & (y - begin < N), y - begin, -1).to(tl.int32)
        is_target = column == place[None, None, :, None]
        grad = p1 - tl.where(is_target, hard[None, None, :, None], 0)
        grad += tl.where((kl_scale == 0)[None, None, :, None], 0, p - q)
        if SMOOTHED:
            w = load_weights(weight, weight_stride, begin + column, inside, dtype)
            grad -= share[None, None, :, None] * w
        grad = tl.where(z == NEVER, 0, grad)
        grad = tl.where((live & ~known)[None, None, :, None], float("nan"), grad)
        tl.store(of_grad[None, None, :, None] + column, grad, mask=exists_row & inside)
        of_logits += tl.full((), N, tl.int64) * logits_stride
        of_teacher += tl.full((), N, tl.int64) * teacher_stride
        of_grad += N
