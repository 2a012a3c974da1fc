"""The rows of a head that are computed at a time, and the matrices that they take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from introkernels.ops.schema import loss_dtype
from introkernels.options import Options

# What a chunk takes beside the gradients, where more rows than the fewest fit in.
CHUNK_BYTES = 1 << 30
# Every chunk reads the weight four times and adds to its gradient, 18 bytes a number in bfloat16
# for 10 operations a row: with 512 rows an H200 waits for its memory only in the last of these.
FEWEST_ROWS = 512
TILE_ROWS = 64
# The most matrices of all classes that are alive at a time, in the dtype of the loss: logits,
# similarities, teacher logits and the gradient of logits. Labels that are split take one more.
MATRICES = 4


class HeadCall(NamedTuple):
    """A head and its loss: ``features [B, D]``, ``weight [C, D]``; ``[C]`` or None the others."""

    features: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None
    class_weight: Tensor | None
    options: Options

    @property
    def factor_dtype(self) -> torch.dtype:
        """What the factors of products are rounded to: a half type where both tensors have it.

        Products themselves are in the dtype of the loss.
        """
        halves = (torch.bfloat16, torch.float16)
        if self.features.dtype in halves and self.features.dtype == self.weight.dtype:
            return self.features.dtype
        return loss_dtype(self.features)


class Chunk(NamedTuple):
    """The matrices of a chunk: its rows with all features, and two with all classes.

    Attributes:
        features: the features as a factor of products, zeros in ignored rows.
        logits: ``[rows, C]``.
        similarities: those of the explanations to that of the target.
    """

    features: Tensor
    logits: Tensor
    similarities: Tensor


def chunk_rows(num_rows: int, num_classes: int, width: int, item_size: int) -> int:
    """Rows of a chunk. All chunks but the last have as many, whatever the batch is."""
    # What squares are made of takes no more than twice as many matrices of features.
    comfortable = CHUNK_BYTES // (MATRICES * (num_classes + 2 * width) * item_size)
    return min(num_rows, max(FEWEST_ROWS, comfortable // TILE_ROWS * TILE_ROWS))


def chunks_of(call: HeadCall) -> Iterator[tuple[slice, Chunk]]:
    """The rows and the matrices of each chunk; all chunks take the same memory in turn."""
    num_rows = call.features.shape[0]
    num_classes, width = call.weight.shape
    dtype = loss_dtype(call.features)
    step = chunk_rows(num_rows, num_classes, width, dtype.itemsize)
    features = call.features.new_empty((step, width), dtype=call.factor_dtype)
    of_classes = call.features.new_empty((2, step, num_classes), dtype=dtype)
    for first_row in range(0, num_rows, max(step, 1)):
        here = slice(first_row, min(first_row + step, num_rows))
        count = here.stop - first_row
        yield here, Chunk(features[:count], *of_classes[:, :count])
