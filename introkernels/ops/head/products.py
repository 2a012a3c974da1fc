"""The matrix products of a head: its logits, and two for its gradients.

Products are in the dtype of the loss, and their factors in ``HeadCall.factor_dtype``: half features
and weights are multiplied as they are, on tensor cores. What is made of them (the gradient of the
logits, for one) is computed in the dtype of the loss and rounded to that of factors once.

Everything stays on the device: no number is looked at by the host, so that calls can be captured
in a CUDA graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from introkernels import reference
from introkernels.ops.head.chunks import Chunk, HeadCall
from introkernels.ops.schema import loss_dtype
from introkernels.types import REDUCTIONS

# Numbers are brought below 2^5, so that squares of features times a weight are below 2^15: float16
# ends at 2^16. Squares then have all their digits down to 2^-11 of the largest number, and vanish
# below 2^-16 of it.
SCALED_BITS = 5
# By how much more gradients of logits are scaled in float16: they are factors without a square.
GRADIENT_ROOM = 2.0**10


class Rows(NamedTuple):
    """What is known of all rows before the first product.

    Attributes:
        live: ``[B]``, the rows that are not ignored.
        target: ``[B]``, classes that can be read: 0 where the row's target is no class.
        totals: ``[2]`` float64, see `introkernels.reference.totals`.
    """

    live: Tensor
    target: Tensor
    totals: Tensor


def survey_rows(call: HeadCall) -> Rows:
    """Look at all targets."""
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
    return Rows(live, target, reference.totals(live, target_weight))


def multiply(call: HeadCall, rows: Rows, chunk: Chunk, here: slice) -> None:
    """Fill in the features and the logits of a chunk, whose rows are those of ``here``."""
    chunk.features.copy_(call.features[here])
    # Whatever an ignored row holds must not reach the gradient of the weight.
    chunk.features.masked_fill_(~rows.live[here, None], 0)
    product(chunk.features, call.weight.to(chunk.features.dtype).mT, chunk.logits)
    if call.bias is not None:
        chunk.logits.add_(call.bias)


def scale_of(values: Tensor) -> Tensor:
    """The powers of two that bring numbers >= 0 into [2^4, 2^5); ones for inf and NaN.

    None of them exceeds the largest power of the dtype: very small numbers are brought less far.
    Large numbers are not brought down to 1, so that their powers times what they scale are no
    subnormal numbers, which have fewer digits.
    """
    double = values.dtype == torch.float64
    integer, digits, bias = (torch.int64, 52, 1023) if double else (torch.int32, 23, 127)
    exponent = values.view(integer) >> digits
    inverse = (2 * bias + SCALED_BITS - 1 - exponent).clamp_(max=2 * bias)
    inverse.masked_fill_(exponent == 2 * bias + 1, bias)
    return (inverse << digits).view(values.dtype)


def product(left: Tensor, right: Tensor, out: Tensor, beta: int = 0) -> None:
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


def largest(values: Tensor) -> Tensor:
    """The largest magnitude in the last dimension; 0 where that is empty."""
    if values.shape[-1] == 0:
        return values.new_zeros(values.shape[:-1])
    magnitude: Tensor = torch.linalg.vector_norm(values, float("inf"), dim=-1)
    return magnitude


class Gradients:
    """Gradients of features, weight and bias, to which chunks are added in their order.

    Those that nobody needs stay empty.
    """

    def __init__(self, call: HeadCall, rows: Rows) -> None:
        self._needs = call.options
        self._values = call.weight.to(call.factor_dtype)
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
            self._scale = scale_of(_largest_gradient(call, rows) / GRADIENT_ROOM)

    def add_to_bias(self, grad_logits: Tensor) -> None:
        """Add the rows of a gradient of logits to that of the bias."""
        if self._needs.need_bias:
            self._bias += grad_logits.sum(0, dtype=torch.float64)

    def add(self, chunk: Chunk, grad_logits: Tensor, here: slice) -> None:
        """Add those of a chunk, whose rows are those of ``here``; ``grad_logits`` is written to."""
        if not self._needs.need_logits:
            return
        if self._scale is not None:
            grad_logits.mul_(self._scale)
        factor = grad_logits.to(chunk.features.dtype)
        if self._needs.need_features:
            product(factor, self._values, self.features[here])
        if self._needs.need_weight:
            product(factor.mT, chunk.features, self.weight, beta=int(here.start > 0))

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


def _largest_gradient(call: HeadCall, rows: Rows) -> Tensor:
    """A number that no gradient of a logit exceeds: probabilities differ by 1 at most."""
    options, incoming = call.options, call.incoming
    heaviest = 1.0 if call.class_weight is None else largest(call.class_weight).double()
    ce_totals = kl_totals = incoming.new_ones(())
    if REDUCTIONS[options.reduction] == "mean":
        ce_totals, kl_totals = rows.totals.abs()
    size = options.ce_weight * heaviest / ce_totals
    size = size + options.kl_weight * options.temperature / kl_totals
    return (size * largest(incoming.reshape(-1))).to(incoming.dtype)
