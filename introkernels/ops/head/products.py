"""The matrix products of a head: three for its loss, two more for its gradients.

With ``E_c = w_c * h``, elementwise,

    z = h W^T,   dots = (h^2 * w_y) W^T,   sq_norms = h^2 (W^2)^T,

where ``w`` is the weight without its mean in the last two if explanations are centred. Similarities
are ratios: a power of two that brings each row of features, or the whole weight, near 1 changes
nothing in them but keeps squares in range.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from introkernels.ops.head.call import HeadCall, Needs
from introkernels.ops.head.chunks import Chunk
from introkernels.ops.schema import loss_dtype


class Weight(NamedTuple):
    """The weight as products take it.

    Attributes:
        wide: the weight in the computing type.
        explained: the same, or without its mean.
        squares: the squares of ``explained`` times a power of two.
    """

    wide: Tensor
    explained: Tensor
    squares: Tensor


def multiply(weight: Weight, bias: Tensor | None, chunk: Chunk) -> None:
    """Fill the matrices of all classes from those of the features."""
    torch.mm(chunk.features, weight.wide.mT, out=chunk.logits)
    if bias is not None:
        chunk.logits.add_(bias)
    torch.mm(chunk.squares_of_target, weight.explained.mT, out=chunk.dots)
    torch.mm(chunk.squares, weight.squares.mT, out=chunk.sq_norms)


class Gradients:
    """Gradients of features, weight and bias, to which chunks are added in their order.

    Those that nobody needs stay empty.
    """

    def __init__(self, call: HeadCall, needs: Needs) -> None:
        self._needs = needs
        num_classes, width = call.weight.shape
        dtype = loss_dtype(call.features)

        def empty_unless(needed: bool, *shape: int) -> Tensor:
            return call.features.new_empty(shape if needed else (0,), dtype=dtype)

        self.features = empty_unless(needs.features, call.features.shape[0], width)
        self.weight = empty_unless(needs.weight, num_classes, width)
        if call.features.shape[0] == 0:
            self.weight.zero_()
        # Sums of many rows that may cancel: each class has one number, which may as well be wide.
        self._bias = call.features.new_zeros(num_classes, dtype=torch.float64)

    def add(self, weight: Weight, features: Tensor, grad_logits: Tensor, first_row: int) -> None:
        """Add those of a chunk of rows that starts at ``first_row``.

        ``features`` are those of the chunk in the computing type, zeros in ignored rows.
        """
        if self._needs.features:
            rows = slice(first_row, first_row + len(grad_logits))
            torch.mm(grad_logits, weight.wide, out=self.features[rows])
        if self._needs.weight and first_row == 0:
            torch.mm(grad_logits.mT, features, out=self.weight)
        elif self._needs.weight:
            self.weight.addmm_(grad_logits.mT, features)
        if self._needs.bias:
            self._bias += grad_logits.sum(0, dtype=torch.float64)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients in the dtype of the loss."""
        bias = (
            self._bias.to(self.features.dtype) if self._needs.bias else self.features.new_empty(0)
        )
        return self.features, self.weight, bias
