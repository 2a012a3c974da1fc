"""Teacher logits of tiles: given ones, or those that explanation statistics stand for.

Kernels are handed a teacher as ``first, second, class_index, scratch`` and their strides: teacher
logits ``[B, C]`` and three times None, or dots and sq_norms ``[B, K]``. Where the K explained
classes are not all classes in order, ``class_index [B, K]`` names them and ``scratch [B, C]``
receives the logits, because a tile of classes can't tell by itself which of them are explained.
"""

import triton
import triton.language as tl

from introkernels.ops.triton.kernels.math import NEVER, log1p, widened


@triton.jit
def as_numbers(strides, vector=1):
    """The strides of a matrix, of which that of its rows counts vectors of so many elements.

    A stride of 1 comes as a constant, and constants of nested tuples don't survive Triton's loops.
    Assigned to a name it is a number like others, which the compiler still knows.
    """
    row, column = strides
    row = row * vector
    return row, column


@triton.jit
def load_tile(pointer, strides, rows, columns, mask, other, dtype: tl.constexpr):
    """The tile of a matrix at int64 ``rows [R]`` and ``columns [N]`` or ``[R, N]``."""
    if len(columns.shape) == 1:
        columns = columns[None, :]
    offsets = (rows * strides[0])[:, None] + columns.to(tl.int64) * strides[1]
    return widened(tl.load(pointer + offsets, mask=mask, other=other), dtype)


@triton.jit
def inverse_root(x):
    """``1 / sqrt(x)`` in float64, good to 1e-13, of float64 numbers that float32 can hold.

    A root of float32 and a step of Newton's method take a fraction of the time of a root and a
    division of float64.
    """
    # Float32 roots take the smallest numbers for 0.
    tiny = x < 1e-30
    x = tl.where(tiny, x * 1.2676506002282294e30, x)
    guess = tl.rsqrt(x.to(tl.float32)).to(tl.float64)
    root = guess * (1.5 - (0.5 * x) * (guess * guess))
    return tl.where(tiny, root * 1.125899906842624e15, root)


@triton.jit
def similarity_logits(
    dots,
    sq_norms,
    sq_norm_target,
    similarity_temperature,
    PROJECTION: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
):
    """``(s - 1) / tau`` in float64 for the similarities s of explanations to the target's.

    All arguments are float64, because small angles show in the last digits; ``IN_FLOAT32`` says
    that float32 can hold the statistics. The target's own logit, which is 0 by definition, is left
    to the caller.
    """
    if PROJECTION:
        is_zero = sq_norm_target == 0
        is_unknown = sq_norm_target == float("inf")
        scale = tl.where(is_zero, 1, sq_norm_target)
        if IN_FLOAT32:
            s = dots * (1 / scale)
        else:
            s = dots / scale
    else:
        is_zero = (sq_norms == 0) | (sq_norm_target == 0)
        is_unknown = (sq_norms == float("inf")) | (sq_norm_target == float("inf"))
        # Two roots rather than the root of the product, which would underflow.
        if IN_FLOAT32:
            s = dots * (inverse_root(sq_norms) * inverse_root(sq_norm_target))
        else:
            s = dots / tl.where(is_zero, 1, tl.sqrt(sq_norms) * tl.sqrt(sq_norm_target))
    s = tl.where(is_zero, 0, s)
    # A norm that overflowed says nothing of the angle; dot / inf would pass for a right one.
    s = tl.where(is_unknown, float("nan"), s)
    # In this order NaN passes.
    s = tl.where(s < -1, -1, s)
    s = tl.where(s > 1, 1, s)
    return (s - 1) * (1 / similarity_temperature)


@triton.jit
def explained_tile(
    teacher, rows, places, mask, sq_norm_target, similarity_temperature, PROJECTION: tl.constexpr
):
    """The logits that statistics stand for at ``places [N]`` among the explained classes."""
    dots, dots_strides, sq_norms, sq_norms_strides, _, _, _ = teacher
    return similarity_logits(
        load_tile(dots, dots_strides, rows, places, mask, 0.0, tl.float64),
        load_tile(sq_norms, sq_norms_strides, rows, places, mask, 0.0, tl.float64),
        sq_norm_target[:, None],
        similarity_temperature,
        PROJECTION,
        sq_norms.dtype.element_ty != tl.float64,
    )


@triton.jit
def _add_others(state, t, temperature):
    """Largest logit and sum of exponentials, both ``[R]``, with a tile of the others added."""
    top, total = state
    new_top = tl.maximum(top, tl.max(t, 1))
    reference = tl.where(new_top == NEVER, 0, new_top)
    old = total * tl.exp((top - reference) / temperature)
    return new_top, old + tl.sum(tl.exp((t - reference[:, None]) / temperature), 1)


@triton.jit
def _split_shifts(state, has_target, non_target_mass, temperature):
    """What split labels add to the logits of the others, and the target's own logit: both ``[R]``.

    The labels at T are ``1 - mass`` at the target, and ``mass`` shared by the others as their
    logits say.
    """
    top, total = state
    has_others = total != 0
    # Where one of the two sides does not exist, the other one holds all of the mass.
    mass = tl.where(has_others, tl.where(has_target, non_target_mass, 1), 0)
    of_others = temperature * (tl.log(mass) - tl.log(tl.where(has_others, total, 1)))
    of_target = temperature * log1p(-mass)
    largest = tl.maximum(of_others, of_target)
    return (of_others - largest) - tl.where(has_others, top, 0), of_target - largest


