"""The operators: their schemas, the shapes they return, and how vmap and autocast treat them.

Every operator exists once in each namespace: ``introkernels``, which PyTorch's dispatcher sends to
the best library loaded for the tensors' device and to PyTorch's own operations where there is none,
``introkernels_composite``, which is always these, ``introkernels_reference``, which is these in
float64, and, where Triton is usable, ``introkernels_triton``.

``floats`` and ``ints`` are those of :class:`introkernels.options.Options`. Codes:
``reduction`` 0 none, 1 mean, 2 sum; ``similarity`` 0 cosine, 1 projection; ``label_mode`` as in
introkernels/types.py: 0, a softmax, is the only one that kernels make.

Losses return ``loss``, ``ce``, ``kl`` (``[B]`` or scalars) and ``state``, what a backward reads
beside the inputs. Kernels keep ``[B + 1, ROW_STATE]`` float64: some numbers of each row, then, in
the first two of the last row, what means are divided by: the sum of the target weights (NaN where
it is 0), and the number of rows not ignored. PyTorch's own operations keep the gradient ``[B, C]``
for an incoming gradient of 1, in the dtype of the loss; nothing where ``need_logits`` is not set.
``gradients`` are ``[B, K, *S]`` and ``inputs`` ``[B, *S]``, of any
strides. Teacher logits ``[B, C]`` that an operator returns are float64 for float64 logits or
statistics, else float32.

``linear`` is the head and its loss, along with the gradients that are asked for, in the dtype of
the loss; the others are empty. They are for an incoming gradient of 1, or for ``grad_loss [B]``
where reduction is 0. ``linear_distillation`` is the same with a teacher of its own: ``head`` is the
weight and, if there is one, the bias; ``teacher`` is what introkernels/ops/head/teachers.py packs.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

ROW_STATE = 9

_OPTIONS = "float[] floats, int[] ints"
_LOSS = "Tensor loss, Tensor ce, Tensor kl"

SCHEMAS = {
    "row_loss_forward": (
        "(Tensor logits, Tensor teacher_logits, Tensor target, Tensor? weight, "
        f"{_OPTIONS}) -> ({_LOSS}, Tensor state)"
    ),
    "row_loss_backward": (
        "(Tensor grad_loss, Tensor logits, Tensor teacher_logits, Tensor target, Tensor? weight, "
        f"Tensor state, {_OPTIONS}) -> Tensor"
    ),
    "explanation_stats": (
        "(Tensor gradients, Tensor inputs, Tensor target, Tensor? class_index, bool center, "
        "int ignore_index) -> (Tensor dots, Tensor sq_norms)"
    ),
    "teacher_logits": (
        "(Tensor dots, Tensor sq_norms, Tensor target, Tensor? class_index, int num_classes, "
        f"{_OPTIONS}) -> Tensor"
    ),
    "introspective_forward": (
        "(Tensor logits, Tensor target, Tensor gradients, Tensor inputs, Tensor? class_index, "
        f"Tensor? weight, {_OPTIONS}) -> ({_LOSS}, Tensor state, Tensor teacher_logits)"
    ),
    "linear": (
        "(Tensor features, Tensor weight, Tensor target, Tensor? bias, Tensor? class_weight, "
        f"Tensor? grad_loss, {_OPTIONS}) -> "
        f"({_LOSS}, Tensor grad_features, Tensor grad_weight, Tensor grad_bias)"
    ),
    "linear_distillation": (
        "(Tensor features, Tensor[] head, Tensor[] teacher, Tensor target, Tensor? class_weight, "
        f"Tensor? grad_loss, {_OPTIONS}) -> "
        f"({_LOSS}, Tensor grad_features, Tensor grad_weight, Tensor grad_bias)"
    ),
}


def digest() -> str:
    """What tells these schemas from others: a library was built for those it was built with."""
    return hashlib.sha256(repr(SCHEMAS).encode()).hexdigest()


def loss_dtype(logits: Tensor) -> torch.dtype:
    """float64 for float64 logits, float32 for all others."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def state_like(rows: Tensor) -> Tensor:
    """An uninitialised ``state`` for the rows of ``rows``."""
    return rows.new_empty((rows.shape[0] + 1, ROW_STATE), dtype=torch.float64)


def _fake_loss(rows: Tensor, ints: list[int]) -> tuple[Tensor, ...]:
    shape = (rows.shape[0],) if ints[1] == 0 else ()
    return tuple(rows.new_empty(shape, dtype=loss_dtype(rows)) for _ in range(3))


