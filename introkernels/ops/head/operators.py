"""The operators of a linear head over whatever computes its loss and its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from introkernels.ops.head.call import HeadCall, Needs
from introkernels.ops.indices import check_indices
from introkernels.ops.options import LabelOptions, LossOptions
from introkernels.types import REDUCTIONS


class Way(Protocol):
    """One way to the loss of a head and its gradients."""

    def forward(self, call: HeadCall, needs: Needs) -> tuple[Tensor, ...]:
        """Loss, ce, kl, row_state, totals and the gradients of features, weight and bias.

        The gradients are those for an incoming gradient of 1 (in each row), in the dtype of the
        loss, and empty where they are not needed.
        """

    def backward(
        self,
        call: HeadCall,
        needs: Needs,
        grad_loss: Tensor | None,
        row_state: Tensor,
        totals: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients alone, for an incoming gradient ``[B]``; None stands for ones."""


class LinearOperators(NamedTuple):
    """``linear_forward`` and ``linear_backward`` of introkernels/ops/schema.py."""

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def linear_operators(way_of: Callable[[HeadCall], Way]) -> LinearOperators:
    """The operators of a head that goes the way that ``way_of`` chooses for each call."""

    def linear_forward(
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
        return way_of(call).forward(call, Needs(need_features, need_weight, need_bias))

    def linear_backward(
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
        grads = way_of(call).backward(
            call, needs, grad_loss if per_row else None, row_state, totals
        )
        # The gradient of a scalar loss is scaled last, so that it is the same number, to the bit,
        # whether it was made here or along with the loss.
        if not per_row:
            for grad in grads:
                grad.mul_(grad_loss)
        like = (features, weight, features if bias is None else bias)
        grad_features, grad_weight, grad_bias = (
            grad.to(of.dtype) for grad, of in zip(grads, like, strict=True)
        )
        return grad_features, grad_weight, grad_bias

    return LinearOperators(linear_forward, linear_backward)
