"""How explanation statistics are shared out among programs, and the shape of their tiles."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from introkernels.ops.schema import loss_dtype
from introkernels.ops.triton.launch import MOST_REGISTERS
from introkernels.ops.triton.layout import Explanations, explanations

# Bytes of one class in a slice. The two sums that a slice leaves of a class, written and read
# again, are less than 1 % of them (2 % in float64), and each thread of a warp has four loads of 16
# bytes of it.
SLICE_BYTES = 2048
# As many classes as fit the registers at once: centring them reads them once.
CENTERED_IN_ONE_TILE = 16
# Centring more reads a slice of all classes twice. A large GPU runs up to a thousand of these
# programs at a time; 32 KiB each stay in its level 2 cache between the two, so that memory is read
# once as long as classes are no more than 256. The sums over the classes take registers, which
# halves what is left for a slice. Slices narrower than a cache line would waste reads.
CENTERED_SLICE_BYTES = 1024
CENTERED_BYTES = 32768
LINE_BYTES = 128
# Bytes of a tile: it and the next one, on its way from memory, fit the registers beside inputs and
# target's explanation. A program is a single warp, which waits for no other one, and walks all
# classes of its group: .96 of a copy are predicted for an H200 at 16 classes of 150528 dimensions,
# .57 with four warps that share four times as many classes at a time.
TILE_BYTES = 4096
# A slice for all warps together leaves more of centred classes in level 2 cache. Less where sums
# over the classes are kept as well.
CENTERED_WARPS = 4
CENTERED_TILE_BYTES = 4096
# With less than eight numbers for each thread, ptxas saves registers until it spills one.
CENTERED_TILE = 1024
CENTERED_BYTES_IN_ONE_TILE = 16384
REGISTERS = 176
# Of one tile: more of them, where each fetches a single element, would not fit the registers.
LOADS_OF_A_THREAD = 16
# Short explanations leave room for more classes in a tile, each of which is stored from a whole
# warp's worth of registers.
MAX_BLOCK_K = 64
# 132 multiprocessors hold twelve programs each. Fewer rows than that are split by classes too, in
# groups of so many tiles that the inputs, which each group reads, matter little.
ENOUGH_PROGRAMS = 2048
TILES_OF_A_GROUP = 8
# When slices are collected, each thread has this many loads on the way at a time, in rows of whole
# cache lines where there are as many classes.
SUMS_OF_A_THREAD = 16
MAX_BLOCK_SUMS = 64
LANES = 32


class Shape(NamedTuple):
    """What kernels of statistics are compiled for: tiles ``[width, block_k, chunks]``, above all.

    Attributes:
        center: whether explanations are centred.
        vector: elements of an explanation that one load fetches.
        chunks: times that a slice has ``width`` elements.
        width: elements of a class that are one load of a warp.
        block_k: classes in a tile.
        block_slices: slices that are collected at a time.
        block_sums: sums of each of them.
        one_tile: whether the classes are a single tile, which is read once.
        one_slice: whether explanations are a single slice.
        wide: whether offsets take 64 bits.
    """

    center: bool
    vector: int
    chunks: int
    width: int
    block_k: int
    block_slices: int
    block_sums: int
    one_tile: bool
    one_slice: bool
    wide: bool


class Work(NamedTuple):
    """How the statistics of a batch are shared out among programs.

    Attributes:
        explained: gradients and inputs as the programs walk them.
        num_slices: slices of the explanations' dimensions. Follows from shape and dtype alone.
        num_groups: groups of classes, 1 where classes are centred. Follows from the rows too.
        classes_of_group: classes in each group but the last.
        several_programs: whether a row has several programs, or would have among other numbers of
            rows at this shape. Who goes on from complete statistics then needs tickets.
        shape: of the tiles.
        options: ``num_warps`` and ``maxnreg``.
    """

    explained: Explanations
    num_slices: int
    num_groups: int
    classes_of_group: int
    several_programs: bool
    shape: Shape
    options: dict[str, Any]

    @property
    def num_programs(self) -> int:
        """The number of programs of the batch."""
        return self.explained.gradients.shape[0] * self.num_slices * self.num_groups

    def arguments(
        self,
        target: Tensor,
        class_index: Tensor | None,
        dots: Tensor,
        sq_norms: Tensor,
        ignore_index: int,
        ticket: bool,
    ) -> tuple[Any, ...]:
        """The run-time arguments of :func:`row_statistics`, in its order.

        Scratch memory among them: ``partial [B, num_slices, 2, K]`` in the dtype computed with,
        where there are several slices, and ``counters [B]`` int32 zeros where programs draw a
        ``ticket``. ``dots`` and ``sq_norms [B, K]`` are contiguous.
        """
        explained = self.explained
        rows, classes = dots.shape
        partial = counters = None
        if self.num_slices > 1:
            partial = dots.new_empty(
                (rows, self.num_slices, 2, classes), dtype=loss_dtype(explained.gradients)
            )
        if ticket:
            counters = dots.new_zeros(rows, dtype=torch.int32)
        return (
            explained.gradients,
            explained.inputs,
            target,
            class_index,
            dots,
            sq_norms,
            partial,
            counters,
            ignore_index,
            classes,
            self.num_slices,
            self.num_groups,
            self.classes_of_group,
            explained.sizes,
            explained.strides,
            explained.row_stride,
            explained.class_stride,
            explained.inputs_row_stride,
            target.stride(0),
            *((0, 0) if class_index is None else class_index.stride()),
        )


def share(gradients: Tensor, inputs: Tensor, center: bool) -> Work:
    """Share the statistics of ``gradients [B, K, *S]``, K >= 1, out among programs."""
    explained = explanations(gradients, inputs)
    rows, classes = gradients.shape[:2]
    shape, options = config(explained, classes, center)
    num_slices = max(1, triton.cdiv(explained.num_dims, shape.chunks * shape.width))
    group = TILES_OF_A_GROUP * shape.block_k
    may_split = not center and classes > group
    num_groups = 1
    if may_split:
        wanted = ENOUGH_PROGRAMS // max(1, rows * num_slices)
        num_groups = max(1, min(wanted, triton.cdiv(classes, group)))
    classes_of_group = triton.cdiv(triton.cdiv(classes, num_groups), shape.block_k) * shape.block_k
    num_groups = triton.cdiv(classes, classes_of_group)
    several = may_split or num_slices > 1
    return Work(explained, num_slices, num_groups, classes_of_group, several, shape, options)


def config(explained: Explanations, classes: int, center: bool) -> tuple[Shape, dict[str, Any]]:
    """The shape of a program's tiles ``[width, block_k, chunks]``, its warps and registers.

    ``width`` elements of a class are one load of a warp, so that Triton gives each warp classes of
    its own and the sums of a class never leave its warp.
    """
    size, vector = explained.gradients.element_size(), explained.vector
    slice_bytes, tile_bytes, most_warps = SLICE_BYTES, TILE_BYTES, 1
    if center:
        tile_bytes, most_warps = CENTERED_BYTES_IN_ONE_TILE, CENTERED_WARPS
    if center and classes > CENTERED_IN_ONE_TILE:
        narrow = _power_of_2_below(CENTERED_BYTES // classes)
        slice_bytes = _clamp(narrow, LINE_BYTES, CENTERED_SLICE_BYTES)
        tile_bytes = max(CENTERED_TILE_BYTES, CENTERED_TILE * size)
    # Loads of single elements need as many instructions and registers as whole vectors do.
    block_d = min(slice_bytes // size, LOADS_OF_A_THREAD * LANES * vector)
    block_d = min(block_d, triton.next_power_of_2(max(explained.num_dims, vector)))
    width = min(LANES * vector, block_d)
    all_classes = triton.next_power_of_2(classes)
    tile = min(tile_bytes // size, LOADS_OF_A_THREAD * LANES * most_warps * vector)
    block_k = min(_clamp(tile // block_d, most_warps, MAX_BLOCK_K), all_classes)
    one_tile = center and classes <= max(CENTERED_IN_ONE_TILE, block_k)
    if one_tile:
        block_k = all_classes
    # No more warps than have a class, and a vector for each thread.
    num_warps = _clamp(block_k * block_d // (LANES * vector), 1, min(most_warps, block_k))
    is_float16 = explained.gradients.dtype == torch.float16
    block_sums = min(MAX_BLOCK_SUMS, triton.next_power_of_2(2 * classes))
    shape = Shape(
        center=center,
        vector=vector,
        chunks=block_d // width,
        width=width,
        block_k=block_k,
        block_slices=SUMS_OF_A_THREAD * LANES * num_warps // block_sums,
        block_sums=block_sums,
        one_tile=one_tile,
        one_slice=explained.num_dims <= block_d,
        wide=explained.exceeds_int32(block_d),
    )
    # Whole vectors fit fewer registers, and more programs at a time keep more loads on the way.
    # Float16, centred tiles and single elements would be spilled.
    takes_more = center or vector == 1 or is_float16
    return shape, {
        "num_warps": num_warps,
        "maxnreg": MOST_REGISTERS if takes_more else REGISTERS,
    }


def _clamp(value: int, low: int, high: int) -> int:
    return max(low, min(value, high))


def _power_of_2_below(value: int) -> int:
    return 1 << max(0, value.bit_length() - 1)