@triton.jit
def prepare_teacher(
    teacher,
    logits,
    logits_strides,
    rows,
    live,
    target,
    num_classes,
    num_explained,
    temperature,
    labels,
    PROJECTION: tl.constexpr,
    SPLIT: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    dtype: tl.constexpr,
):
    """What a tile of teacher logits needs of its rows, and whether each row has a teacher.

    ``labels`` are similarity_temperature and non_target_mass. Returns ``[R]`` tensors: the squared
    norm of the target's explanation, what is added to the logits of the other classes, the logit
    of the target; and the rows, of those ``live``, whose target is explained and whose explained
    classes all exist among ``num_classes``. Teachers with a ``class_index`` are written to their
    ``scratch``.
    """
    similarity_temperature, non_target_mass = labels
    _, _, sq_norms, sq_norms_strides, class_index, index_strides, scratch = teacher
    sq_norm_target = tl.zeros((R,), tl.float64)
    shift = tl.zeros((R,), tl.float64)
    of_target = tl.zeros((R,), tl.float64)

    if sq_norms is None:
        # Given teacher logits are read as they are.
        tl.static_assert(class_index is None)
    elif class_index is None:
        places = rows * sq_norms_strides[0] + target * sq_norms_strides[1]
        sq_norm_target = widened(tl.load(sq_norms + places, mask=live, other=0), tl.float64)
    else:
        found = tl.zeros((R,), tl.int32)
        outside = tl.zeros((R,), tl.int32)
        for begin in range(0, num_explained, N):
            k = begin + tl.arange(0, N)
            mask = live[:, None] & (k < num_explained)[None, :]
            c = load_tile(class_index, index_strides, rows, k, mask, 0, tl.int64)
            is_target = mask & (c == target[:, None])
            squares = load_tile(sq_norms, sq_norms_strides, rows, k, is_target, 0.0, tl.float64)
            sq_norm_target += tl.sum(squares, 1)
            found += tl.sum(is_target.to(tl.int32), 1)
            outside += tl.sum((mask & ((c < 0) | (c >= num_classes))).to(tl.int32), 1)
        live = live & (found > 0) & (outside == 0)

    if SPLIT:
        others = tl.full((R,), NEVER, tl.float64), tl.zeros((R,), tl.float64)
        for begin in range(0, num_explained, N):
            k = begin + tl.arange(0, N)
            mask = live[:, None] & (k < num_explained)[None, :]
            if class_index is None:
                c = k[None, :] + tl.zeros((R, 1), tl.int64)
            else:
                c = load_tile(class_index, index_strides, rows, k, mask, 0, tl.int64)
            z = load_tile(logits, logits_strides, rows, c, mask, NEVER, dtype)
            t = explained_tile(
                teacher, rows, k, mask, sq_norm_target, similarity_temperature, PROJECTION
            )
            is_other = mask & (z != NEVER) & (c != target[:, None])
            others = _add_others(others, tl.where(is_other, t, NEVER), temperature)
        z_target = tl.load(
            logits + rows * logits_strides[0] + target * logits_strides[1], mask=live, other=NEVER
        )
        has_target = widened(z_target, dtype) != NEVER
        shift, of_target = _split_shifts(others, has_target, non_target_mass, temperature)

    if class_index is not None:
        # Every class of the row is without a label until an explanation names it.
        start = scratch + rows[:, None] * num_classes
        for begin in range(0, num_classes, N):
            c = begin + tl.arange(0, N)
            mask = live[:, None] & (c < num_classes)[None, :]
            tl.store(start + c[None, :], tl.full((R, N), NEVER, dtype), mask=mask)
        tl.debug_barrier()
        for begin in range(0, num_explained, N):
            k = begin + tl.arange(0, N)
            mask = live[:, None] & (k < num_explained)[None, :]
            c = load_tile(class_index, index_strides, rows, k, mask, 0, tl.int64)
            t = explained_tile(
                teacher, rows, k, mask, sq_norm_target, similarity_temperature, PROJECTION
            )
            t = tl.where(c == target[:, None], of_target[:, None], t + shift[:, None])
            tl.store(start + c, t.to(dtype), mask=mask)
        tl.debug_barrier()
    return sq_norm_target, shift, of_target, live


@triton.jit
def teacher_tile(
    teacher,
    prepared,
    rows,
    columns,
    mask,
    is_target,
    num_classes,
    similarity_temperature,
    PROJECTION: tl.constexpr,
    dtype: tl.constexpr,
):
    """Teacher logits ``[R, N]`` of the classes ``columns``; anything beyond the mask."""
    first, first_strides, sq_norms, _, class_index, _, scratch = teacher
    sq_norm_target, shift, of_target, _ = prepared
    if sq_norms is None:
        t = load_tile(first, first_strides, rows, columns, mask, NEVER, dtype)
    elif class_index is None:
        t = explained_tile(
            teacher, rows, columns, mask, sq_norm_target, similarity_temperature, PROJECTION
        )
        t = tl.where(is_target, of_target[:, None], t + shift[:, None]).to(dtype)
    else:
        # Written by other threads of this program: not from a cache that missed it.
        offsets = rows[:, None] * num_classes + columns[None, :]
        t = tl.load(scratch + offsets, mask=mask, other=NEVER, cache_modifier=".cg")
    return t
