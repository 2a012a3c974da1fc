"""The loss of rows and its gradient, tile by tile: csrc/common/row_loss.h for tiles.

A tile is ``[LANES, V, R, CHUNKS]``: of each of R rows, CHUNKS times LANES vectors of V classes that
lie side by side. Triton gives a thread whole vectors and all of its lane's chunks. What it adds up
is ``[LANES, R]``, so that nothing is exchanged before a row's end.

``z`` are logits, ``t`` teacher logits. A class whose logit is -inf does not exist: it has no
probability, no soft label and no part in label smoothing. A teacher logit of -inf means that the
class has no soft label.
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
    if values.dtype == tl.bfloat16:
        # As integers, the upper of two that were loaded together takes an instruction rather than
        # two: half an instruction less a number.
        bits = values.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        values = bits.to(tl.float32, bitcast=True)
    elif values.dtype == tl.float16:
        values = values.to(tl.float32)
    return values.to(dtype)


@triton.jit
def first_tile(logits_stride, teacher_stride, LANES: tl.constexpr, V: tl.constexpr, CHUNKS):
    """The vectors ``[LANES, 1, 1, CHUNKS]`` of a row's first tile and its classes, int32, and where
    these lie from a row's begin, int64, in logits and in teacher logits."""
    lane = tl.arange(0, LANES)[:, None, None, None]
    vector = tl.arange(0, CHUNKS)[None, None, None, :] * LANES + lane
    column = vector * V + tl.arange(0, V)[None, :, None, None]
    wide = column.to(tl.int64)
    return vector, column, (wide * logits_stride, wide * teacher_stride)


@triton.jit
def load_tile(of_rows, offsets, begin, vector, num_classes, rows, V: tl.constexpr, dtype):
    """Logits and teacher logits of the tile from class ``begin`` on, -inf in rows that ``rows``
    does not name and beyond the last class; and which vectors are not beyond it.

    ``of_rows`` are pointers ``[R]`` to what ``offsets`` count from.
    """
    inside = begin // V + vector < num_classes // V
    mask = rows[None, None, :, None] & inside
    z = tl.load(of_rows[0][None, None, :, None] + offsets[0], mask=mask, other=NEVER)
    t = tl.load(of_rows[1][None, None, :, None] + offsets[1], mask=mask, other=NEVER)
    return widened(z, dtype), widened(t, dtype), inside


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
def lowest(dtype: tl.constexpr):
    """What no finite logit lies below, in ``UNIT``: the maximum of no class, from which a distance
    is never NaN."""
    return -(2.0**1004) if dtype == tl.float64 else -(2.0**108)


@triton.jit
def no_classes(LANES: tl.constexpr, R: tl.constexpr, dtype: tl.constexpr):
    """The ``RowSums`` of R rows without a class, each ``[LANES, R]``.

    ``z_max, t_max, sum, sum_t, teacher_sum, cross``, and with label smoothing only ``num_existing,
    weight_sum, weighted_logits``; maxima, ``cross`` and ``weighted_logits`` in ``UNIT``, and
    ``cross`` times T. The maximum of no class is :func:`lowest`.
    """
    none = tl.full((LANES, R), lowest(dtype), dtype)
    zero = tl.zeros((LANES, R), dtype)
    return none, none, zero, zero, zero, zero, zero, zero, zero


@triton.jit
def relative_to(sums, new_z_max, new_t_max, temperature, SMOOTHED: tl.constexpr):
    """The sums of the same classes, relative to larger maxima."""
    z_max, t_max, sum_1, sum_t, teacher_sum, cross, num_existing, weight_sum, weighted_logits = sums
    base_2: tl.constexpr = LOG2_E / UNIT
    base_2_t = base_2 / temperature
    z_step, t_step = z_max - new_z_max, t_max - new_t_max
    sum_1 *= tl.exp2(z_step * base_2)
    sum_t *= tl.exp2(z_step * base_2_t)
    teacher_scale = tl.exp2(t_step * base_2_t)
    cross = teacher_scale * (cross + teacher_sum * (t_step - z_step))
    teacher_sum *= teacher_scale
    if SMOOTHED:
        weighted_logits += weight_sum * z_step
    z_max, t_max = new_z_max, new_t_max
    return z_max, t_max, sum_1, sum_t, teacher_sum, cross, num_existing, weight_sum, weighted_logits


@triton.jit
def _sum_of_thread(tile):
    """The sum ``[LANES, R]`` of what a thread has of each row."""
    return tl.sum(tl.sum(tile, 3), 1)


