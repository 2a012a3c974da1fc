"""The matrix products of a head: three for its loss, two more for its gradients.

With ``E_c = w_c * h``, elementwise,

    z = h W^T,   dots = (h^2 * w_y) W^T,   sq_norms = h^2 (W^2)^T,

where ``w`` is the weight without its mean in the last two if explanations are centred. Similarities
are ratios: a power of two that brings each row of features, or the whole weight, near 1 changes
nothing in them but keeps squares in range.

Products are in the dtype of the loss, and their factors in ``HeadCall.factor_dtype``: half features
and weights are multiplied as they are, on tensor cores. What is made of them (squares, the product
with the target's weight, the gradient of the logits) is computed in the dtype of the loss and
rounded to that of factors once.

Everything stays on the device: no number is looked at by the host, so that calls can be captured
in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from introkernels import reference, teachers
from introkernels.ops.head.chunks import TILE_ROWS, Chunk, HeadCall
from introkernels.ops.schema import loss_dtype
from introkernels.types import REDUCTIONS, SIMILARITIES

# What similarities are made of at a time: rows of the weight, and columns of statistics. As whole
# matrices the former would take a gigabyte each at (128256, 4096), and are made anew in each chunk.
# With 512 rows of features, 8192 classes of 4096 numbers in a half type are 128 tiles of a product,
# one for nearly each multiprocessor of an H200.
BLOCK_BYTES = 64 << 20
# Numbers are brought below 2^5, so that squares of features times a weight are below 2^15: float16
# ends at 2^16. Squares then have all their digits down to 2^-11 of the largest number, and vanish
# below 2^-16 of it.
SCALED_BITS = 5
# By how much more gradients of logits are scaled in float16: they are factors without a square.
GRADIENT_ROOM = 2.0**10


class Weight(NamedTuple):
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
    values = call.weight.to(call.factor_dtype)
    lowest, highest = (end.to(loss_dtype(call.features)) for end in torch.aminmax(values, dim=0))
    mean = None
    if call.options.center:
        mean = _mean(values, lowest.dtype)
        lowest, highest = lowest - mean[0], highest - mean[0]
    largest = _largest(torch.maximum(lowest.abs(), highest.abs()))
    return Weight(values, mean, scale_of(largest)[None])


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
    _product(chunk.features, weight.values.mT, chunk.logits)
    if call.bias is not None:
        chunk.logits.add_(call.bias)

    dtype, wide = chunk.features.dtype, chunk.logits.dtype
    exact = (chunk.features * rows.scale[here]).square_()
    of_target = weight.explained(weight.values.index_select(0, rows.target[here]))
    squares, with_target = exact.to(dtype), (exact * of_target).to(dtype)
    norm_of_target = (squares.to(wide) * of_target.square().to(dtype)).sum(1, keepdim=True)
    # Two statistics, and two more matrices on their way to similarities.
    for classes in _blocks(weight.values, 4 * len(squares) * wide.itemsize):
        explained = weight.explained(weight.values[classes])
        dots, sq_norms = chunk.logits.new_empty((2, len(squares), len(explained)))
        _product(with_target, explained.to(dtype).mT, dots)
        _product(squares, explained.square().to(dtype).mT, sq_norms)
        chunk.similarities[:, classes] = teachers.of_others(
            dots, sq_norms, norm_of_target, SIMILARITIES[call.options.similarity]
        )
    chunk.similarities.scatter_(1, rows.target[here, None], 1.0)


def scale_of(largest: Tensor) -> Tensor:
    """The powers of two that bring numbers >= 0 into [2^4, 2^5); ones for inf and NaN.

    None of them exceeds the largest power of the dtype: very small numbers are brought less far.
    Large numbers are not brought down to 1, so that their powers times what they scale are no
    subnormal numbers, which have fewer digits.
    """
    double = largest.dtype == torch.float64
    integer, digits, bias = (torch.int64, 52, 1023) if double else (torch.int32, 23, 127)
    exponent = largest.view(integer) >> digits
    inverse = (2 * bias + SCALED_BITS - 1 - exponent).clamp_(max=2 * bias)
    inverse.masked_fill_(exponent == 2 * bias + 1, bias)
    return (inverse << digits).view(largest.dtype)


def _product(left: Tensor, right: Tensor, out: Tensor, beta: int = 0) -> None:
    """``left @ right``, plus ``out`` if ``beta`` is 1, into ``out``, which may be wider than both.

    Where PyTorch has no such product its factors are widened, which changes nothing but the time:
    products of two half numbers are exact in float32.
    """
    if left.dtype != out.dtype and _has_wider_products(left):
        torch.addmm(out, left, right, out_dtype=out.dtype, beta=beta, out=out)
    else:
        torch.addmm(out, left.to(out.dtype), right.to(out.dtype), beta=beta, out=out)


def _has_wider_products(factor: Tensor) -> bool:
    """Whether PyTorch multiplies such factors to float32; tensors without data are as a GPU's.

    ROCm refuses, and CUDA where float16 is allowed to add up in float16.
    """
    if factor.device.type not in ("cuda", "meta") or torch.version.hip is not None:
        return False
    return factor.dtype != torch.float16 or not torch.backends.cuda.matmul.allow_fp16_accumulation


def _blocks(weight: Tensor, class_bytes: int) -> Iterator[slice]:
    """The classes of the weight, some at a time; ``class_bytes`` is what else a class takes."""
    num_classes, width = weight.shape
    step = BLOCK_BYTES // max(width * weight.dtype.itemsize, class_bytes)
    step = max(1, step // TILE_ROWS) * TILE_ROWS
    for first in range(0, num_classes, step):
        yield slice(first, min(first + step, num_classes))


def _largest(values: Tensor) -> Tensor:
    """The largest magnitude in the last dimension; 0 where that is empty."""
    if values.shape[-1] == 0:
        return values.new_zeros(values.shape[:-1])
    largest: Tensor = torch.linalg.vector_norm(values, float("inf"), dim=-1)
    return largest


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


class Gradients:
    """Gradients of features, weight and bias, to which chunks are added in their order.

    Those that nobody needs stay empty.
    """

    def __init__(self, call: HeadCall, rows: Rows, incoming: Tensor) -> None:
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
        # A mean over many rows makes gradients of logits that float16 has no digits for, or calls
        # zero. The other types have the range of float32.
        self._scale = None
        if call.factor_dtype == torch.float16:
            self._scale = scale_of(_largest_gradient(call, rows, incoming) / GRADIENT_ROOM)

    def add(self, weight: Weight, chunk: Chunk, grad_logits: Tensor, here: slice) -> None:
        """Add those of a chunk, whose rows are those of ``here``; ``grad_logits`` is written to."""
        if self._needs.need_bias:
            self._bias += grad_logits.sum(0, dtype=torch.float64)
        if self._scale is not None:
            grad_logits.mul_(self._scale)
        factor = grad_logits.to(chunk.features.dtype)
        if self._needs.need_features:
            _product(factor, weight.values, self.features[here])
        if self._needs.need_weight:
            _product(factor.mT, chunk.features, self.weight, beta=int(here.start > 0))

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients in the dtype of the loss."""
        bias = (
            self._bias.to(self.features.dtype)
            if self._needs.need_bias
            else self.features.new_empty(0)
        )
        if self._scale is not None:
            self.features.div_(self._scale)
            self.weight.div_(self._scale)
        return self.features, self.weight, bias


def _largest_gradient(call: HeadCall, rows: Rows, incoming: Tensor) -> Tensor:
    """A number that no gradient of a logit exceeds: probabilities differ by 1 at most."""
    options = call.options
    heaviest = 1.0 if call.class_weight is None else _largest(call.class_weight).double()
    ce_totals = kl_totals = incoming.new_ones(())
    if REDUCTIONS[options.reduction] == "mean":
        ce_totals, kl_totals = rows.totals.abs()
    size = options.ce_weight * heaviest / ce_totals
    size = size + options.kl_weight * options.temperature / kl_totals
    return (size * _largest(incoming.reshape(-1))).to(incoming.dtype)
