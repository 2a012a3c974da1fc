"""The operators made of PyTorch's own operations, for whatever no kernel here serves.

They compute in the accumulation type, float32 at least, on any device. On a CPU they take 1.2 to
1.6 times as long as losses written by hand with ``F.cross_entropy``, ``F.log_softmax`` and
``F.kl_div`` at ``[1024, 1000]``, and three to five times at ``[64, 100]``, where the number of
operations tells.
Statistics store every explanation. The row loss adds up the numbers of csrc/common/row_loss.h; its
``state`` holds for each row the largest logit and teacher logit, then the three sums of
exponentials.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from introkernels import reference, teachers
from introkernels.ops.head.operators import chunked_linear
from introkernels.ops.indices import check_explained, check_indices
from introkernels.ops.schema import loss_dtype, state_like
from introkernels.options import Options
from introkernels.types import REDUCTIONS, ExplanationStats

_NEVER = float("-inf")


def row_loss_forward(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    floats: list[float],
    ints: list[int],
) -> tuple[Tensor, ...]:
    options = Options.of(floats, ints)
    check_indices(target, logits.shape[1], options.ignore_index)
    z, t = _wide(logits, teacher_logits)
    exists = z != _NEVER
    z_max, t_max = _largest(z), _largest(t)
    z = z - z_max
    t.sub_(t_max)
    targets = _targets(target, z.shape[1], options.ignore_index)
    z_target = z.gather(1, targets.column)[:, 0]
    total = z.exp().sum(1)
    total_t = (z / options.temperature).exp_().sum(1)
    exps_of_teacher = (t / options.temperature).exp_()
    teacher_total = exps_of_teacher.sum(1)
    # Divided by the temperature last: the quotient of a large logit may be out of range.
    cross = t.sub_(z).mul_(exps_of_teacher).masked_fill_(exps_of_teacher == 0, 0).sum(1)

    log_total = total.log()
    ce = log_total - z_target
    target_weight = torch.ones_like(ce)
    if weight is not None:
        target_weight = weight.to(z.dtype)[targets.column[:, 0]]
        ce = target_weight * ce
    if options.label_smoothing > 0:
        share, of_class, of_all = _smoothing(exists, weight, z.dtype, options)
        distances = torch.where(exists, z, 0).mul_(of_class).sum(1)
        ce = (1 - options.label_smoothing) * ce + share * (of_all * log_total - distances)
    # The infinity of a target that does not exist comes last, so that no weight of zero turns it
    # into NaN.
    ce = ce.masked_fill(z_target == _NEVER, float("inf"))
    kl = cross.double() / teacher_total / options.temperature + (total_t / teacher_total).log()
    kl = kl.masked_fill_(total == 0, 0)

    totals = reference.totals(targets.live, torch.where(targets.live, target_weight, 0).double())
    losses = reference.reduce_terms(
        reference.RowTerms(targets.only_live(ce.double()), targets.only_live(kl), totals),
        options.temperature,
        options.ce_weight,
        options.kl_weight,
        REDUCTIONS[options.reduction],
    )
    state = state_like(logits).zero_()
    of_rows = [z_max[:, 0], t_max[:, 0], total, total_t, teacher_total]
    state[:-1, : len(of_rows)] = torch.stack(of_rows, 1)
    state[-1, :2] = totals
    return (*(part.to(z.dtype) for part in losses), state)


def row_loss_backward(
    grad_loss: Tensor,
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    state: Tensor,
    floats: list[float],
    ints: list[int],
) -> Tensor:
    options = Options.of(floats, ints)
    z, t = _wide(logits, teacher_logits)
    exists = z != _NEVER
    targets = _targets(target, z.shape[1], options.ignore_index)
    z_max, t_max, total, total_t, teacher_total = state[:-1, :5].to(z.dtype).split(1, 1)
    ce_scale = options.ce_weight * grad_loss.double()
    kl_scale = options.kl_weight * options.temperature * grad_loss.double()
    if REDUCTIONS[options.reduction] == "mean":
        ce_scale, kl_scale = ce_scale / state[-1, 0], kl_scale / state[-1, 1]
    ce_scale, kl_scale = (scale.to(z.dtype).reshape(-1, 1) for scale in (ce_scale, kl_scale))
    z = z - z_max

    grad = torch.zeros_like(z)
    if options.kl_weight > 0:
        grad = (z / options.temperature).exp_().mul_(kl_scale / total_t)
        q = t.sub_(t_max).div_(options.temperature).exp_()
        grad.addcmul_(q, kl_scale / teacher_total, value=-1)
    if options.ce_weight > 0:
        of_target = (1 - options.label_smoothing) * ce_scale.expand(len(z), 1)
        if weight is not None:
            of_target = of_target * weight.to(z.dtype)[targets.column]
        of_exp = of_target
        if options.label_smoothing > 0:
            share, of_class, of_all = _smoothing(exists, weight, z.dtype, options)
            of_each = (share[:, None] * ce_scale).expand(len(z), 1)
            grad = grad - of_each * of_class
            of_exp = of_target + of_each * of_all[:, None]
        grad.addcmul_(z.exp_(), of_exp / total).scatter_add_(1, targets.column, -of_target)
    grad.masked_fill_(~exists, 0)
    grad = torch.where(targets.live[:, None], grad, 0)
    grad.masked_fill_(targets.unknown[:, None], float("nan"))
    return grad.to(logits.dtype).contiguous()


def explanation_stats(
    gradients: Tensor,
    inputs: Tensor,
    target: Tensor,
    class_index: Tensor | None,
    center: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    check_explained(gradients, target, class_index, ignore_index)
    stats = reference.explanation_stats(
        gradients,
        inputs,
        target,
        center=center,
        class_index=class_index,
        ignore_index=ignore_index,
    )
    return stats.dots, stats.sq_norms


def teacher_logits(
    dots: Tensor,
    sq_norms: Tensor,
    target: Tensor,
    class_index: Tensor | None,
    num_classes: int,
    floats: list[float],
    ints: list[int],
) -> Tensor:
    options = Options.of(floats, ints)
    check_indices(target, num_classes, options.ignore_index, class_index)
    stats = ExplanationStats(dots, sq_norms, class_index)
    ignored = (target == options.ignore_index)[:, None]
    return teachers.of_stats(stats, target, num_classes, options).masked_fill_(ignored, 0)


def introspective_forward(
    logits: Tensor,
    target: Tensor,
    gradients: Tensor,
    inputs: Tensor,
    class_index: Tensor | None,
    weight: Tensor | None,
    floats: list[float],
    ints: list[int],
) -> tuple[Tensor, ...]:
    options = Options.of(floats, ints)
    num_classes = logits.shape[1]
    # A target that is no class of the logits is none of the explanations either.
    check_indices(target, num_classes, options.ignore_index)
    dots, sq_norms = explanation_stats(
        gradients, inputs, target, class_index, options.center, options.ignore_index
    )
    teacher = teacher_logits(dots, sq_norms, target, class_index, num_classes, floats, ints)
    teacher = teacher.to(loss_dtype(logits))
    return (*row_loss_forward(logits, teacher, target, weight, floats, ints), teacher)


linear = chunked_linear(row_loss_forward, row_loss_backward)


class _Targets(NamedTuple):
    """Targets as the row loss takes them.

    Attributes:
        column: ``[B, 1]``, a class in every row.
        live: ``[B]``, rows that are not ignored.
        unknown: ``[B]``, rows that are not ignored and whose target is no class.
    """

    column: Tensor
    live: Tensor
    unknown: Tensor

    def only_live(self, terms: Tensor) -> Tensor:
        """Terms ``[B]``: 0 where a row is ignored, NaN where its target is unknown."""
        return torch.where(self.live, terms.masked_fill(self.unknown, float("nan")), 0)


def _targets(target: Tensor, num_classes: int, ignore_index: int) -> _Targets:
    column = target.clamp(0, num_classes - 1)
    live = target != ignore_index
    return _Targets(column[:, None], live, live & (column != target))


def _wide(logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the accumulation type; teacher logits as a copy, -inf where a logit is."""
    dtype = loss_dtype(logits)
    z = logits.to(dtype)
    return z, teacher_logits.to(dtype).masked_fill(z == _NEVER, _NEVER)


def _largest(values: Tensor) -> Tensor:
    """The largest number of each row ``[B, 1]``; a finite one of a row of -inf."""
    return values.amax(1, keepdim=True).clamp_(min=torch.finfo(values.dtype).min)


def _smoothing(
    exists: Tensor, weight: Tensor | None, dtype: torch.dtype, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Each class's share of label smoothing ``[B]``, the weights ``[B, C]`` of existing classes
    and their sum ``[B]``.
    """
    of_class = exists.to(dtype)
    share = options.label_smoothing / of_class.sum(1).clamp(min=1)
    if weight is not None:
        of_class = of_class * weight.to(dtype)
    return share, of_class, of_class.sum(1)
