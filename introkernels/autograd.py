"""The losses as ``torch.autograd.Function``s over the operators; nothing else knows autograd.

:func:`loss_parts` is the way in: it takes the lightest of three ways that is right for the call.

Soft labels are constants, so only the logits (for the head: features, weight and bias) have a
gradient. A backward reads the inputs that its forward saw and writes over none of them, so a graph
may be kept and walked twice. Together with the operators' own vmap rules, ``setup_context`` and
``generate_vmap_rule`` make ``torch.func`` transforms work.

Each ``forward`` returns the outputs of its operator: the loss, which carries the graph, then
constants. ``options`` are the operator's trailing numbers, in its schema's order; they are one
argument because torch.compile counts the parameters of a ``forward``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

from introkernels import checks
from introkernels.types import LossParts

Scalar = float | int | bool


class LossFunction(torch.autograd.Function):
    """What the losses have in common.

    Attributes:
        differentiable: positions of the arguments of ``forward`` that have a gradient.
    """

    generate_vmap_rule = True
    differentiable: tuple[int, ...]


def _apply(function: type[LossFunction], inputs: tuple[Any, ...]) -> Any:
    """``function.apply(*inputs)``, outside of transforms and compilers, in a third of the time.

    In every call ``Function.apply`` binds its arguments to the signature of ``forward``, as some
    may come by keyword. Ours never do; what else it does is done here. ``benchmarks/apply.py``
    measures both.
    """
    inputs = unwrap_dead_wrappers(inputs)
    return super(torch.autograd.Function, function).apply(*inputs)  # type: ignore[misc]


class DistillationFunction(LossFunction):
    """The row loss on given teacher logits."""

    differentiable = (1,)

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


class SimilarityFunction(LossFunction):
    """The row loss on explanation statistics."""

    differentiable = (1,)

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


class IntrospectiveFunction(LossFunction):
    """Statistics and row loss in one pass over the gradients.

    Its backward needs the statistics only, so the gradients tensor is not kept alive.
    """

    differentiable = (1,)

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


class LinearFunction(LossFunction):
    """The linear head and its loss, explained at the features.

    ``needs`` says which gradients (of features, weight, bias) the forward makes along with the
    loss. The first backward hands them out; where there are none, or no more, they are made again.
    """

    differentiable = (1, 2, 4)

    @staticmethod
    def forward(
        operators: SimpleNamespace,
        features: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        needs: tuple[bool, bool, bool],
        center: bool,
        class_weight: Tensor | None,
        options: tuple[Scalar, ...],
    ) -> tuple[Tensor, ...]:
        outputs = operators.linear_forward(
            features, weight, target, bias, *needs, center, class_weight, *options
        )
        return tuple(outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.operators, features, weight, target, bias, needs, ctx.center, class_weight, options = (
            inputs
        )
        ctx.options = options
        _, _, _, row_state, totals, *unit_grads = output
        _save(ctx, features, weight, target, bias, row_state, totals, class_weight)
        _only_loss_has_gradient(ctx, output)
        # Apart from the saved tensors, which nobody may write to.
        ctx.kept = {"unit_grads": unit_grads} if any(needs) else {}

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *constants: None) -> Any:
        if grad_loss is None:
            return (None,) * 9
        features, weight, target, bias, row_state, totals, class_weight = ctx.saved_tensors
        _, need_features, need_weight, _, need_bias, *_ = ctx.needs_input_grad
        # Taken in one step, as two threads may walk a graph at once.
        unit_grads = ctx.kept.pop("unit_grads", None) if _is_plain(grad_loss) else None
        if unit_grads is not None:
            multiply = partial(_multiply_in_place, unit_grads)
            grads = _once(multiply, grad_loss, features, weight, bias)
        else:
            grads = _once(
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
        # A gradient that is not needed comes as an empty tensor.
        needed = (need_features, need_weight, need_bias)
        grad_features, grad_weight, grad_bias = [
            grad if need else None for grad, need in zip(grads, needed, strict=True)
        ]
        return (None, grad_features, grad_weight, None, grad_bias, None, None, None, None)


def _is_plain(grad_loss: Tensor) -> bool:
    """Whether it is one number: not a trace's stand-in, and not a batch of numbers in disguise."""
    return not (
        torch.compiler.is_compiling()
        or checks.is_fake(grad_loss)
        or torch._C._are_functorch_transforms_active()
        # The batches of torch.autograd.grad(..., is_grads_batched=True).
        or torch._C._functorch.is_legacy_batchedtensor(grad_loss)
    )


def _multiply_in_place(
    unit_grads: list[Tensor], grad_loss: Tensor, *arguments: Tensor | None
) -> tuple[Tensor, ...]:
    """Turn the arguments' gradients for an incoming gradient of 1 into those for ``grad_loss``."""
    # On a GPU, looking at the number would stall the stream.
    if grad_loss.device.type != "cpu" or grad_loss.item() != 1.0:
        for grad in unit_grads:
            grad.mul_(grad_loss)
    return tuple(
        [
            grad if like is None else grad.to(like.dtype)
            for grad, like in zip(unit_grads, arguments, strict=True)
        ]
    )


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
    """
    if torch.is_grad_enabled():
        return _OnceDifferentiable.apply(operator, *args)
    return operator(*args)


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    """Save tensors for the backward, also constants that were made in inference mode.

    A teacher usually runs in inference mode, and autograd refuses to save what it made.
    """
    kept: Sequence[Tensor | None] = tensors
    if not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled():
        kept = [
            tensor.clone() if tensor is not None and tensor.is_inference() else tensor
            for tensor in tensors
        ]
    ctx.save_for_backward(*kept)


def _only_loss_has_gradient(ctx: Any, output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def constant(tensor: Tensor | None) -> Tensor | None:
    """``tensor`` without its graph."""
    return None if tensor is None else tensor.detach()


def loss_parts(function: type[LossFunction], *inputs: Any) -> LossParts:
    """The loss and its terms, with a graph where one is asked for.

    A plain call goes straight to the operator if nothing of it is differentiated, else through
    `_apply`: what takes time in a small loss is not its kernel.

    Raises:
        RuntimeError: inside ``torch.compile`` of a ``torch.func`` transform. Dynamo would
            differentiate the forward operator, which lies below autograd, instead of calling the
            backward, and answer zero. Without ``fullgraph`` it catches this error and runs the
            transform eagerly, which is right.
    """
    transformed = torch._C._are_functorch_transforms_active()
    compiling = torch.compiler.is_compiling()
    if compiling and transformed:
        raise RuntimeError(
            "introkernels losses can't be compiled inside a torch.func transform: leave "
            "fullgraph=True out, or use the functions of introkernels.reference there"
        )
    if compiling or transformed:
        loss, ce, kl, *_ = function.apply(*inputs)
    elif _needs_graph(function, inputs):
        loss, ce, kl, *_ = _apply(function, inputs)
    else:
        loss, ce, kl, *_ = function.forward(*inputs)
    return LossParts(loss, ce, kl)


def _needs_graph(function: type[LossFunction], inputs: tuple[Any, ...]) -> bool:
    """Whether autograd has to see a call: for a gradient, or to refuse forward-mode AD."""
    if forward_ad._current_level >= 0:
        return True
    if not torch.is_grad_enabled():
        return False
    for position in function.differentiable:
        tensor = inputs[position]
        if tensor is not None and tensor.requires_grad:
            return True
    return False
