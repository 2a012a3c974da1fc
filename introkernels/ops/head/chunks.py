"""The rows of a head that are computed at a time, and the matrices that they take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from introkernels.ops.schema import loss_dtype
from introkernels.options import Options

# What a chunk takes beside the gradients, where more rows than the fewest fit in.
CHUNK_BYTES = {"cpu": 1 << 26, "others": 1 << 30}
# Every chunk reads the weight four times and adds to its gradient, 18 bytes a number in bfloat16
# for 10 operations a row: with 512 rows an H200 waits for its memory only in the last of these.
FEWEST_ROWS = {"cpu": 256, "others": 512}
# The rows of a chunk that meet their teacher at a time. On a CPU memory is what a chunk saves: the
# gradient of the logits goes where these were.
PIECE_ROWS = {"cpu": 256, "others": 1 << 30}
TILE_ROWS = 64
# The most matrices of all classes that are alive at a time, in the dtype of the loss: logits,
# similarities, teacher logits and the gradient of logits. Labels that are split take one more.
MATRICES = 4


class HeadCall(NamedTuple):
    """A head and its loss: ``features [B, D]``, ``weight [C, D]``; ``[C]`` or None the others.

    ``incoming`` is the gradient of the loss: ``[B]`` where the reduction is none, else one number.
    """

    features: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None
    class_weight: Tensor | None
    incoming: Tensor
    options: Options

    @property
    def factor_dtype(self) -> torch.dtype:
        """What the factors of products are rounded to: a half type where both tensors have it.

        Products themselves are in the dtype of the loss.
        """
        return factor_dtype(self.features, self.weight)

    def of_rows(self, index: Tensor) -> HeadCall:
        """The call of these rows alone."""
        per_row = self.incoming.dim() > 0
        return self._replace(
            features=self.features.index_select(0, index),
            target=self.target.index_select(0, index),
            incoming=self.incoming.index_select(0, index) if per_row else self.incoming,
        )


class Chunk(NamedTuple):
    """The matrices of a chunk: its rows with all features, and with all classes.

    Attributes:
        features: the features as a factor of products, zeros in ignored rows.
        logits: ``[rows, C]``.
        of_teacher: ``[rows of a piece, C]``, what its teacher makes of them.
    """

    features: Tensor
    logits: Tensor
    of_teacher: Tensor

    def pieces(self, here: slice) -> Iterator[tuple[slice, Chunk]]:
        """The chunk, whose rows are those of ``here``, as many rows at a time as a piece has."""
        for first in range(0, len(self.logits), len(self.of_teacher)):
            last = min(first + len(self.of_teacher), len(self.logits))
            piece = Chunk(
                self.features[first:last], self.logits[first:last], self.of_teacher[: last - first]
            )
            yield slice(here.start + first, here.start + last), piece


def factor_dtype(features: Tensor, weight: Tensor) -> torch.dtype:
    """The half type of both factors of a product; the dtype of the loss for all others."""
    halves = (torch.bfloat16, torch.float16)
    if features.dtype in halves and features.dtype == weight.dtype:
        return features.dtype
    return loss_dtype(features)


def chunk_rows(
    num_rows: int, num_classes: int, width: int, item_size: int, device: str = "cuda"
) -> int:
    """Rows of a chunk. All chunks but the last have as many, whatever the batch is."""
    of_device = _kind(device)
    # What squares are made of takes no more than twice as many matrices of features.
    of_row = MATRICES * (num_classes + 2 * width) * item_size
    comfortable = CHUNK_BYTES[of_device] // of_row // TILE_ROWS * TILE_ROWS
    return min(num_rows, max(FEWEST_ROWS[of_device], comfortable))


def _kind(device: str) -> str:
    return "cpu" if device == "cpu" else "others"


def chunks_of(call: HeadCall) -> Iterator[tuple[slice, Chunk]]:
    """The rows and the matrices of each chunk; all chunks take the same memory in turn."""
    num_rows = call.features.shape[0]
    num_classes, width = call.weight.shape
    dtype = loss_dtype(call.features)
    step = chunk_rows(num_rows, num_classes, width, dtype.itemsize, call.features.device.type)
    features = call.features.new_empty((step, width), dtype=call.factor_dtype)
    logits = call.features.new_empty((step, num_classes), dtype=dtype)
    of_piece = PIECE_ROWS[_kind(call.features.device.type)]
    of_teacher = torch.empty_like(logits[:of_piece])
    for first_row in range(0, num_rows, max(step, 1)):
        here = slice(first_row, min(first_row + step, num_rows))
        count = here.stop - first_row
        yield here, Chunk(features[:count], logits[:count], of_teacher)
