"""What a linear head's matrix products are made of, and the row loss of their results.

With ``E_c = w_c * h``, elementwise,

    z = h W^T,   dots = (h^2 * w_y) W^T,   sq_norms = h^2 (W^2)^T.

Similarities are ratios: a power of two that brings each row of features, or the whole weight, near
1 changes nothing in them but keeps squares in range. ``mean [2, D]`` is the weight's mean over the
classes in two parts, of which the second is what the first lost in rounding; None where it is not
taken away.
"""

import triton
import triton.language as tl

from introkernels.ops.triton.kernels.losses import (
    ROW_STATE,
    float64_options,
    load_targets,
    load_weights,
    rows_forward,
)
from introkernels.ops.triton.kernels.reduction import finish_losses, total_weight
from introkernels.ops.triton.kernels.teachers import as_numbers, load_tile


@triton.jit
def scale_near_one(largest):
    """Two powers of two whose product brings ``largest`` into [1/2, 1); ones for inf and NaN.

    Two, because the whole could overflow. What is too small to be normal is scaled as much as the
    smallest normal number.
    """
    if largest.dtype == tl.float64:
        field = (largest.to(tl.int64, bitcast=True) >> 52) & 0x7FF
        exponent = tl.where(field == 0x7FF, 0, 1022 - field)
        half = exponent >> 1
        first = ((half + 1023) << 52).to(tl.float64, bitcast=True)
        second = ((exponent - half + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        field = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
        exponent = tl.where(field == 0xFF, 0, 126 - field)
        half = exponent >> 1
        first = ((half + 127) << 23).to(tl.float32, bitcast=True)
        second = ((exponent - half + 127) << 23).to(tl.float32, bitcast=True)
    return first, second


@triton.jit
def load_weight_scale(largest, num_parts, dtype: tl.constexpr):
    """The powers of two for the weight, from the largest numbers of its ``num_parts`` parts."""
    top = tl.zeros((128,), dtype)
    for begin in range(0, num_parts, 128):
        part = begin + tl.arange(0, 128)
        top = tl.maximum(top, tl.load(largest + part, mask=part < num_parts, other=0))
    return scale_near_one(tl.max(top, 0))


@triton.jit
def load_mean(mean, columns, width):
    """The two parts of the mean at ``columns [K]``."""
    inside = columns < width
    return (
        tl.load(mean + columns, mask=inside, other=0),
        tl.load(mean + width + columns, mask=inside, other=0),
    )


@triton.jit
def without_mean(values, mean):
    """A tile of the weight ``[N, K]`` less its mean in two parts, rounded to its own type."""
    upper, lower = mean
    return (values - upper[None, :]) - lower[None, :]


@triton.jit
def survey_weight(
    weight,
    weight_strides,
    mean,
    largest,
    num_classes,
    width,
    N: tl.constexpr,
    K: tl.constexpr,
    dtype: tl.constexpr,
):
    """Mean over the classes and largest magnitude of the weight as it is explained.

    A program owns K columns: it reads them once, twice with ``mean``, of which it writes its part,
    and writes one number to ``largest``.
    """
    program = tl.program_id(0)
    columns = program * K + tl.arange(0, K)
    if mean is not None:
        total = tl.zeros((N, K), tl.float64)
        for begin in range(0, num_classes, N):
            classes = begin + tl.arange(0, N).to(tl.int64)
            mask = (classes < num_classes)[:, None] & (columns < width)[None, :]
            total += load_tile(weight, weight_strides, classes, columns, mask, 0.0, tl.float64)
        exact = tl.sum(total, 0) / num_classes
        upper = exact.to(dtype)
        tl.store(mean + columns, upper, mask=columns < width)
        lower = (exact - upper.to(tl.float64)).to(dtype)
        tl.store(mean + width + columns, lower, mask=columns < width)
    top = tl.zeros((N, K), dtype)
    for begin in range(0, num_classes, N):
        classes = begin + tl.arange(0, N).to(tl.int64)
        mask = (classes < num_classes)[:, None] & (columns < width)[None, :]
        values = load_tile(weight, weight_strides, classes, columns, mask, 0.0, dtype)
        if mean is not None:
            values = without_mean(values, (upper, lower))
        top = tl.maximum(top, tl.where(mask, tl.abs(values), 0))
    tl.store(largest + program, tl.max(tl.max(top, 1), 0))


@triton.jit(do_not_specialize=["num_parts"])
def explain_weight(
    weight,
    weight_strides,
    mean,
    largest,
    wide,
    squares,
    num_parts,
    num_classes,
    width,
    N: tl.constexpr,
    K: tl.constexpr,
    dtype: tl.constexpr,
):
    """The weight as it is explained, but for its scale, and its scaled squares.

    A program reads a tile of ``weight [C, D]`` and writes it to ``wide`` (None where it is not
    wanted) and ``squares``, contiguous ``[C, D]`` of the computing type.
    """
    classes = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    columns = tl.program_id(1) * K + tl.arange(0, K)
    mask = (classes < num_classes)[:, None] & (columns < width)[None, :]
    offsets = (classes * width)[:, None] + columns[None, :]
    values = load_tile(weight, weight_strides, classes, columns, mask, 0.0, dtype)
    if mean is not None:
        values = without_mean(values, load_mean(mean, columns, width))
    if wide is not None:
        tl.store(wide + offsets, values, mask=mask)
    first, second = load_weight_scale(largest, num_parts, dtype)
    values = values * first * second
    tl.store(squares + offsets, values * values, mask=mask)


@triton.jit
def load_features(features, features_strides, rows, live, columns, width, dtype: tl.constexpr):
    """Features of ``rows [R]`` at ``columns [K]``; zeros where a row is not ``live``."""
    mask = live[:, None] & (columns < width)[None, :]
    return load_tile(features, features_strides, rows, columns, mask, 0.0, dtype)


@triton.jit
def load_row_scale(
    features,
    features_strides,
    rows,
    live,
    width,
    R: tl.constexpr,
    K: tl.constexpr,
    dtype: tl.constexpr,
):
    """The powers of two for ``rows [R]`` of the features: a walk over their numbers."""
    top = tl.zeros((R,), dtype)
    for begin in range(0, width, K):
        columns = begin + tl.arange(0, K)
        h = load_features(features, features_strides, rows, live, columns, width, dtype)
        top = tl.maximum(top, tl.max(tl.abs(h), 1))
    return scale_near_one(top)


@triton.jit(do_not_specialize=["num_parts", "first_row", "num_rows", "ignore_index"])
def explain_rows(
    features,
    features_strides,
    target,
    target_stride,
    explained,
    explained_strides,
    largest,
    wide,
    squares,
    squares_of_target,
    num_parts,
    first_row,
    num_rows,
    num_classes,
    width,
    ignore_index,
    R: tl.constexpr,
    K: tl.constexpr,
    dtype: tl.constexpr,
):
    """The left sides of the products for ``num_rows`` rows of the features from ``first_row`` on.

    A program owns R rows: it reads their features twice and the weight of their target once, and
    writes three contiguous matrices ``[num_rows, D]``: the features themselves, zeros in ignored
    rows, whose numbers must not reach the gradient of the weight; their scaled squares; and these
    times the weight of the target. ``explained`` is not scaled, so that the last is scaled twice.
    """
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    place = first_row.to(tl.int64)
    target += place * target_stride
    y, live, known = load_targets(target, target_stride, rows, num_rows, num_classes, ignore_index)
    features += place * features_strides[0]
    row_first, row_second = load_row_scale(
        features, features_strides, rows, live, width, R, K, dtype
    )
    first, second = load_weight_scale(largest, num_parts, dtype)
    for begin in range(0, width, K):
        columns = begin + tl.arange(0, K)
        inside = (columns < width)[None, :]
        h = load_features(features, features_strides, rows, live, columns, width, dtype)
        w = load_tile(explained, explained_strides, y, columns, known[:, None] & inside, 0.0, dtype)
        offsets = (rows * width)[:, None] + columns[None, :]
        mask = (rows < num_rows)[:, None] & inside
        tl.store(wide + offsets, h, mask=mask)
        h = h * row_first[:, None] * row_second[:, None]
        square = h * h
        tl.store(squares + offsets, square, mask=mask)
        of_target = square * (w * first * second) * first * second
        tl.store(squares_of_target + offsets, of_target, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "ignore_index"])
def sum_targets(
    target,
    target_stride,
    weight,
    weight_stride,
    totals,
    num_rows,
    num_classes,
    ignore_index,
    BLOCK: tl.constexpr,
    dtype: tl.constexpr,
):
    """``totals``: the total weight of all targets, and the number of rows that are not ignored.

    One program reads 8 bytes a row, in the order in which a forward adds them up.
    """
    weight_sum = tl.zeros((BLOCK,), tl.float64)
    num_live = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, num_rows, BLOCK):
        rows = begin + tl.arange(0, BLOCK).to(tl.int64)
        y, live, known = load_targets(
            target, target_stride, rows, num_rows, num_classes, ignore_index
        )
        weight_sum += load_weights(weight, weight_stride, y, known, dtype).to(tl.float64)
        num_live += tl.where(live, 1.0, 0.0).to(tl.float64)
    tl.store(totals, total_weight(tl.sum(weight_sum, 0)))
    tl.store(totals + 1, tl.sum(num_live, 0))


