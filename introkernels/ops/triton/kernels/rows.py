"""The loss of rows and its gradient, tile by tile: csrc/common/row_loss.h for tiles.

A tile is ``[R, N]``: N classes of R rows. ``z`` are logits, ``t`` teacher logits. A class whose
logit is -inf does not exist: it has no probability, no soft label and no part in label smoothing.
A teacher logit of -inf means that the class has no soft label.
"""

import triton
import triton.language as tl

NEVER = tl.constexpr(float("-inf"))
LOG2_E = tl.constexpr(1.4426950408889634)
# Logits are held as this part of themselves, which is exact, so that no difference of two of them
# overflows, nor the sum of a row's.
UNIT = tl.constexpr(2.0**-20)
ROW_STATE = tl.constexpr(9)


@triton.jit
def widened(values, dtype: tl.constexpr):
    """``values`` in the compute type."""
    # From half types to float64 through float32: Triton's interpreter knows no other way.
    if values.dtype.primitive_bitwidth == 16:
        values = values.to(tl.float32)
    return values.to(dtype)


@triton.jit
def load_tile(pointer, row_stride, stride, rows, columns, mask, dtype: tl.constexpr):
    """Logits at int64 ``rows [R]`` and ``columns [N]``, -inf where the mask is false."""
    offsets = (rows * row_stride)[:, None] + columns[None, :].to(tl.int64) * stride
    return widened(tl.load(pointer + offsets, mask=mask, other=NEVER), dtype)


@triton.jit
def load_weights(weight, weight_stride, columns, mask, dtype: tl.constexpr):
    """Class weights of ``columns``, ones without any; 0 where the mask is false."""
    if weight is None:
        weights = tl.where(mask, 1.0, 0.0)
    else:
        weights = tl.load(weight + columns.to(tl.int64) * weight_stride, mask=mask, other=0)
    return widened(weights, dtype)


@triton.jit
def load_targets(target, target_stride, rows, num_rows, num_classes, ignore_index):
    """Targets ``[R]``, the rows that are not ignored, and those of them that name a class."""
    # A row past the end counts as ignored.
    y = tl.load(target + rows * target_stride, mask=rows < num_rows, other=0)
    live = (rows < num_rows) & (y != ignore_index)
    return y, live, live & (y >= 0) & (y < num_classes)


@triton.jit
def no_classes(R: tl.constexpr, dtype: tl.constexpr):
    """The ``RowSums`` of R rows without a class, each ``[R]``.

    ``z_max, t_max, sum, sum_t, teacher_sum, cross``, and with label smoothing only ``num_existing,
    weight_sum, weighted_logits``; maxima, ``cross`` and ``weighted_logits`` in ``UNIT``, and
    ``cross`` times T.
    """
    never = tl.full((R,), NEVER, dtype)
    zero = tl.zeros((R,), dtype)
    return never, never, zero, zero, zero, zero, zero, zero, zero


@triton.jit
def distances_from(largest):
    """What distances are taken from: the largest logit, 0 where there is no class."""
    return tl.where(largest == NEVER, 0, largest)


@triton.jit
def add_tile(sums, z, t, weight, temperature, SMOOTHED: tl.constexpr):
    """The sums with a tile added. ``weight [1, N]`` is read with label smoothing only."""
    z_max, t_max, sum_1, sum_t, teacher_sum, cross, num_existing, weight_sum, weighted_logits = sums
    base_2: tl.constexpr = LOG2_E / UNIT
    base_2_t = base_2 / temperature
    exists = z != NEVER
    t = tl.where(exists, t, NEVER) * UNIT
    z = z * UNIT
    new_z_max, new_t_max = tl.maximum(z_max, tl.max(z, 1)), tl.maximum(t_max, tl.max(t, 1))
    z_top, t_top = distances_from(new_z_max), distances_from(new_t_max)

    # What came before, relative to the new maxima.
    z_step, t_step = z_max - z_top, t_max - t_top
    sum_1 *= tl.exp2(z_step * base_2)
    sum_t *= tl.exp2(z_step * base_2_t)
    # Where there is nothing to move, a step may be infinite.
    cross += tl.where(teacher_sum == 0, 0, teacher_sum * (t_step - z_step))
    teacher_scale = tl.exp2(t_step * base_2_t)
    teacher_sum *= teacher_scale
    cross *= teacher_scale

    of_z, of_t = z - z_top[:, None], t - t_top[:, None]
    teacher_exp = tl.exp2(of_t * base_2_t)
    sum_1 += tl.sum(tl.exp2(of_z * base_2), 1)
    sum_t += tl.sum(tl.exp2(of_z * base_2_t), 1)
    teacher_sum += tl.sum(teacher_exp, 1)
    # 0 times the infinite distance of a class without a soft label would be NaN.
    cross += tl.sum(tl.where(teacher_exp == 0, 0, teacher_exp * (of_t - of_z)), 1)
    if SMOOTHED:
        weighted_logits += tl.where(weight_sum == 0, 0, weight_sum * z_step)
        weighted_logits += tl.sum(tl.where(exists, weight * of_z, 0), 1)
        num_existing += tl.sum(tl.where(exists, 1.0, 0.0).to(z.dtype), 1)
        weight_sum += tl.sum(tl.where(exists, weight, 0), 1)
    return (
        new_z_max,
        new_t_max,
        sum_1,
        sum_t,
        teacher_sum,
        cross,
        num_existing,
        weight_sum,
        weighted_logits,
    )


