"""How many rows of a head are computed at a time, and the matrices that they take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from introkernels.ops.head.call import HeadCall
from introkernels.ops.schema import loss_dtype

# What the matrices of a chunk take together: about what an L2 cache holds, so that a kernel finds
# there what a product wrote.
CHUNK_BYTES = 48 << 20
# Fewer rows would leave products waiting for the weight; whole tiles of a product otherwise.
FEWEST_ROWS = 128
TILE_ROWS = 64


def row_bytes(num_classes: int, width: int, item_size: int) -> int:
    """What the matrices of a chunk take for a row: three numbers of every class and feature."""
    return 3 * (num_classes + width) * item_size


def least_bytes(num_classes: int, width: int) -> int:
    """What the matrices of the smallest chunk take in float32."""
    return FEWEST_ROWS * row_bytes(num_classes, width, 4)


def chunk_rows(num_rows: int, num_classes: int, width: int, item_size: int) -> int:
    """Rows of a chunk. All chunks but the last have as many, whatever the batch is."""
    comfortable = CHUNK_BYTES // row_bytes(num_classes, width, item_size)
    return min(num_rows, max(FEWEST_ROWS, comfortable // TILE_ROWS * TILE_ROWS))


class Chunk(NamedTuple):
    """The matrices of a chunk: three of its rows and all features, three with all classes.

    Attributes:
        features: the features, zeros in ignored rows.
        squares: their squares, each row's times a power of two.
        squares_of_target: ``squares`` times the explained weight of the row's target, times the
            square of the power of two that the weight is scaled by in ``Weight.squares``.
        logits: ``[rows, C]``; a gradient may take their place.
        dots: the explanations' products with that of the target, scaled like ``sq_norms``.
        sq_norms: their squared norms.
    """

    features: Tensor
    squares: Tensor
    squares_of_target: Tensor
    logits: Tensor
    dots: Tensor
    sq_norms: Tensor

    def of_rows(self, count: int) -> Chunk:
        """The same memory for the first ``count`` rows."""
        return Chunk(*(matrix[:count] for matrix in self))


def allocate_chunk(call: HeadCall) -> Chunk:
    """Matrices of the largest chunk of a call, side by side in two blocks of memory."""
    num_classes, width = call.weight.shape
    dtype = loss_dtype(call.features)
    num_rows = chunk_rows(call.features.shape[0], num_classes, width, dtype.itemsize)
    of_features = call.features.new_empty((3, num_rows, width), dtype=dtype)
    of_classes = call.features.new_empty((3, num_rows, num_classes), dtype=dtype)
    return Chunk(*of_features.unbind(0), *of_classes.unbind(0))


def walk(call: HeadCall) -> Iterator[tuple[int, Chunk]]:
    """The first row and the matrices of each chunk; all chunks take the same memory in turn."""
    num_rows = call.features.shape[0]
    memory = allocate_chunk(call)
    step = len(memory.logits)
    for first_row in range(0, num_rows, max(step, 1)):
        yield first_row, memory.of_rows(min(step, num_rows - first_row))
