"""The loss from any teacher's logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from introkernels import checks
from introkernels.autograd import constant
from introkernels.functional.rows import RowCall, as_row_weight, as_rows, as_rows_of_target, distil
from introkernels.ops.select import operators
from introkernels.options import Options
from introkernels.types import Divergence, LossParts, Reduction, Teacher

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from introkernels.functional.keywords import DistillationKeywords


@overload
def distillation_loss(
    logits: Tensor,
    teacher: Teacher,
    target: Tensor | None,
    *,
    return_parts: Literal[True],
    **keywords: Unpack[DistillationKeywords],
) -> LossParts: ...


@overload
def distillation_loss(
    logits: Tensor,
    teacher: Teacher,
    target: Tensor | None,
    *,
    return_parts: Literal[False] = False,
    **keywords: Unpack[DistillationKeywords],
) -> Tensor: ...


@overload
def distillation_loss(
    logits: Tensor,
    teacher: Teacher,
    target: Tensor | None,
    *,
    return_parts: bool,
    **keywords: Unpack[DistillationKeywords],
) -> Tensor | LossParts: ...


def distillation_loss(
    logits: Tensor,
    teacher: Teacher,
    target: Tensor | None,
    *,
    temperature: float = 4.0,
    ce_weight: float = 0.7,
    kl_weight: float = 0.3,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    return_parts: bool = False,
) -> Tensor | LossParts:
    """Knowledge distillation from any teacher, in one pass over the logits.

    ``ce_weight * CE(z, y) + kl_weight * T**2 * KL(softmax(t / T) || softmax(z / T))`` (Hinton,
    Vinyals, Dean 2015, arXiv:1503.02531), or another divergence. The teacher gets no gradient.

    Args:
        logits: ``[B, C]``, or ``[B, C, d1, ...]`` as in ``F.cross_entropy``.
        teacher: logits of the same shape, -inf where a class has no soft label (a row of -inf alone
            has a divergence of NaN); or a :class:`LinearTeacher`, :class:`TopKTeacher` or
            :class:`ExplanationStats` of these rows, the last for logits ``[B, C]`` alone.
        target: ``[B, d1, ...]`` int64 class indices, or ``ignore_index``; class probabilities of
            the shape of ``logits``; or None where ``ce_weight`` is 0: the part ``ce`` is then NaN.

    The keywords, the result and the errors are those of :func:`introspective_loss`;
    ``reduction="none"`` gives a loss, and parts, of shape ``[B, d1, ...]``.
    """
    checks.flag("return_parts", return_parts)
    checks.logits_and_target(logits, target, ce_weight)
    num_classes = logits.shape[1]
    shape = logits.shape[:1] + logits.shape[2:]
    checks.teacher(teacher, "logits", logits, (*shape, num_classes), target)
    checks.class_weight(weight, num_classes, logits)
    checks.row_weight(row_weight, shape, logits)
    checks.in_memory({"logits": logits, "target": target, "weight": weight})
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
    call = RowCall(
        as_rows(logits),
        None if target is None else as_rows_of_target(target, logits),
        constant(weight),
        as_row_weight(row_weight, logits),
        options,
    )
    parts = distil(operators(logits.device), call, teacher)
    if reduction == "none" and logits.dim() > 2:
        parts = LossParts(*(part.reshape(shape) for part in parts))
    return parts if return_parts else parts.loss
