"""The linear head: products of the matrix library, and a row loss, for a chunk of rows at a time.

The row loss is that of the operators ``similarity_forward`` and ``similarity_backward`` of any
namespace, on tensors of any device; nothing of size ``[B, C]`` exists beyond a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from introkernels import reference
from introkernels.ops.cuda.explained import explain_rows, explain_weight, survey_rows
from introkernels.ops.head.call import HeadCall, Needs
from introkernels.ops.head.chunks import Chunk, walk
from introkernels.ops.head.operators import linear_operators
from introkernels.ops.head.precision import full_float32
from introkernels.ops.head.products import Gradients, multiply
from introkernels.ops.schema import loss_dtype, row_state_like
from introkernels.types import REDUCTIONS


class ChunkedHead:
    """The way of a head on the row operators of a namespace of PyTorch's dispatcher.

    ``row_operators`` has ``similarity_forward`` and ``similarity_backward``, as in
    introkernels/ops/schema.py.
    """

    def __init__(self, row_operators: Any) -> None:
        self._row_operators = row_operators

    def forward(self, call: HeadCall, needs: Needs) -> tuple[Tensor, ...]:
        """Loss, ce, kl, row_state, totals and the gradients that are needed."""
        num_rows = call.features.shape[0]
        dtype = loss_dtype(call.features)
        ce, kl = (call.features.new_empty(num_rows, dtype=dtype) for _ in range(2))
        row_state = row_state_like(call.features)
        gradients = Gradients(call, needs)
        rows = survey_rows(call)
        # Gradients of the first rows need what the last row adds to the divisor.
        totals = rows.totals
        with full_float32():
            weight = explain_weight(call)
            for first_row, chunk in walk(call):
                here = slice(first_row, first_row + len(chunk.logits))
                explain_rows(call, rows, weight, chunk, first_row)
                multiply(weight.weight, call.bias, chunk)
                _, ce[here], kl[here], row_state[here], _ = self._lose(call, chunk, here)
                if any(needs):
                    grad_logits = self._differentiate(
                        call, chunk, here, None, row_state[here], totals
                    )
                    gradients.add(weight.weight, chunk.features, grad_logits, first_row)
        terms = reference.RowTerms(ce.double(), kl.double(), rows.live, rows.target_weight)
        losses = reference.reduce_terms(
            terms,
            call.loss.temperature,
            call.loss.ce_weight,
            call.loss.kl_weight,
            REDUCTIONS[call.loss.reduction],
        )
        return (*(part.to(dtype) for part in losses), row_state, totals, *gradients.finish())

    def backward(
        self,
        call: HeadCall,
        needs: Needs,
        grad_loss: Tensor | None,
        row_state: Tensor,
        totals: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients for an incoming gradient ``[B]``, ones without it, in the dtype of the loss."""
        gradients = Gradients(call, needs)
        rows = survey_rows(call)
        with full_float32():
            weight = explain_weight(call)
            for first_row, chunk in walk(call):
                here = slice(first_row, first_row + len(chunk.logits))
                explain_rows(call, rows, weight, chunk, first_row)
                multiply(weight.weight, call.bias, chunk)
                grad_logits = self._differentiate(
                    call, chunk, here, grad_loss, row_state[here], totals
                )
                gradients.add(weight.weight, chunk.features, grad_logits, first_row)
        return gradients.finish()

    def _lose(self, call: HeadCall, chunk: Chunk, here: slice) -> tuple[Tensor, ...]:
        """The row loss of a chunk, not reduced."""
        outputs: tuple[Tensor, ...] = self._row_operators.similarity_forward(
            chunk.logits,
            call.target[here],
            chunk.dots,
            chunk.sq_norms,
            None,
            *call.loss._replace(reduction=REDUCTIONS.index("none")),
            *call.labels,
        )
        return outputs

    def _differentiate(
        self,
        call: HeadCall,
        chunk: Chunk,
        here: slice,
        grad_loss: Tensor | None,
        row_state: Tensor,
        totals: Tensor,
    ) -> Tensor:
        """The gradient of a chunk's logits."""
        if grad_loss is None:
            one = chunk.logits.new_ones(())
            per_row = REDUCTIONS[call.loss.reduction] == "none"
            incoming = one.expand(len(chunk.logits)) if per_row else one
        else:
            incoming = grad_loss[here]
        grad_logits: Tensor = self._row_operators.similarity_backward(
            incoming,
            chunk.logits,
            call.target[here],
            chunk.dots,
            chunk.sq_norms,
            None,
            row_state,
            totals,
            *call.loss,
            *call.labels,
        )
        return grad_logits


# A torch.library.Library withdraws its kernels when it is collected.
_libraries: list[torch.library.Library] = []


def register(namespace: str, dispatch_key: str, row_operators: Any = None) -> None:
    """Serve ``linear_forward`` and ``linear_backward`` of ``namespace`` for ``dispatch_key``.

    Args:
        namespace: one that introkernels/ops/schema.py has defined.
        dispatch_key: ``"CUDA"`` or ``"CPU"``.
        row_operators: where the row loss comes from; without it, from ``namespace`` itself.
    """
    head = ChunkedHead(row_operators or getattr(torch.ops, namespace))
    library = torch.library.Library(namespace, "IMPL")
    _libraries.append(library)
    operators = linear_operators(lambda call: head)
    # Kernels lie below autograd even where they are made of differentiable functions.
    library.impl("linear_forward", torch.no_grad()(operators.forward), dispatch_key)
    library.impl("linear_backward", torch.no_grad()(operators.backward), dispatch_key)
