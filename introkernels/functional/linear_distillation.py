"""The loss of a linear head that learns from any teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from introkernels import checks, teachers
from introkernels.autograd import constant
from introkernels.functional.head import HeadCall, head_loss
from introkernels.ops.head.teachers import pack
from introkernels.ops.select import for_divergence, operators
from introkernels.options import Options
from introkernels.types import Divergence, ExplanationStats, LossParts, Reduction, Teacher

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from introkernels.functional.keywords import LinearDistillationKeywords


@overload
def linear_distillation_loss(
    features: Tensor,
    weight: Tensor,
    teacher: Teacher,
    target: Tensor | None,
    bias: Tensor | None = None,
    *,
    return_parts: Literal[True],
    **keywords: Unpack[LinearDistillationKeywords],
) -> LossParts: ...


@overload
def linear_distillation_loss(
    features: Tensor,
    weight: Tensor,
    teacher: Teacher,
    target: Tensor | None,
    bias: Tensor | None = None,
    *,
    return_parts: Literal[False] = False,
    **keywords: Unpack[LinearDistillationKeywords],
) -> Tensor: ...


@overload
def linear_distillation_loss(
    features: Tensor,
    weight: Tensor,
    teacher: Teacher,
    target: Tensor | None,
    bias: Tensor | None = None,
    *,
    return_parts: bool,
    **keywords: Unpack[LinearDistillationKeywords],
) -> Tensor | LossParts: ...


def linear_distillation_loss(
    features: Tensor,
    weight: Tensor,
    teacher: Teacher,
    target: Tensor | None,
    bias: Tensor | None = None,
    *,
    temperature: float = 4.0,
    ce_weight: float = 0.7,
    kl_weight: float = 0.3,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    class_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    return_parts: bool = False,
) -> Tensor | LossParts:
    """Distillation of a linear head from any teacher, without the logits of a whole batch.

    :func:`distillation_loss` of ``z = features @ weight.T + bias``. Logits of the student, and of a
    :class:`LinearTeacher`, exist for a chunk of rows at a time: on a CPU 64 MiB or 256 rows, on a
    GPU 1 GiB or 512 rows, whichever is more. Rows that are ignored are left out of the products,
    forward and backward; to know them, a GPU is waited for once, but not while a CUDA graph is
    captured.

    Products are as precise as those of :func:`linear_introspective_loss`: features and weight of
    one half type are multiplied in it and accumulated in float32. With reduction ``"mean"`` or
    ``"sum"``, gradients are made along with the loss, where the logits are at hand: evaluate under
    ``torch.no_grad()`` to save that work. With ``row_weight``, the backward makes them.

    >>> teacher = introkernels.LinearTeacher(teacher_hidden, teacher_model.lm_head.weight)
    >>> loss = introkernels.linear_distillation_loss(hidden, lm_head.weight, teacher, labels)

    Args:
        features: ``[..., D]``, the inputs of the head.
        weight: ``[C, D]``, as in ``nn.Linear``.
        teacher: logits ``[..., C]``; or a :class:`LinearTeacher`, :class:`TopKTeacher` or
            :class:`ExplanationStats` of these rows. It gets no gradient.
        target: ``[...]`` int64 class indices, or ``ignore_index``; or None where ``ce_weight`` is
            0: the part ``ce`` is then NaN.
        bias: ``[C]`` or None.
        class_weight: ``[C]`` class weights of the cross entropy.
        row_weight: ``[...]``, >= 0: a factor of each row's loss.

    The other keywords, the result and the errors are those of :func:`introspective_loss`;
    ``reduction="none"`` gives a loss, and parts, of the shape of ``target``.
    """
    checks.flag("return_parts", return_parts)
    checks.linear_head(features, weight, target, bias, ce_weight)
    num_classes, shape = weight.shape[0], features.shape[:-1]
    checks.teacher(teacher, "features", features, (*shape, num_classes), target)
    checks.class_weight(class_weight, num_classes, features, "class_weight")
    checks.row_weight(row_weight, shape, features)
    checks.in_memory({"features": features, "weight": weight, "target": target, "bias": bias})
    checks.in_memory({"class_weight": class_weight})
    options = Options(
        *checks.loss_keywords(
            temperature,
            ce_weight,
            kl_weight,
            label_smoothing,
            ignore_index,
            reduction,
            divergence,
            beta,
        )
    )
    has_target = target is not None
    if target is None:
        target = torch.zeros(shape, dtype=torch.int64, device=features.device)
        options = options._replace(ignore_index=-1)
    if isinstance(teacher, ExplanationStats):
        teacher = teachers.of_stats(teacher, target.flatten(), num_classes, options)
    tensors, kind = pack(teacher, target.numel())
    options = options._replace(teacher=kind)
    call = HeadCall(features, weight, target, bias, constant(class_weight), row_weight, options)
    parts = head_loss(for_divergence(operators(features.device), options), call, tuple(tensors))
    if not has_target:
        parts = parts._replace(ce=torch.full_like(parts.ce, float("nan")))
    return parts if return_parts else parts.loss
