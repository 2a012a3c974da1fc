"""The rows of a head that are computed at a time, and the matrices that they take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from introkernels.ops.schema import loss_dtype
from introkernels.options import Options

# What the matrices of a chunk take together: about what an L2 cache holds, so that a kernel finds
# there what a product wrote.
CHUNK_BYTES = 48 << 20
# Fewer rows would leave products waiting for the weight; whole tiles of a product otherwise. With
# their teacher logits, so few rows take 3.3 KiB a class in float32: 5 GB for 1.5 million.
FEWEST_ROWS = 128
TILE_ROWS = 64


class HeadCall(NamedTuple):
    """A head and its loss: ``features [B, D]``, ``weight [C, D]``; ``[C]`` or None the others."""

    features: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None
    class_weight: Tensor | None
    options: Options


class Chunk(NamedTuple):
    """The matrices of a chunk: three of its rows and all features, three with all classes.

    Attributes:
        features: the features, zeros in ignored rows.
        squares: their squares, each row's times a power of two.
        squares_of_target: ``squares`` times the explained weight of the row's target, times the
            square of the power of two that the weight is scaled by in ``Weight.squares``.
        logits: ``[rows, C]``.
        dots: the explanations' products with that of the target, scaled like ``sq_norms``.
        sq_norms: their squared norms.
    """

    features: Tensor
    squares: Tensor
    squares_of_target: Tensor
    logits: Tensor
    dots: Tensor
    sq_norms: Tensor


def chunk_rows(num_rows: int, num_classes: int, width: int, item_size: int) -> int:
    """Rows of a chunk. All chunks but the last have as many, whatever the batch is."""
    # Three numbers of every class and feature.
    comfortable = CHUNK_BYTES // (3 * (num_classes + width) * item_size)
    return min(num_rows, max(FEWEST_ROWS, comfortable // TILE_ROWS * TILE_ROWS))


def chunks_of(call: HeadCall) -> Iterator[tuple[slice, Chunk]]:
    """The rows and the matrices of each chunk; all chunks take the same memory in turn."""
    num_rows = call.features.shape[0]
    num_classes, width = call.weight.shape
    dtype = loss_dtype(call.features)
    step = chunk_rows(num_rows, num_classes, width, dtype.itemsize)
    of_features = call.features.new_empty((3, step, width), dtype=dtype)
    of_classes = call.features.new_empty((3, step, num_classes), dtype=dtype)
    for first_row in range(0, num_rows, max(step, 1)):
        here = slice(first_row, min(first_row + step, num_rows))
        count = here.stop - first_row
        yield here, Chunk(*of_features[:, :count], *of_classes[:, :count])
