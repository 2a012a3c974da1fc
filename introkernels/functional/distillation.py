"""The loss from any teacher's logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from introkernels import checks
from introkernels.autograd import RowLossFunction, constant, loss_parts
from introkernels.ops.select import operators
from introkernels.options import Options
from introkernels.types import LossParts, Reduction

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from introkernels.functional.keywords import DistillationKeywords


@overload
def distillation_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    return_parts: Literal[True],
    **keywords: Unpack[DistillationKeywords],
) -> LossParts: ...


@overload
def distillation_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    return_parts: Literal[False] = False,
    **keywords: Unpack[DistillationKeywords],
) -> Tensor: ...


@overload
def distillation_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    return_parts: bool,
    **keywords: Unpack[DistillationKeywords],
) -> Tensor | LossParts: ...


def distillation_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 4.0,
    ce_weight: float = 0.7,
    kl_weight: float = 0.3,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    return_parts: bool = False,
) -> Tensor | LossParts:
    """Knowledge distillation from any teacher, in one pass over the logits.

    ``ce_weight * CE(z, y) + kl_weight * T**2 * KL(softmax(t / T) || softmax(z / T))`` (Hinton,
    Vinyals, Dean 2015, arXiv:1503.02531). The teacher gets no gradient.

    Args:
        logits: ``[B, C]``.
        teacher_logits: ``[B, C]``; -inf where a class has no soft label. A row of -inf alone has
            a divergence of NaN.
        target: ``[B]`` int64 class indices, or ``ignore_index``.

    The keywords, the result and the errors are those of :func:`introspective_loss`.
    """
    checks.flag("return_parts", return_parts)
    checks.logits_and_target(logits, target)
    checks.teacher_logits(teacher_logits, logits)
    checks.class_weight(weight, logits.shape[1], logits)
    checks.in_memory(
        {"logits": logits, "teacher_logits": teacher_logits, "target": target, "weight": weight}
    )
    options = Options(
        *checks.loss_keywords(
            temperature, ce_weight, kl_weight, label_smoothing, ignore_index, reduction
        )
    )
    parts = loss_parts(
        RowLossFunction,
        operators(logits.device),
        logits,
        teacher_logits.detach(),
        target,
        constant(weight),
        options,
    )
    return parts if return_parts else parts.loss
