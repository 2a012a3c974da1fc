"""Explanation statistics: each gradient read once, ``dots`` and ``sq_norms`` written.

The dimensions of a row's explanations are cut into slices, and its classes into groups where the
rows alone would leave a GPU idle. A program owns one slice and one group: it keeps the inputs and
the target's explanation of its slice in registers and walks its classes. Sums of several slices go
through memory; the last program of a row to arrive adds them up, in their order.

The fused introspective loss begins with the same functions: see :func:`row_statistics`.
"""

import triton
import triton.language as tl

from introkernels.ops.triton.kernels.reduction import is_last_to_arrive
from introkernels.ops.triton.kernels.statistics_slice import slice_statistics, target_position

# What doesn't change how kernels of statistics should be compiled.
NOT_SPECIALIZED = (
    "ignore_index",
    "num_slices",
    "num_groups",
    "classes_of_group",
    "row_stride",
    "class_stride",
    "inputs_row_stride",
    "target_stride",
    "index_row_stride",
    "index_stride",
)


@triton.jit
def collect_statistics(partial, dots, sq_norms, num_classes, num_slices, SHAPE: tl.constexpr):
    """Add up the slices ``partial [num_slices, 2, K]`` of a row, in float64 and in a fixed order.

    ``dots`` and ``sq_norms`` point to the row's K results.
    """
    BLOCK_SLICES: tl.constexpr = SHAPE.block_slices
    BLOCK_SUMS: tl.constexpr = SHAPE.block_sums
    num_sums = 2 * num_classes
    for first in tl.range(0, num_sums, BLOCK_SUMS):
        column = first + tl.arange(0, BLOCK_SUMS)
        total = tl.zeros((BLOCK_SLICES, BLOCK_SUMS), tl.float64)
        for first_slice in tl.range(0, num_slices, BLOCK_SLICES):
            number = first_slice + tl.arange(0, BLOCK_SLICES)
            total += tl.load(
                partial + number.to(tl.int64)[:, None] * num_sums + column[None, :],
                mask=(number < num_slices)[:, None] & (column < num_sums)[None, :],
                other=0.0,
                cache_modifier=".cg",
            ).to(tl.float64)
        sums = tl.sum(total, axis=0)
        of_dots = column < num_classes
        tl.store(dots + column, sums.to(dots.dtype.element_ty), mask=of_dots)
        tl.store(
            sq_norms + (column - num_classes),
            sums.to(sq_norms.dtype.element_ty),
            mask=(column < num_sums) & ~of_dots,
        )


@triton.jit
def share_of_program(num_slices, num_groups):
    """The row (int64), slice and group of classes of this program."""
    program = tl.program_id(0)
    of_row = program // num_groups
    return (of_row // num_slices).to(tl.int64), of_row % num_slices, program % num_groups


@triton.jit
def row_statistics(
    gradients,
    inputs,
    target,
    class_index,
    dots,
    sq_norms,
    partial,
    counters,
    ignore_index,
    num_classes,
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
    SHAPE: tl.constexpr,
    TICKET: tl.constexpr,
):
    """This program's share of the statistics, and those of its row where they are complete with it.

    Returns the row (int64), its target, the target's position among the row's classes (-1 where it
    has none, or is ignored) and whether ``dots`` and ``sq_norms [B, K]`` hold the row's statistics
    now: true in one program of each row, under ``TICKET``. Another part of that program reads them
    after ``tl.debug_barrier()``. An ignored row has zeros, and nothing of it is read.
    """
    row, slice_number, group = share_of_program(num_slices, num_groups)
    target_class = tl.load(target + row * target_stride)
    dots += row * num_classes
    sq_norms += row * num_classes
    position = tl.full((), -1, tl.int32)
    if target_class != ignore_index:
        if class_index is None:
            position = target_position(target_class, None, 0, num_classes)
        else:
            position = target_position(
                target_class, class_index + row * index_row_stride, index_stride, num_classes
            )
        slice_dots = dots
        slice_sq_norms = sq_norms
        if not SHAPE.one_slice:
            partial += row * num_slices * 2 * num_classes
            slice_dots = partial + slice_number.to(tl.int64) * 2 * num_classes
            slice_sq_norms = slice_dots + num_classes
        first_class = group * classes_of_group
        slice_statistics(
            gradients + row * row_stride * SHAPE.vector,
            inputs + row * inputs_row_stride * SHAPE.vector,
            position,
            slice_dots,
            slice_sq_norms,
            slice_number,
            first_class,
            tl.minimum(first_class + classes_of_group, num_classes),
            num_classes,
            sizes,
            strides,
            class_stride,
            SHAPE,
        )
        complete = tl.full((), True, tl.int1)
        if TICKET:
            complete = is_last_to_arrive(counters + row, num_slices * num_groups)
        if not SHAPE.one_slice and complete:
            collect_statistics(partial, dots, sq_norms, num_classes, num_slices, SHAPE)
    else:
        complete = (slice_number == 0) & (group == 0)
        if complete:
            BLOCK: tl.constexpr = 256
            for first in tl.range(0, num_classes, BLOCK):
                classes = first + tl.arange(0, BLOCK)
                zeros = tl.zeros((BLOCK,), dots.dtype.element_ty)
                tl.store(dots + classes, zeros, mask=classes < num_classes)
                tl.store(sq_norms + classes, zeros, mask=classes < num_classes)
    return row, target_class, position, complete


@triton.jit(do_not_specialize=["num_classes", *NOT_SPECIALIZED])
def explanation_stats_kernel(
    gradients,
    inputs,
    target,
    class_index,
    dots,
    sq_norms,
    partial,
    counters,
    ignore_index,
    num_classes,
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
    SHAPE: tl.constexpr,
):
    """One program for each row, slice of D and group of classes.

    Reads the B * K * D gradients once (twice to centre more than a tile of classes) and the B * D
    inputs once for each group; writes 2 * B * K statistics, and reads and writes as many for each
    slice where there are several.
    """
    row_statistics(
        gradients,
        inputs,
        target,
        class_index,
        dots,
        sq_norms,
        partial,
        counters,
        ignore_index,
        num_classes,
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
        not SHAPE.one_slice,
    )
