"""The losses as ``torch.autograd.Function``s over the operators; nothing else knows autograd.

:func:`loss_parts` is the way in: it takes the lightest of three ways that is right for the call.

Soft labels are constants, so only the logits (for the head: features, weight and bias) have a
gradient. A backward reads the inputs that its forward saw and writes over none of them, so a graph
may be kept and walked twice. Together with the operators' own vmap rules, ``setup_context`` and
``generate_vmap_rule`` make ``torch.func`` transforms work.

Each ``forward`` returns the outputs of its operator: the loss, which carries the graph, then
constants.
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
from introkernels.options import Options
from introkernels.types import LossParts


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
    measures both. From torch 2.14 on they are the same: the base class binds too.
    """
    inputs = unwrap_dead_wrappers(inputs)
    return super(torch.autograd.Function, function).apply(*inputs)  # type: ignore[misc]


class RowLossFunction(LossFunction):
    """The row loss of logits and teacher logits."""

    differentiable = (1,)

    @staticmethod
    def forward(
        operators: SimpleNamespace,
        logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: Options,
    ) -> tuple[Tensor, ...]:
        outputs = operators.row_loss_forward(
            logits, teacher_logits, target, weight, options.floats, options.ints
        )
        return tuple(outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.operators, logits, teacher_logits, target, weight, ctx.options = inputs
        _save(ctx, logits, teacher_logits, target, weight, output[-1])
        _only_loss_has_gradient(ctx, output)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *constants: None) -> Any:
        return (None, _grad_of_logits(ctx, grad_loss), *(None,) * 4)


class IntrospectiveFunction(LossFunction):
    """Statistics, teacher logits and row loss in one pass over the gradients.

    Its backward is that of the row loss, so the gradients tensor is not kept alive.
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
        weight: Tensor | None,
        options: Options,
    ) -> tuple[Tensor, ...]:
        outputs = operators.introspective_forward(
            logits,
            target,
            gradients,
            inputs,
            class_index,
            weight,
            options.floats,
            options.ints,
        )
        return tuple(outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.operators, logits, target, _, _, _, weight, ctx.options = inputs
        *_, state, teacher_logits = output
        _save(ctx, logits, teacher_logits, target, weight, state)
        _only_loss_has_gradient(ctx, output)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *constants: None) -> Any:
        return (None, _grad_of_logits(ctx, grad_loss), *(None,) * 6)


class LinearFunction(LossFunction):
    """The linear head and its loss, from explanations at its features or from a teacher.

    ``options.need_…`` say which gradients the forward makes along with the loss. The first backward
    hands them out; where there are none, or no more, they are made again.
    """

    differentiable = (1, 2, 4)

    @staticmethod
    def forward(
        operators: SimpleNamespace,
        features: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        class_weight: Tensor | None,
        teacher: tuple[Tensor, ...],
        options: Options,
    ) -> tuple[Tensor, ...]:
        tensors = features, weight, target, bias, class_weight, *teacher
        return _head(operators, options, None, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.operators, *tensors, teacher, ctx.options = inputs
        _save(ctx, *tensors, *teacher)
        _only_loss_has_gradient(ctx, output)
        needs = ctx.options.need_features, ctx.options.need_weight, ctx.options.need_bias
        # Apart from the saved tensors, which nobody may write to.
        ctx.kept = {"unit_grads": output[3:]} if any(needs) else {}

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *constants: None) -> Any:
        if grad_loss is None:
            return (None,) * 8
        _, need_features, need_weight, _, need_bias, *_ = ctx.needs_input_grad
        needs = (need_features, need_weight, need_bias)
        # Taken in one step, as two threads may walk a graph at once.
        unit_grads = ctx.kept.pop("unit_grads", None) if _is_plain(grad_loss) else None
        make = partial(_make_head_gradients, ctx.operators, ctx.options, needs, unit_grads)
        grads = _once(make, grad_loss, *ctx.saved_tensors)
        # A gradient that is not needed comes as an empty tensor.
        features, weight, bias = (
            grad if need else None for grad, need in zip(grads, needs, strict=True)
        )
        return (None, features, weight, None, bias, None, None, None)


def _head(
    operators: SimpleNamespace, options: Options, grad_loss: Tensor | None, *tensors: Any
) -> tuple[Tensor, ...]:
    """The operator of a head; ``tensors`` are those of `LinearFunction`."""
    features, weight, target, bias, class_weight, *teacher = tensors
    numbers = options.floats, options.ints
    if not teacher:
        outputs = operators.linear(
            features, weight, target, bias, class_weight, grad_loss, *numbers
        )
    else:
        head = [weight] if bias is None else [weight, bias]
        outputs = operators.linear_distillation(
            features, head, teacher, target, class_weight, grad_loss, *numbers
        )
    return tuple(outputs)


def _make_head_gradients(
    operators: SimpleNamespace,
    options: Options,
    needs: Sequence[bool],
    unit_grads: Sequence[Tensor] | None,
    grad_loss: Tensor,
    *tensors: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients of features, weight and bias; ``unit_grads`` are those for a ``grad_loss`` of 1.

    ``tensors`` are those of `LinearFunction`. All gradients of a scalar loss are made for one of 1
    and then multiplied, so that they are the same bits with and without ``unit_grads``.
    """
    features, weight, _, bias, *_ = tensors
    per_row = grad_loss.dim() > 0
    if unit_grads is None:
        need_features, need_weight, need_bias = needs
        options = options._replace(
            need_features=need_features, need_weight=need_weight, need_bias=need_bias
        )
        of_rows = grad_loss if per_row else None
        _, _, _, *unit_grads = _head(operators, options, of_rows, *tensors)
    grads: Sequence[Tensor] = unit_grads
    # On a GPU, looking at the number would stall the stream.
    plain = _is_plain(grad_loss)
    if not per_row and not (plain and grad_loss.device.type == "cpu" and grad_loss.item() == 1.0):
        grads = [grad.mul_(grad_loss) if plain else grad * grad_loss for grad in unit_grads]
    return tuple(
        [
            grad if like is None else grad.to(like.dtype)
            for grad, like in zip(grads, (features, weight, bias), strict=True)
        ]
    )


def _is_plain(grad_loss: Tensor) -> bool:
    """Whether it is one number: not a trace's stand-in, and not a batch of numbers in disguise."""
    return not (
        torch.compiler.is_compiling()
        or checks.is_fake(grad_loss)
        or torch._C._are_functorch_transforms_active()
        # The batches of torch.autograd.grad(..., is_grads_batched=True).
        or torch._C._functorch.is_legacy_batchedtensor(grad_loss)
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


def _grad_of_logits(ctx: Any, grad_loss: Tensor | None) -> Tensor | None:
    if grad_loss is None:
        return None
    grad_logits: Tensor = _once(
        ctx.operators.row_loss_backward,
        grad_loss,
        *ctx.saved_tensors,
        ctx.options.floats,
        ctx.options.ints,
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
        *tensors, options = inputs
        loss, ce, kl, *_ = function.forward(*tensors, options._replace(need_logits=False))
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