@triton.jit(
    do_not_specialize=["first_row", "chunk_rows", "num_rows", "num_programs", "ignore_index"]
)
def chunk_forward(
    logits,
    dots,
    sq_norms,
    strides,
    target,
    target_stride,
    weight,
    weight_stride,
    loss,
    ce,
    kl,
    row_state,
    totals,
    terms,
    counter,
    first_row,
    chunk_rows,
    num_rows,
    num_programs,
    num_classes,
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
    """The forward of ``chunk_rows`` rows from ``first_row`` on, whose products stand in matrices.

    Reads three numbers of each class (and more with split labels), writes 104 bytes a row. The
    chunks share a counter of ``num_programs`` programs: the last one of the last chunk reduces.
    """
    temperature, ce_weight, kl_weight, label_smoothing, labels = float64_options(
        temperature, ce_weight, kl_weight, label_smoothing, similarity_temperature, non_target_mass
    )
    num_classes = num_classes * VECTOR
    strides = as_numbers(strides, VECTOR)
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    place = first_row.to(tl.int64)
    y, live, known = load_targets(
        target + place * target_stride, target_stride, rows, chunk_rows, num_classes, ignore_index
    )
    ce_of_rows, kl_of_rows, target_weight = rows_forward(
        logits,
        strides,
        y,
        rows < chunk_rows,
        live,
        known,
        (dots, strides, sq_norms, strides, None, strides, None),
        weight,
        weight_stride,
        row_state + place * ROW_STATE,
        rows,
        num_classes,
        num_classes,
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
        # Rows past the end of the chunk are those of another program.
        tl.where(rows < chunk_rows, place + rows, num_rows),
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
