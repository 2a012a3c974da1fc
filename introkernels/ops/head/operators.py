"""The operators of a linear head, on any row loss of explanation statistics.

The row loss is ``similarity_forward`` and ``similarity_backward`` of introkernels/ops/schema.py, of
whatever backend, on tensors of any device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from introkernels import reference
from introkernels.ops.head.chunks import Chunk, HeadCall, chunks_of
from introkernels.ops.head.products import (
    Gradients,
    Needs,
    explain_weight,
    multiply,
    survey_rows,
)
from introkernels.ops.indices import check_indices
from introkernels.ops.options import LabelOptions, LossOptions
from introkernels.ops.schema import loss_dtype, row_state_like
from introkernels.types import REDUCTIONS


class ChunkedHead:
    """``linear_forward`` and ``linear_backward`` of introkernels/ops/schema.py on a row loss.

    They walk over chunks of rows: products, row loss, gradients.
    """

    def __init__(
        self,
        similarity_forward: Callable[..., tuple[Tensor, ...]],
        similarity_backward: Callable[..., Tensor],
    ) -> None:
        self._similarity_forward = similarity_forward
        self._similarity_backward = similarity_backward

    def linear_forward(
        self,
        features: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        need_features: bool,
        need_weight: bool,
        need_bias: bool,
        center: bool,
        class_weight: Tensor | None,
        temperature: float,
        ce_weight: float,
        kl_weight: float,
        ignore_index: int,
        label_smoothing: float,
        reduction: int,
        similarity_temperature: float,
        similarity: int,
        label_mode: int,
        non_target_mass: float,
    ) -> tuple[Tensor, ...]:
        check_indices(target, weight.shape[0], ignore_index)
        call = HeadCall(
            features,
            weight,
            target,
            bias,
            center,
            LossOptions(
                class_weight,
                temperature,
                ce_weight,
                kl_weight,
                ignore_index,
                label_smoothing,
                reduction,
            ),
            LabelOptions(similarity_temperature, similarity, label_mode, non_target_mass),
        )
        return self._forward(call, Needs(need_features, need_weight, need_bias))

    def linear_backward(
        self,
        grad_loss: Tensor,
        features: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        row_state: Tensor,
        totals: Tensor,
        need_features: bool,
        need_weight: bool,
        center: bool,
        class_weight: Tensor | None,
        temperature: float,
        ce_weight: float,
        kl_weight: float,
        ignore_index: int,
        label_smoothing: float,
        reduction: int,
        similarity_temperature: float,
        similarity: int,
        label_mode: int,
        non_target_mass: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        call = HeadCall(
            features,
            weight,
            target,
            bias,
            center,
            LossOptions(
                class_weight,
                temperature,
                ce_weight,
                kl_weight,
                ignore_index,
                label_smoothing,
                reduction,
            ),
            LabelOptions(similarity_temperature, similarity, label_mode, non_target_mass),
        )
        needs = Needs(need_features, need_weight, bias is not None)
        per_row = REDUCTIONS[reduction] == "none"
        # The gradient of a scalar loss is scaled last, so that it is the same number, to the bit,
        # whether it was made here or along with the loss.
        incoming = grad_loss if per_row else torch.ones_like(grad_loss)
        grads = self._backward(call, needs, incoming, row_state, totals)
        if not per_row:
            for grad in grads:
                grad.mul_(grad_loss)
        like = (features, weight, features if bias is None else bias)
        grad_features, grad_weight, grad_bias = (
            grad.to(of.dtype) for grad, of in zip(grads, like, strict=True)
        )
        return grad_features, grad_weight, grad_bias

    def _forward(self, call: HeadCall, needs: Needs) -> tuple[Tensor, ...]:
        """Loss, ce, kl, row_state, totals and the gradients of features, weight and bias.

        The gradients are those for an incoming gradient of 1 (in each row), in the dtype of the
        loss, and empty where they are not needed.
        """
        num_rows = call.features.shape[0]
        dtype = loss_dtype(call.features)
        reduction = REDUCTIONS[call.loss.reduction]
        of_rows = call.loss._replace(reduction=REDUCTIONS.index("none"))
        ones = call.features.new_ones(num_rows if reduction == "none" else (), dtype=dtype)
        ce, kl = (call.features.new_empty(num_rows, dtype=dtype) for _ in range(2))
        row_state = row_state_like(call.features)
        gradients = Gradients(call, needs)
        rows, weight = survey_rows(call), explain_weight(call)
        # Gradients of the first rows need what the last row adds to the divisor.
        totals = rows.totals
        for here, chunk in chunks_of(call):
            multiply(call, rows, weight, chunk, here)
            _, ce[here], kl[here], row_state[here], _ = self._similarity_forward(
                chunk.logits,
                call.target[here],
                chunk.dots,
                chunk.sq_norms,
                None,
                *of_rows,
                *call.labels,
            )
            if any(needs):
                grad_logits = self._differentiate(call, chunk, here, ones, row_state, totals)
                gradients.add(weight, chunk, grad_logits, here)
        losses = reference.reduce_terms(
            reference.RowTerms(ce.double(), kl.double(), rows.live, rows.target_weight),
            call.loss.temperature,
            call.loss.ce_weight,
            call.loss.kl_weight,
            reduction,
        )
        return (*(part.to(dtype) for part in losses), row_state, totals, *gradients.finish())

    def _backward(
        self, call: HeadCall, needs: Needs, grad_loss: Tensor, row_state: Tensor, totals: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients alone, for an incoming gradient as the row loss takes it."""
        gradients = Gradients(call, needs)
        rows, weight = survey_rows(call), explain_weight(call)
        for here, chunk in chunks_of(call):
            multiply(call, rows, weight, chunk, here)
            grad_logits = self._differentiate(call, chunk, here, grad_loss, row_state, totals)
            gradients.add(weight, chunk, grad_logits, here)
        return gradients.finish()

    def _differentiate(
        self,
        call: HeadCall,
        chunk: Chunk,
        here: slice,
        grad_loss: Tensor,
        row_state: Tensor,
        totals: Tensor,
    ) -> Tensor:
        """The gradient of a chunk's logits."""
        return self._similarity_backward(
            grad_loss[here] if grad_loss.dim() else grad_loss,
            chunk.logits,
            call.target[here],
            chunk.dots,
            chunk.sq_norms,
            None,
            row_state[here],
            totals,
            *call.loss,
            *call.labels,
        )


# A torch.library.Library withdraws its kernels when it is collected.
_libraries: list[torch.library.Library] = []


def register_head(namespace: str, dispatch_key: str, row_losses: Any = None) -> None:
    """Serve ``linear_forward`` and ``linear_backward`` of ``namespace`` for ``dispatch_key``.

    Args:
        namespace: one that introkernels/ops/schema.py has defined.
        dispatch_key: ``"CUDA"`` or ``"CPU"``.
        row_losses: where the row loss comes from; without it, from ``namespace`` itself.
    """
    row_losses = row_losses or getattr(torch.ops, namespace)
    head = ChunkedHead(row_losses.similarity_forward, row_losses.similarity_backward)
    library = torch.library.Library(namespace, "IMPL")
    _libraries.append(library)
    # Kernels lie below autograd even where they are made of differentiable functions.
    library.impl("linear_forward", torch.no_grad()(head.linear_forward), dispatch_key)
    library.impl("linear_backward", torch.no_grad()(head.linear_backward), dispatch_key)