def _fake_row_loss_forward(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return (*_fake_loss(logits, rest[-1]), state_like(logits))


def _fake_row_loss_backward(grad_loss: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _fake_explanation_stats(gradients: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shape, dtype = gradients.shape[:2], loss_dtype(gradients)
    return gradients.new_empty(shape, dtype=dtype), gradients.new_empty(shape, dtype=dtype)


def _fake_teacher_logits(
    dots: Tensor,
    sq_norms: Tensor,
    target: Tensor,
    class_index: Tensor | None,
    num_classes: int,
    *options: Any,
) -> Tensor:
    return dots.new_empty((dots.shape[0], num_classes), dtype=loss_dtype(dots))


def _fake_introspective_forward(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    teacher_logits = logits.new_empty(logits.shape, dtype=loss_dtype(logits))
    return (*_fake_row_loss_forward(logits, *rest), teacher_logits)


def _fake_linear(features: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    shapes = (features.shape, weight.shape, weight.shape[:1])
    gradients = (
        features.new_empty(shape if needed else (0,), dtype=loss_dtype(features))
        for shape, needed in zip(shapes, rest[-1][4:7], strict=True)
    )
    return (*_fake_loss(features, rest[-1]), *gradients)


def _fake_linear_distillation(features: Tensor, head: list[Tensor], *rest: Any) -> Any:
    return _fake_linear(features, head[0], *rest)


FAKES: dict[str, Callable[..., Any]] = {
    "row_loss_forward": _fake_row_loss_forward,
    "row_loss_backward": _fake_row_loss_backward,
    "explanation_stats": _fake_explanation_stats,
    "teacher_logits": _fake_teacher_logits,
    "introspective_forward": _fake_introspective_forward,
    "linear": _fake_linear,
    "linear_distillation": _fake_linear_distillation,
}


def _fake_with_gradient(logits: Tensor, *rest: Any, fake: Callable[..., Any]) -> tuple[Tensor, ...]:
    loss, ce, kl, _, *teacher_logits = fake(logits, *rest)
    state = logits.new_empty(logits.shape if rest[-1][7] else (0,), dtype=loss_dtype(logits))
    return loss, ce, kl, state, *teacher_logits


FAKES_OF_TORCH = FAKES | {
    name: partial(_fake_with_gradient, fake=FAKES[name])
    for name in ("row_loss_forward", "introspective_forward")
}

# These call matrix products, which autocast would turn into half precision.
_WITH_MATRIX_PRODUCTS = (
    "explanation_stats",
    "introspective_forward",
    "linear",
    "linear_distillation",
)


def define(namespace: str, kernels: Any, *, of_torch: bool = False) -> SimpleNamespace:
    """Define every operator in ``namespace`` with ``kernels.<name>`` behind it on any device.

    A library loaded later takes over for the devices that it serves, unless ``kernels`` are there
    to be what they are: PyTorch's own operations, whose ``state`` is a gradient.

    Returns:
        The operators by name. With ``of_torch`` they are functions that go past the dispatcher
        where nobody watches it.
    """
    fakes = FAKES_OF_TORCH if of_torch else FAKES
    library = torch.library.Library(namespace, "DEF")
    _libraries.append(library)
    operators = {}
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        # Kernels lie below autograd even where they are made of differentiable functions.
        kernel = torch.no_grad()(getattr(kernels, name))
        library.impl(name, kernel, "CompositeExplicitAutograd")
        qualified = f"{namespace}::{name}"
        torch.library.register_fake(qualified, fakes[name], lib=library)
        operator = getattr(getattr(torch.ops, namespace), name).default
        torch.library.register_vmap(qualified, _one_call_a_sample(operator), lib=library)
        if name in _WITH_MATRIX_PRODUCTS:
            for device in ("cpu", "cuda"):
                library.impl(name, _without_autocast(operator, device), f"Autocast{device.upper()}")
        operators[name] = _past_the_dispatcher(kernel, operator) if of_torch else operator
    return SimpleNamespace(**operators)


# A torch.library.Library withdraws its operators when it is collected.
_libraries: list[torch.library.Library] = []


def _one_call_a_sample(operator: Any) -> Callable[..., Any]:
    """A vmap rule. Rows are a kernel's own batch, so a further batch is rare and only looped."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        if info.batch_size == 0:
            raise ValueError(f"{operator} can't be vmapped over a dimension of size 0")
        samples = [
            operator(
                *(_sample(arg, dim, sample) for arg, dim in itertools.zip_longest(args, in_dims))
            )
            for sample in range(info.batch_size)
        ]
        if isinstance(samples[0], Tensor):
            return torch.stack(samples), 0
        stacked = tuple(torch.stack(outputs) for outputs in zip(*samples, strict=True))
        return stacked, (0,) * len(stacked)

    return rule


def _sample(arg: Any, dim: Any, sample: int) -> Any:
    if isinstance(dim, int):
        return arg.select(dim, sample)
    if isinstance(dim, (list, tuple)):
        return [_sample(part, of_part, sample) for part, of_part in zip(arg, dim, strict=True)]
    return arg


def _past_the_dispatcher(kernel: Callable[..., Any], operator: Any) -> Callable[..., Any]:
    """``kernel``, or ``operator`` where something between the two has a say.

    A kernel in Python costs the dispatcher some 15 microseconds, as much as ten operations of a
    small loss.
    """

    def call(*args: Any) -> Any:
        watched = (
            torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()
            or torch._C._len_torch_dispatch_stack() > 0
            or torch.is_autocast_enabled("cpu")
            or torch.is_autocast_enabled("cuda")
        )
        return operator(*args) if watched else kernel(*args)

    return call


def _without_autocast(operator: Any, device: str) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return operator(*args)

    return kernel
