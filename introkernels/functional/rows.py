"""What losses of rows share: the shapes that callers have, and what no kernel takes.

Kernels take logits ``[N, C]`` and targets ``[N]``. Here further dimensions become rows, weights of
rows multiply the losses that reduction "none" gives, the cross entropy of class probabilities is
PyTorch's own beside a row loss that has the divergence alone, and a teacher of few classes has a
row loss of these alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from introkernels import teachers
from introkernels.autograd import RowLossFunction, loss_parts
from introkernels.ops.schema import loss_dtype
from introkernels.ops.select import for_divergence, for_label_mode
from introkernels.options import Options
from introkernels.reference import linear_logits
from introkernels.types import (
    REDUCTIONS,
    ExplanationStats,
    LinearTeacher,
    LossParts,
    Teacher,
    TopKTeacher,
)

_NEVER = float("-inf")


class RowCall(NamedTuple):
    """A student's rows, and what they are held against beside a teacher.

    Attributes:
        logits: ``[N, C]``.
        target: ``[N]`` int64, class probabilities ``[N, C]``, or None: then the cross entropy has
            to be switched off, and is NaN.
        weight: ``[C]`` or None.
        row_weight: ``[N]`` or None.
        options: the numbers of the loss.
    """

    logits: Tensor
    target: Tensor | None
    weight: Tensor | None
    row_weight: Tensor | None
    options: Options

    def without_cross_entropy(self, logits: Tensor) -> RowCall:
        """The call of these logits, of as many rows, for their divergence alone."""
        options, target = self.options, None
        if self.target is not None and not self.target.is_floating_point():
            # Which rows are ignored is all that is left of the target.
            target = torch.where(self.target == options.ignore_index, -1, 0)
            options = options._replace(ignore_index=-1)
        options = options._replace(ce_weight=0.0, label_smoothing=0.0)
        return RowCall(logits, target, None, self.row_weight, options)


def as_rows(tensor: Tensor) -> Tensor:
    """``[B, C, d1, ...]`` as rows ``[N, C]``."""
    return tensor if tensor.dim() == 2 else tensor.movedim(1, -1).flatten(0, -2)


def as_rows_of_target(target: Tensor, logits: Tensor) -> Tensor:
    """Class indices ``[B, d1, ...]`` as ``[N]``, probabilities like logits as ``[N, C]``."""
    return as_rows(target.detach()) if target.dim() == logits.dim() else target.flatten()


def as_row_weight(row_weight: Tensor | None, student: Tensor) -> Tensor | None:
    """Weights of rows ``[N]`` in the dtype of the loss of ``student``, without their graph."""
    if row_weight is None:
        return None
    return row_weight.detach().flatten().to(loss_dtype(student))


def distil(operators: SimpleNamespace, call: RowCall, teacher: Teacher) -> LossParts:
    """The loss of rows that learn from any teacher."""
    if isinstance(teacher, Tensor):
        return row_loss(operators, call, as_rows(teacher.detach()))
    if isinstance(teacher, ExplanationStats):
        return row_loss(operators, call, logits_of_stats(operators, call, teacher))
    if isinstance(teacher, LinearTeacher):
        with torch.no_grad():
            features = teacher.features.flatten(0, -2)
            teacher_logits = linear_logits(features, teacher.weight, teacher.bias)
        return row_loss(operators, call, teacher_logits)
    return _top_k_loss(operators, call, teacher)


def row_loss(operators: SimpleNamespace, call: RowCall, teacher_logits: Tensor) -> LossParts:
    """The row loss of teacher logits ``[N, C]``."""
    logits, target, weight, row_weight, options = call
    if target is not None and target.is_floating_point():
        # Two gradients add up, and are rounded once.
        logits = logits.to(loss_dtype(logits))
        # Autograd refuses to keep what was made in inference mode.
        compiling = torch.compiler.is_compiling()
        target = target.clone() if not compiling and target.is_inference() else target
    operators = for_divergence(operators, options)

    def lose(target: Tensor, weight: Tensor | None, options: Options) -> LossParts:
        return loss_parts(
            RowLossFunction, operators, logits, teacher_logits, target, weight, options
        )

    def lose_without_class(weight: Tensor | None, options: Options) -> LossParts:
        any_class = torch.zeros_like(logits[:, 0], dtype=torch.int64)
        parts = lose(any_class, None, options._replace(ce_weight=0.0, ignore_index=-1))
        if target is None:
            return parts._replace(ce=torch.full_like(parts.ce, float("nan")))
        ce = _cross_entropy(logits, target, weight, options)
        loss = parts.loss + options.ce_weight * ce if options.ce_weight > 0 else parts.loss
        return LossParts(loss, ce.detach(), parts.kl)

    if target is None or target.is_floating_point():
        return weigh_rows(lose_without_class, None, weight, row_weight, options)
    if row_weight is None:
        return lose(target, weight, options)
    return weigh_rows(partial(lose, target), target, weight, row_weight, options)


def weigh_rows(
    lose: Callable[[Tensor | None, Options], LossParts],
    target: Tensor | None,
    weight: Tensor | None,
    row_weight: Tensor | None,
    options: Options,
) -> LossParts:
    """``lose(weight, options)``, with each row's loss times ``row_weight [N]``.

    A mean divides by the sum of the weights of rows not ignored; where ``target`` is ``[N]`` of
    classes, that of the cross entropy by the sum of their products with the targets' weights.
    """
    if row_weight is None:
        return lose(weight, options)
    if target is not None:
        row_weight = torch.where(target != options.ignore_index, row_weight, 0)
    total = row_weight.sum()
    mean = REDUCTIONS[options.reduction] == "mean"
    if mean and weight is not None and target is not None:
        # The two terms have different divisors; so that one does, class weights take their ratio.
        weight = weight.to(total.dtype)
        of_target = weight.index_select(0, target.clamp(0, len(weight) - 1))
        weight = weight * (total / (row_weight * of_target).sum())
    parts = lose(weight, options._replace(reduction=REDUCTIONS.index("none")))
    parts = LossParts(*(part * row_weight for part in parts))
    if REDUCTIONS[options.reduction] == "none":
        return parts
    sums = [part.sum() for part in parts]
    return LossParts(*(part / total for part in sums)) if mean else LossParts(*sums)


def logits_of_stats(operators: SimpleNamespace, call: RowCall, stats: ExplanationStats) -> Tensor:
    """Teacher logits ``[N, C]`` of explanation statistics."""
    logits, target, options = call.logits, call.target, call.options
    dots, sq_norms = stats.dots.detach(), stats.sq_norms.detach()
    if logits.dtype == torch.float64:
        dots, sq_norms = dots.double(), sq_norms.double()
    assert target is not None
    if target.is_floating_point():
        stats = ExplanationStats(dots, sq_norms, stats.class_index)
        return teachers.of_stats(stats, target, logits.shape[1], options)
    teacher_logits: Tensor = for_label_mode(operators, options.label_mode).teacher_logits(
        dots,
        sq_norms,
        target,
        stats.class_index,
        logits.shape[1],
        options.floats,
        options.ints,
    )
    return teacher_logits


def _top_k_loss(operators: SimpleNamespace, call: RowCall, teacher: TopKTeacher) -> LossParts:
    """The cross entropy of all classes, and the divergence of those that the teacher names."""
    indices, log_probs = teacher.indices.flatten(0, -2), teacher.log_probs.flatten(0, -2)
    # Two gradients add up, and are rounded once.
    logits = call.logits.to(loss_dtype(call.logits))
    if call.target is not None and not call.target.is_floating_point():
        # Whatever an ignored row holds, it has no part in the gradient.
        live = (call.target != call.options.ignore_index)[:, None]
        logits, log_probs = torch.where(live, logits, 0), torch.where(live, log_probs, 0)
        indices = torch.where(live, indices, torch.arange(indices.shape[1], device=indices.device))
    call = call._replace(logits=logits)
    teacher = teachers.in_range(TopKTeacher(indices, log_probs, teacher.tail), logits.shape[1])
    student, teacher_logits = teachers.of_top_k(logits, teacher)
    hard = call._replace(options=call.options._replace(kl_weight=0.0, divergence=0))
    of_target = row_loss(operators, hard, call.logits.detach())
    soft = row_loss(operators, call.without_cross_entropy(student), teacher_logits)
    return LossParts(of_target.loss + soft.loss, of_target.ce, soft.kl)


def _cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: Options
) -> Tensor:
    """``F.cross_entropy`` of class probabilities, in which a class of logit -inf does not exist."""
    exists = logits != _NEVER
    # A row without any class would have no gradient but NaN.
    z = logits.to(loss_dtype(logits)).masked_fill(~exists.any(1, keepdim=True), 0)
    log_p = torch.where(exists, torch.log_softmax(z, 1), torch.logsumexp(z, 1, keepdim=True).neg())
    masked = ((target != 0) & ~exists).any(1)
    target = target.to(log_p.dtype)
    if options.label_smoothing > 0:
        count = exists.sum(1, keepdim=True, dtype=log_p.dtype).clamp(min=1)
        share = options.label_smoothing / count
        target = (1 - options.label_smoothing) * target + torch.where(exists, share, 0)
    ce = -(target * log_p if weight is None else target * weight * log_p).sum(1)
    # The infinity of a class that does not exist comes last, so that no weight of zero turns it
    # into NaN.
    ce = torch.where(masked, ce + float("inf"), ce)
    reduction = REDUCTIONS[options.reduction]
    if reduction == "none":
        return ce
    return ce.mean() if reduction == "mean" else ce.sum()
