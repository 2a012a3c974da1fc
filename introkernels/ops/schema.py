"""The operators: their schemas, the shapes they return, and how vmap and autocast treat them.

Every operator exists once in each namespace: ``introkernels``, which PyTorch's dispatcher sends to
the best library loaded for the tensors' device and to the definition where there is none,
``introkernels_reference``, which is always the definition, and, where Triton is usable,
``introkernels_triton``.

Codes: ``reduction`` 0 none, 1 mean, 2 sum; ``similarity`` 0 cosine, 1 projection; ``label_mode``
0 softmax, 1 split. Loss operators return ``loss``, ``ce``, ``kl`` (``[B]`` or scalars),
``row_state [B, ROW_STATE]`` float64 (what a kernel keeps of each row for its backward) and
``totals [2]`` float64 (the sum of the target weights, NaN where it is 0, and the number of rows not
ignored).
``gradients`` are ``[B, K, *S]`` and ``inputs`` ``[B, *S]``, of any strides.

The head's gradients cost less beside its loss than on their own. ``linear_forward`` makes those
that it is asked for as they are where the incoming gradient is 1 (in each row), in the dtype of the
loss, so that multiplying them rounds once. ``linear_backward`` makes them for any incoming
gradient. Both answer for those that nobody needs with empty tensors.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

ROW_STATE = 9

_LOSS = (
    "Tensor? weight, float temperature, float ce_weight, float kl_weight, int ignore_index, "
    "float label_smoothing, int reduction"
)
_LABELS = "float similarity_temperature, int similarity, int label_mode, float non_target_mass"
_NUM_LABEL_OPTIONS = _LABELS.count(",") + 1
_LOSS_OUT = "Tensor loss, Tensor ce, Tensor kl, Tensor row_state, Tensor totals"
_HEAD_LOSS = _LOSS.replace("Tensor? weight", "Tensor? class_weight")

SCHEMAS = {
    "distillation_forward": (
        f"(Tensor logits, Tensor teacher_logits, Tensor target, {_LOSS}) -> ({_LOSS_OUT})"
    ),
    "distillation_backward": (
        "(Tensor grad_loss, Tensor logits, Tensor teacher_logits, Tensor target, "
        f"Tensor row_state, Tensor totals, {_LOSS}) -> Tensor"
    ),
    "similarity_forward": (
        "(Tensor logits, Tensor target, Tensor dots, Tensor sq_norms, Tensor? class_index, "
        f"{_LOSS}, {_LABELS}) -> ({_LOSS_OUT})"
    ),
    "similarity_backward": (
        "(Tensor grad_loss, Tensor logits, Tensor target, Tensor dots, Tensor sq_norms, "
        f"Tensor? class_index, Tensor row_state, Tensor totals, {_LOSS}, {_LABELS}) -> Tensor"
    ),
    "explanation_stats": (
        "(Tensor gradients, Tensor inputs, Tensor target, Tensor? class_index, bool center, "
        "int ignore_index) -> (Tensor dots, Tensor sq_norms)"
    ),
    "introspective_forward": (
        "(Tensor logits, Tensor target, Tensor gradients, Tensor inputs, Tensor? class_index, "
        f"bool center, {_LOSS}, {_LABELS}) -> ({_LOSS_OUT}, Tensor dots, Tensor sq_norms)"
    ),
    "linear_forward": (
        "(Tensor features, Tensor weight, Tensor target, Tensor? bias, bool need_features, "
        "bool need_weight, bool need_bias, bool center, "
        f"{_HEAD_LOSS}, {_LABELS}) -> "
        f"({_LOSS_OUT}, Tensor grad_features, Tensor grad_weight, Tensor grad_bias)"
    ),
    "linear_backward": (
        "(Tensor grad_loss, Tensor features, Tensor weight, Tensor target, Tensor? bias, "
        "Tensor row_state, Tensor totals, bool need_features, bool need_weight, bool center, "
        f"{_HEAD_LOSS}, {_LABELS}) -> "
        "(Tensor grad_features, Tensor grad_weight, Tensor grad_bias)"
    ),
}


def digest() -> str:
    """What tells these schemas from others: a library was built for those it was built with."""
    return hashlib.sha256(repr(SCHEMAS).encode()).hexdigest()


def loss_dtype(logits: Tensor) -> torch.dtype:
    """float64 for float64 logits, float32 for all others."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def row_state_like(rows: Tensor) -> Tensor:
    """An uninitialised ``row_state`` for the rows of ``rows``."""
    return rows.new_empty((rows.shape[0], ROW_STATE), dtype=torch.float64)