@triton.jit
def add_tile(sums, z, t, weight, temperature, SMOOTHED: tl.constexpr):
    """The sums with a tile added. ``weight`` is read with label smoothing only."""
    base_2: tl.constexpr = LOG2_E / UNIT
    base_2_t = base_2 / temperature
    exists = z != NEVER
    t = tl.where(exists, t, NEVER)
    new_z_max = tl.maximum(sums[0], tl.max(tl.max(z, 3), 1) * UNIT)
    new_t_max = tl.maximum(sums[1], tl.max(tl.max(t, 3), 1) * UNIT)
    moved = relative_to(sums, new_z_max, new_t_max, temperature, SMOOTHED)
    z_max, t_max, sum_1, sum_t, teacher_sum, cross, num_existing, weight_sum, weighted_logits = (
        moved
    )
    of_z = z * UNIT - z_max[:, None, :, None]
    of_t = t * UNIT - t_max[:, None, :, None]
    teacher_exp = tl.exp2(of_t * base_2_t)
    sum_1 += _sum_of_thread(tl.exp2(of_z * base_2))
    sum_t += _sum_of_thread(tl.exp2(of_z * base_2_t))
    teacher_sum += _sum_of_thread(teacher_exp)
    # 0 times the infinite distance of a class without a soft label would be NaN. No other class is
    # as far as this, and the larger of NaN and a number is the number.
    cross += _sum_of_thread(teacher_exp * tl.maximum(of_t - of_z, 4 * lowest(z.dtype)))
    if SMOOTHED:
        weighted_logits += _sum_of_thread(tl.where(exists, weight * of_z, 0))
        num_existing += _sum_of_thread(tl.where(exists, 1.0, 0.0).to(z.dtype))
        weight_sum += _sum_of_thread(tl.where(exists, weight, 0))
    return z_max, t_max, sum_1, sum_t, teacher_sum, cross, num_existing, weight_sum, weighted_logits


@triton.jit
def merge_lanes(sums, temperature, SMOOTHED: tl.constexpr):
    """The sums ``[R]`` of whole rows."""
    z_max, t_max = tl.max(sums[0], 0), tl.max(sums[1], 0)
    moved = relative_to(sums, z_max[None, :], t_max[None, :], temperature, SMOOTHED)
    _, _, sum_1, sum_t, teacher_sum, cross, num_existing, weight_sum, weighted_logits = moved
    sum_1, sum_t = tl.sum(sum_1, 0), tl.sum(sum_t, 0)
    teacher_sum, cross = tl.sum(teacher_sum, 0), tl.sum(cross, 0)
    if SMOOTHED:
        num_existing, weight_sum = tl.sum(num_existing, 0), tl.sum(weight_sum, 0)
        weighted_logits = tl.sum(weighted_logits, 0)
    else:
        # Zeros of all lanes would be added up as other numbers are.
        num_existing = tl.zeros_like(sum_1)
        weight_sum, weighted_logits = num_existing, num_existing
    return z_max, t_max, sum_1, sum_t, teacher_sum, cross, num_existing, weight_sum, weighted_logits


@triton.jit
def in_lanes(values, first: tl.constexpr, LANES: tl.constexpr):
    """A tile ``[R, LANES]`` that has in lane i ``values[first + i]``, each ``[R]``.

    The lanes of a row know its values, so that each stores another one at once and nothing is
    exchanged, as it would be for tensors ``[R]``.
    """
    lane = tl.arange(0, LANES)[None, :]
    tile = values[first][:, None].broadcast_to(values[first].shape[0], LANES)
    for i in tl.static_range(1, LANES):
        if first + i < len(values):
            tile = tl.where(lane == i, values[first + i][:, None], tile)
    return tile


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
    kl = cross / (teacher_sum * (UNIT * temperature)) + tl.log(sum_t / teacher_sum)
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
    LANES: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    CHUNKS: tl.constexpr,
    dtype: tl.constexpr,
):
    """Terms of R rows: ce, kl and the target's weight, ``[R]``; what the backward needs is stored.

    ``live`` are the rows that exist and are not ignored, ``known`` those of them whose target is a
    class: the others are NaN, and nothing of them is read.
    """
    temperature = tl.full((), temperature, dtype)
    label_smoothing = tl.full((), label_smoothing, dtype)
    N: tl.constexpr = LANES * V * CHUNKS
    vector, column, offsets = first_tile(logits_stride, teacher_stride, LANES, V, CHUNKS)
    of_logits = logits + rows * logits_row_stride
    of_teacher = teacher + rows * teacher_row_stride
    # On their way from memory along with the classes.
    z_target = tl.load(of_logits + y * logits_stride, mask=known, other=NEVER)
    w_target = load_weights(weight, weight_stride, y, known, dtype)
    sums = no_classes(LANES, R, dtype)
    for begin in range(0, num_classes, N):
        of_rows = of_logits, of_teacher
        z, t, inside = load_tile(of_rows, offsets, begin, vector, num_classes, known, V, dtype)
        w = load_weights(weight, weight_stride, begin + column, inside, dtype)
        sums = add_tile(sums, z, t, w, temperature, SMOOTHED)
        of_logits += tl.full((), N, tl.int64) * logits_stride
        of_teacher += tl.full((), N, tl.int64) * teacher_stride
    sums = merge_lanes(sums, temperature, SMOOTHED)
    z_target = widened(z_target, dtype)
    ce, kl = terms_of(sums, z_target, w_target, temperature, label_smoothing, SMOOTHED)
    # ``num_existing`` and ``weight_sum`` are for label smoothing only.
    kept = (sums[0], sums[1], sums[2], sums[3], sums[4], sums[6], sums[7])
    num_kept: tl.constexpr = 7 if SMOOTHED else 5
    lane = tl.arange(0, LANES)[None, :]
    of_rows = state + (rows * ROW_STATE)[:, None] + lane
    for first in tl.static_range(0, num_kept, LANES):
        wanted = (rows < num_rows)[:, None] & (lane < num_kept - first)
        tl.store(of_rows + first, in_lanes(kept, first, LANES).to(tl.float64), mask=wanted)
    unknown = live & ~known
    ce = tl.where(unknown, float("nan"), tl.where(live, ce, 0))
    kl = tl.where(unknown, float("nan"), tl.where(live, kl, 0))
    return ce, kl, w_target
