"""A head's explanations of itself, as a teacher: two more products of matrices for a chunk.

With ``E_c = w_c * h``, elementwise,

    dots = (h^2 * w_y) W^T,   sq_norms = h^2 (W^2)^T,

where ``w`` is the weight, without its mean if explanations are centred. Similarities are ratios: a
power of two that brings each row of features, or the whole weight, near 1 changes nothing in them
but keeps squares in range. Squares and the product with the target's weight are rounded to the
dtype of factors once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from introkernels import teachers
from introkernels.ops.head.chunks import TILE_ROWS, Chunk, HeadCall
from introkernels.ops.head.products import Rows, largest, product, scale_of
from introkernels.ops.schema import loss_dtype
from introkernels.types import SIMILARITIES

# What similarities are made of at a time: rows of the weight, and columns of statistics. As whole
# matrices the former would take a gigabyte each at (128256, 4096), and are made anew in each chunk.
# With 512 rows of features, 8192 classes of 4096 numbers in a half type are 128 tiles of a product,
# one for nearly each multiprocessor of an H200.
BLOCK_BYTES = 64 << 20


class OwnExplanations:
    """Teacher logits of the explanations of a head's own rows."""

    def __init__(self, call: HeadCall, rows: Rows) -> None:
        self._call, self._survey = call, rows
        self._weight = _explain_weight(call)
        self._scale = scale_of(largest(call.features).to(loss_dtype(call.features)))[:, None]

    def rows(self, chunk: Chunk, here: slice) -> Tensor:
        """Teacher logits of a chunk ``[rows, C]``."""
        similarities = self._similarities(chunk, here)
        return teachers.with_options(
            similarities, self._call.target[here], None, self._call.options
        )

    def _similarities(self, chunk: Chunk, here: slice) -> Tensor:
        weight, of_target = self._weight, self._survey.target[here]
        dtype, wide = chunk.features.dtype, chunk.logits.dtype
        exact = (chunk.features * self._scale[here]).square_()
        weight_of_target = weight.explained(weight.values.index_select(0, of_target))
        squares, with_target = exact.to(dtype), (exact * weight_of_target).to(dtype)
        norm = (squares.to(wide) * weight_of_target.square().to(dtype)).sum(1, keepdim=True)
        # Two statistics, and two more matrices on their way to similarities.
        for classes in _blocks(weight.values, 4 * len(squares) * wide.itemsize):
            explained = weight.explained(weight.values[classes])
            dots, sq_norms = chunk.logits.new_empty((2, len(squares), len(explained)))
            product(with_target, explained.to(dtype).mT, dots)
            product(squares, explained.square().to(dtype).mT, sq_norms)
            chunk.of_teacher[:, classes] = teachers.of_others(
                dots, sq_norms, norm, SIMILARITIES[self._call.options.similarity]
            )
        return chunk.of_teacher.scatter_(1, of_target[:, None], 1.0)


class _Weight(NamedTuple):
    """The weight as products take it.

    Attributes:
        values: the weight as a factor of products.
        mean: ``[2, D]``, its mean over the classes and what that lost in rounding, where
            explanations are centred.
        scale: ``[1]``, the power of two that keeps squares of explained weights in range.
    """

    values: Tensor
    mean: Tensor | None
    scale: Tensor

    def explained(self, values: Tensor) -> Tensor:
        """Rows ``values`` of the weight, less the mean if there is one, times the power of two.

        Exact in the dtype of factors, or not yet rounded to it.
        """
        if self.mean is None:
            return torch.mul(values, self.scale, out=values.new_empty(values.shape))
        explained: Tensor = values - self.mean[0]
        return explained.sub_(self.mean[1]).mul_(self.scale)


def _explain_weight(call: HeadCall) -> _Weight:
    """Look at the weight once, and make of it what all chunks share."""
    values = call.weight.to(call.factor_dtype)
    lowest, highest = (end.to(loss_dtype(call.features)) for end in torch.aminmax(values, dim=0))
    mean = None
    if call.options.center:
        mean = _mean(values, lowest.dtype)
        lowest, highest = lowest - mean[0], highest - mean[0]
    extreme = largest(torch.maximum(lowest.abs(), highest.abs()))
    return _Weight(values, mean, scale_of(extreme)[None])


def _mean(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight's mean over the classes, ``[2, D]``: rounded to ``dtype``, and what that lost.

    A mean that is large against what it leaves has to have more digits than these numbers.
    """
    num_classes, width = values.shape
    total = values.new_zeros(width, dtype=torch.float64)
    # On a CPU, sums in float64 make copies in float64.
    for classes in _blocks(values, 8 * max(width, 1)):
        total += values[classes].sum(0, dtype=torch.float64)
    mean = total / num_classes
    upper = mean.to(dtype)
    return torch.stack([upper, (mean - upper).to(dtype)])


def _blocks(weight: Tensor, class_bytes: int) -> Iterator[slice]:
    """The classes of the weight, some at a time; ``class_bytes`` is what else a class takes."""
    num_classes, width = weight.shape
    step = BLOCK_BYTES // max(width * weight.dtype.itemsize, class_bytes)
    step = max(1, step // TILE_ROWS) * TILE_ROWS
    for first in range(0, num_classes, step):
        yield slice(first, min(first + step, num_classes))