@triton.jit
def terms_of(sums, z_target, weight_target, temperature, label_smoothing, SMOOTHED: tl.constexpr):
    """The two terms of rows whose targets have these logits and weights.

    A teacher that excludes every class is no distribution: 0 / 0 makes its KL NaN.
    """
    z_max, _, sum_1, sum_t, teacher_sum, cross, num_existing, weight_sum, weighted_logits = sums
    log_sum = tl.log(sum_1)
    has_target = z_target != NEVER
    nll = log_sum - (z_target * UNIT - z_max) / UNIT
    ce = tl.where(has_target, weight_target * nll, 0)
    if SMOOTHED:
        share = label_smoothing / num_existing
        of_all = share * weight_sum * log_sum - share * weighted_logits / UNIT
        ce = (1 - label_smoothing) * ce + of_all
    # The infinity of a target that does not exist comes last, so that no weight of zero turns it
    # into NaN.
    ce = tl.where(has_target, ce, ce + float("inf"))
    kl = cross / teacher_sum / (UNIT * temperature) + tl.log(sum_t / teacher_sum)
    nothing = sum_1 == 0
    return tl.where(nothing, float("inf"), ce), tl.where(nothing, 0, kl)


@triton.jit
def rows_forward(
    logits,
    logits_row_stride,
    logits_stride,
    teacher,
    teacher_row_stride,
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
    SMOOTHED: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    dtype: tl.constexpr,
):
    """Terms of R rows: ce, kl and the target's weight, ``[R]``; what the backward needs is stored.

    ``live`` are the rows that exist and are not ignored, ``known`` those of them whose target is a
    class: the others are NaN, and nothing of them is read.
    """
    temperature = tl.full((), temperature, dtype)
    label_smoothing = tl.full((), label_smoothing, dtype)
    sums = no_classes(R, dtype)
    for begin in range(0, num_classes, N):
        columns = begin + tl.arange(0, N)
        inside = columns < num_classes
        mask = known[:, None] & inside[None, :]
        z = load_tile(logits, logits_row_stride, logits_stride, rows, columns, mask, dtype)
        t = load_tile(teacher, teacher_row_stride, teacher_stride, rows, columns, mask, dtype)
        w = load_weights(weight, weight_stride, columns, inside, dtype)[None, :]
        sums = add_tile(sums, z, t, w, temperature, SMOOTHED)
    for i in tl.static_range(ROW_STATE):
        tl.store(state + rows * ROW_STATE + i, sums[i].to(tl.float64), mask=rows < num_rows)
    at_target = logits + rows * logits_row_stride + y * logits_stride
    z_target = widened(tl.load(at_target, mask=known, other=NEVER), dtype)
    w_target = load_weights(weight, weight_stride, y, known, dtype)
    ce, kl = terms_of(sums, z_target, w_target, temperature, label_smoothing, SMOOTHED)
    unknown = live & ~known
    ce = tl.where(unknown, float("nan"), tl.where(live, ce, 0))
    kl = tl.where(unknown, float("nan"), tl.where(live, kl, 0))
    return ce, kl, w_target
