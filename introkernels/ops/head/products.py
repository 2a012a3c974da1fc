"""The matrix products of a head: three for its loss, two more for its gradients.

With ``E_c = w_c * h``, elementwise,

    z = h W^T,   dots = (h^2 * w_y) W^T,   sq_norms = h^2 (W^2)^T,

where ``w`` is the weight without its mean in the last two if explanations are centred. Similarities
are ratios: a power of two that brings each row of features, or the whole weight, near 1 changes
nothing in them but keeps squares in range.

Everything stays on the device: no number is looked at by the host, so that calls can be captured
in a CUDA graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from introkernels import reference
from introkernels.ops.head import chunks
from introkernels.ops.head.chunks import Chunk, HeadCall
from introkernels.ops.schema import loss_dtype


class Weight(NamedTuple):
    """The weight as products take it.

    Attributes:
        wide: the weight in the computing type.
        explained: the same, or without its mean.
        scale: the power of two that keeps its squares in range.
        squares: the squares of ``explained`` times ``scale``.
    """

    wide: Tensor
    explained: Tensor
    scale: Tensor
    squares: Tensor


class Rows(NamedTuple):
    """What is known of all rows before the first product.

    Attributes:
        live: ``[B]``, the rows that are not ignored.
        target: ``[B]``, classes that can be read: 0 where the row's target is no class.
        totals: ``[2]`` float64, see `introkernels.reference.totals`.
        scale: ``[B, 1]``, the power of two that keeps the squares of a row's features in range.
    """

    live: Tensor
    target: Tensor
    totals: Tensor
    scale: Tensor


def explain_weight(call: HeadCall) -> Weight:
    """Look at the weight once, and make of it what all chunks share."""
    wide = call.weight.to(loss_dtype(call.features))
    explained = _without_mean(wide) if call.options.center else wide
    # Room for a product of the power with a scaled weight, < 2^8, and a square of features, < 2^16.
    scale = scale_of(_largest(_largest(explained)), spare_bits=24)
    return Weight(wide, explained, scale, (explained * scale).square_())


def survey_rows(call: HeadCall) -> Rows:
    """Look at all targets, and at all features for the largest number of each row."""
    num_classes = call.weight.shape[0]
    dtype = loss_dtype(call.features)
    live = call.target != call.options.ignore_index
    known = live & (call.target >= 0) & (call.target < num_classes)
    target = torch.where(known, call.target, 0)
    target_weight = known.double()
    if call.class_weight is not None:
        # As precise as the row loss takes them, which divides by their sum.
        weights = call.class_weight.to(dtype).index_select(0, target)
        target_weight = torch.where(known, weights.double(), 0)
    scale = scale_of(_largest(call.features).to(dtype))
    totals = reference.totals(live, target_weight)
    return Rows(live, target, totals, scale[:, None])


def multiply(call: HeadCall, rows: Rows, weight: Weight, chunk: Chunk, here: slice) -> None:
    """Fill the matrices of a chunk, whose rows are those of ``here``."""
    chunk.features.copy_(call.features[here])
    # Whatever an ignored row holds must not reach the gradient of the weight.
    chunk.features.masked_fill_(~rows.live[here, None], 0)
    torch.mm(chunk.features, weight.wide.mT, out=chunk.logits)
    if call.bias is not None:
        chunk.logits.add_(call.bias)
    torch.mul(chunk.features, rows.scale[here], out=chunk.squares)
    chunk.squares.square_()
    torch.mm(chunk.squares, weight.squares.mT, out=chunk.sq_norms)
    of_target = chunk.squares_of_target
    torch.index_select(weight.explained, 0, rows.target[here], out=of_target)
    # The product to come takes the explained weight as it is, so that its scale goes in here twice.
    # Only in this order do both stay in range.
    of_target.mul_(weight.scale).mul_(chunk.squares).mul_(weight.scale)
    torch.mm(of_target, weight.explained.mT, out=chunk.dots)


def scale_of(largest: Tensor, spare_bits: int = 0) -> Tensor:
    """The powers of two that bring numbers >= 0 into [2^7, 2^8); ones for inf and NaN.

    None of them exceeds the largest power of the dtype less ``spare_bits``: very small numbers are
    brought less far. Large numbers are not brought down to 1, so that their powers times what they
    scale are no subnormal numbers, which have fewer digits.
    """
    double = largest.dtype == torch.float64
    integer, digits, bias = (torch.int64, 52, 1023) if double else (torch.int32, 23, 127)
    exponent = largest.view(integer) >> digits
    inverse = (2 * bias + 7 - exponent).clamp_(max=2 * bias - spare_bits)
    inverse.masked_fill_(exponent == 2 * bias + 1, bias)
    return (inverse << digits).view(largest.dtype)


def _largest(values: Tensor) -> Tensor:
    """The largest magnitude in the last dimension; 0 where that is empty."""
    if values.shape[-1] == 0:
        return values.new_zeros(values.shape[:-1])
    largest: Tensor = torch.linalg.vector_norm(values, float("inf"), dim=-1)
    return largest


def _without_mean(wide: Tensor) -> Tensor:
    """The weight less its mean over the classes, rounded to its own type.

    A mean that is large against what it leaves has to have more digits than these numbers: the
    second part of it is what the first lost in rounding.
    """
    num_classes, width = wide.shape
    total = wide.new_zeros(width, dtype=torch.float64)
    # So many classes at a time that their float64 copies take no more memory than a chunk.
    step = max(1, chunks.CHUNK_BYTES // (8 * max(width, 1)))
    for first in range(0, num_classes, step):
        total += wide[first : first + step].sum(0, dtype=torch.float64)
    mean = total / num_classes
    upper = mean.to(wide.dtype)
    lower = (mean - upper).to(wide.dtype)
    return (wide - upper).sub_(lower)


class Gradients:
    """Gradients of features, weight and bias, to which chunks are added in their order.

    Those that nobody needs stay empty.
    """

    def __init__(self, call: HeadCall) -> None:
        self._needs = call.options
        num_classes, width = call.weight.shape
        dtype = loss_dtype(call.features)

        def empty_unless(needed: bool, *shape: int) -> Tensor:
            return call.features.new_empty(shape if needed else (0,), dtype=dtype)

        self.features = empty_unless(self._needs.need_features, call.features.shape[0], width)
        self.weight = empty_unless(self._needs.need_weight, num_classes, width)
        if call.features.shape[0] == 0:
            self.weight.zero_()
        # Sums of many rows that may cancel: each class has one number, which may as well be wide.
        self._bias = call.features.new_zeros(num_classes, dtype=torch.float64)

    def add(self, weight: Weight, chunk: Chunk, grad_logits: Tensor, here: slice) -> None:
        """Add those of a chunk, whose rows are those of ``here``."""
        if self._needs.need_features:
            torch.mm(grad_logits, weight.wide, out=self.features[here])
        if self._needs.need_weight and here.start == 0:
            torch.mm(grad_logits.mT, chunk.features, out=self.weight)
        elif self._needs.need_weight:
            self.weight.addmm_(grad_logits.mT, chunk.features)
        if self._needs.need_bias:
            self._bias += grad_logits.sum(0, dtype=torch.float64)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients in the dtype of the loss."""
        bias = (
            self._bias.to(self.features.dtype)
            if self._needs.need_bias
            else self.features.new_empty(0)
        )
        return self.features, self.weight, bias
