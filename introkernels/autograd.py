"""The losses as ``torch.autograd.Function``s over the operators; nothing else knows autograd.

Soft labels are constants, so only the logits (for the head: features, weight and bias) have a
gradient. A backward reads the inputs that its forward saw and writes over none of them, so a graph
may be kept and walked twice. Together with the operators' own vmap rules, ``setup_context`` and
``generate_vmap_rule`` make ``torch.func`` transforms work.

Each ``apply`` returns the outputs of its forward operator: the loss, which carries the graph, then
constants. ``options`` are the operator's trailing numbers, in its schema's order; they are one
argument because torch.compile counts the parameters of a ``forward``.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

Scalar = float | int | bool


class DistillationFunction(torch.autograd.Function):
    """The row loss on given teacher logits."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        operators: SimpleNamespace,
        logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: tuple[Scalar, ...],
    ) -> tuple[Tensor, ...]:
        outputs = operators.distillation_forward(logits, teacher_logits, target, weight, *options)
        return tuple(outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.operators, logits, teacher_logits, target, weight, ctx.options = inputs
        _, _, _, row_state, totals = output
        _save(ctx, logits, teacher_logits, target, row_state, totals, weight)
        _only_loss_has_gradient(ctx, output)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *constants: None) -> Any:
        grad_logits = None
        if grad_loss is not None:
            grad_logits = _once(
                ctx.operators.distillation_backward, grad_loss, *ctx.saved_tensors, *ctx.options
            )
        return (None, grad_logits, *(None,) * 4)


class SimilarityFunction(torch.autograd.Function):
    """The row loss on explanation statistics."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        operators: SimpleNamespace,
        logits: Tensor,
        target: Tensor,
        dots: Tensor,
        sq_norms: Tensor,
        class_index: Tensor | None,
        weight: Tensor | None,
        options: tuple[Scalar, ...],
    ) -> tuple[Tensor, ...]:
        outputs = operators.similarity_forward(
            logits, target, dots, sq_norms, class_index, weight, *options
        )
        return tuple(outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.operators, logits, target, dots, sq_norms, class_index, weight, ctx.options = inputs
        _, _, _, row_state, totals = output
        _save(ctx, logits, target, dots, sq_norms, class_index, row_state, totals, weight)
        _only_loss_has_gradient(ctx, output)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *constants: None) -> Any:
        return (None, _grad_of_similarity_loss(ctx, grad_loss), *(None,) * 6)


class IntrospectiveFunction(torch.autograd.Function):
    """Statistics and row loss in one pass over the gradients.

    Its backward needs the statistics only, so the gradients tensor is not kept alive.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        operators: SimpleNamespace,
        logits: Tensor,
        target: Tensor,
        gradients: Tensor,
        inputs: Tensor,
        class_index: Tensor | None,
        center: bool,
        weight: Tensor | None,
        options: tuple[Scalar, ...],
    ) -> tuple[Tensor, ...]:
        outputs = operators.introspective_forward(
            logits, target, gradients, inputs, class_index, center, weight, *options
        )
        return tuple(outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.operators, logits, target, _, _, class_index, _, weight, ctx.options = inputs
        _, _, _, row_state, totals, dots, sq_norms = output
        _save(ctx, logits, target, dots, sq_norms, class_index, row_state, totals, weight)
        _only_loss_has_gradient(ctx, output)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *constants: None) -> Any:
        return (None, _grad_of_similarity_loss(ctx, grad_loss), *(None,) * 7)


class LinearFunction(torch.autograd.Function):
    """The linear head and its loss, explained at the features."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        operators: SimpleNamespace,
        features: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        center: bool,
        class_weight: Tensor | None,
        options: tuple[Scalar, ...],
    ) -> tuple[Tensor, ...]:
        outputs = operators.linear_forward(
            features, weight, target, bias, center, class_weight, *options
        )
        return tuple(outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.operators, features, weight, target, bias, ctx.center, class_weight, ctx.options = (
            inputs
        )
        _, _, _, row_state, totals = output
        _save(ctx, features, weight, target, bias, row_state, totals, class_weight)
        _only_loss_has_gradient(ctx, output)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *constants: None) -> Any:
        grads: list[Tensor | None] = [None, None, None]
        if grad_loss is not None:
            features, weight, target, bias, row_state, totals, class_weight = ctx.saved_tensors
            _, need_features, need_weight, _, need_bias, *_ = ctx.needs_input_grad
            grads = list(
                _once(
                    ctx.operators.linear_backward,
                    grad_loss,
                    features,
                    weight,
                    target,
                    bias,
                    row_state,
                    totals,
                    need_features,
                    need_weight,
                    ctx.center,
                    class_weight,
                    *ctx.options,
                )
            )
            # The operator answers a gradient that is not needed with an empty tensor.
            needed = (need_features, need_weight, need_bias)
            grads = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
        grad_features, grad_weight, grad_bias = grads
        return (None, grad_features, grad_weight, None, grad_bias, None, None, None)


class _OnceDifferentiable(torch.autograd.Function):
    """A backward operator as a node of its own, there to refuse a second differentiation."""

    generate_vmap_rule = True

    @staticmethod
    def forward(operator: Callable[..., Any], *args: Any) -> Any:
        return operator(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "introkernels losses can be differentiated once: double backward is not supported "
            "(a gradient of the loss was differentiated again). Use the functions of "
            "introkernels.reference, which plain autograd differentiates any number of times."
        )


def _grad_of_similarity_loss(ctx: Any, grad_loss: Tensor | None) -> Tensor | None:
    if grad_loss is None:
        return None
    grad_logits: Tensor = _once(
        ctx.operators.similarity_backward, grad_loss, *ctx.saved_tensors, *ctx.options
    )
    return grad_logits


def _once(operator: Callable[..., Any], *args: Any) -> Any:
    """Call a backward operator so that differentiating its result raises.

    ``torch.autograd.function.once_differentiable`` would not do: it lets a second differentiation
    pass in silence where the incoming gradient is a constant, as it is under ``loss.backward()``.
    Compiled graphs refuse double backward on their own.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _OnceDifferentiable.apply(operator, *args)
    return operator(*args)


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    """Save tensors for the backward, also constants that were made in inference mode.

    A teacher usually runs in inference mode, and autograd refuses to save what it made.
    """
    if not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled():
        tensors = tuple(
            tensor.clone() if tensor is not None and tensor.is_inference() else tensor
            for tensor in tensors
        )
    ctx.save_for_backward(*tensors)


def _only_loss_has_gradient(ctx: Any, output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