def _loss_outputs(rows: Tensor, reduction: int) -> tuple[Tensor, ...]:
    shape = (rows.shape[0],) if reduction == 0 else ()
    return (
        *(rows.new_empty(shape, dtype=loss_dtype(rows)) for _ in range(3)),
        row_state_like(rows),
        rows.new_empty(2, dtype=torch.float64),
    )


def _fake_distillation_forward(
    logits: Tensor, teacher_logits: Tensor, target: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    return _loss_outputs(logits, options[-1])


def _fake_similarity_forward(
    logits: Tensor,
    target: Tensor,
    dots: Tensor,
    sq_norms: Tensor,
    class_index: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    return _loss_outputs(logits, options[-1 - _NUM_LABEL_OPTIONS])


def _fake_backward(grad_loss: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _fake_explanation_stats(
    gradients: Tensor, inputs: Tensor, target: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    shape = gradients.shape[:2]
    dtype = loss_dtype(gradients)
    return gradients.new_empty(shape, dtype=dtype), gradients.new_empty(shape, dtype=dtype)


def _fake_introspective_forward(
    logits: Tensor,
    target: Tensor,
    gradients: Tensor,
    inputs: Tensor,
    class_index: Tensor | None,
    center: bool,
    *options: Any,
) -> tuple[Tensor, ...]:
    shape = gradients.shape[:2]
    return (
        *_loss_outputs(logits, options[-1 - _NUM_LABEL_OPTIONS]),
        gradients.new_empty(shape, dtype=torch.float64),
        gradients.new_empty(shape, dtype=torch.float64),
    )


def _fake_linear_forward(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    need_features: bool,
    need_weight: bool,
    need_bias: bool,
    *options: Any,
) -> tuple[Tensor, ...]:
    dtype = loss_dtype(features)
    return (
        *_loss_outputs(features, options[-1 - _NUM_LABEL_OPTIONS]),
        features.new_empty(features.shape if need_features else (0,), dtype=dtype),
        features.new_empty(weight.shape if need_weight else (0,), dtype=dtype),
        features.new_empty(weight.shape[:1] if need_bias else (0,), dtype=dtype),
    )


def _fake_linear_backward(
    grad_loss: Tensor,
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    row_state: Tensor,
    totals: Tensor,
    need_features: bool,
    need_weight: bool,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        features.new_empty(features.shape if need_features else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        features.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    )


FAKES: dict[str, Callable[..., Any]] = {
    "distillation_forward": _fake_distillation_forward,
    "distillation_backward": _fake_backward,
    "similarity_forward": _fake_similarity_forward,
    "similarity_backward": _fake_backward,
    "explanation_stats": _fake_explanation_stats,
    "introspective_forward": _fake_introspective_forward,
    "linear_forward": _fake_linear_forward,
    "linear_backward": _fake_linear_backward,
}

# These call matrix products, which autocast would turn into half precision.
_WITH_MATRIX_PRODUCTS = ("linear_forward", "linear_backward")


def define(namespace: str, kernels: Any) -> SimpleNamespace:
    """Define every operator in ``namespace`` with ``kernels.<name>`` behind it on any device.

    A library loaded later takes over for the devices that it serves. Returns the operators by name.
    """
    library = torch.library.Library(namespace, "DEF")
    _libraries.append(library)
    operators = {}
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        # Kernels lie below autograd even where they are made of differentiable functions.
        kernel = torch.no_grad()(getattr(kernels, name))
        library.impl(name, kernel, "CompositeExplicitAutograd")
        qualified = f"{namespace}::{name}"
        torch.library.register_fake(qualified, FAKES[name], lib=library)
        operator = getattr(getattr(torch.ops, namespace), name).default
        torch.library.register_vmap(qualified, _one_call_a_sample(operator), lib=library)
        if name in _WITH_MATRIX_PRODUCTS:
            for device in ("cpu", "cuda"):
                library.impl(name, _without_autocast(operator, device), f"Autocast{device.upper()}")
        operators[name] = operator
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
                *(
                    arg if dim is None else arg.select(dim, sample)
                    for arg, dim in itertools.zip_longest(args, in_dims)
                )
            )
            for sample in range(info.batch_size)
        ]
        if isinstance(samples[0], Tensor):
            return torch.stack(samples), 0
        stacked = tuple(torch.stack(outputs) for outputs in zip(*samples, strict=True))
        return stacked, (0,) * len(stacked)

    return rule


def _without_autocast(operator: Any, device: str) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return operator(*args)

    return kernel
