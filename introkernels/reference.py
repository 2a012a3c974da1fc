"""The definition of every loss, in plain PyTorch: the oracle of all tests and of all backends.

Read it beside the mathematics of the README. It is written for the reader, not for speed: it
materialises every explanation, ``[B, C, D]``. Everything after the explanations is ``C`` numbers a
row and is computed in float64, whatever the dtype of the inputs, so that the definition itself is
accurate. Teacher logits are those of introkernels/teachers.py in float64. Autograd differentiates
the losses; soft labels are constants.

The functions have the names and arguments of the public ones and do not check them. A row whose
target is neither a class nor ``ignore_index`` comes out as NaN. Float32 explanations are formed and
summed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from introkernels import teachers
from introkernels.types import (
    Divergence,
    ExplanationStats,
    LabelMode,
    LinearTeacher,
    LossParts,
    Reduction,
    Similarity,
    Teacher,
)

__all__ = [
    "distillation_loss",
    "explanation_stats",
    "introspective_loss",
    "linear_distillation_loss",
    "linear_introspective_loss",
    "similarity_loss",
    "soft_labels",
    "teacher_logits",
]

_NEVER = float("-inf")


def explanation_stats(
    gradients: Tensor,
    inputs: Tensor,
    target: Tensor,
    *,
    center: bool = False,
    class_index: Tensor | None = None,
    ignore_index: int = -100,
) -> ExplanationStats:
    """Inner products and squared norms of the explanations ``E_c = g_c * x``.

    Gradients ``[B, K, *S]``, inputs ``[B, *S]``, target ``[B]`` or class probabilities ``[B, C]``
    -> dots and sq_norms ``[B, K]``. Probabilities ``y`` are explained by ``sum_k y_k E_k``.
    """
    dtype = torch.promote_types(gradients.dtype, inputs.dtype)
    wide = dtype if dtype == torch.float64 else torch.float32
    explanations = gradients.to(wide) * inputs.to(wide).unsqueeze(1)
    explanations = explanations.reshape(*gradients.shape[:2], math.prod(gradients.shape[2:]))
    if center:
        explanations = explanations - explanations.mean(1, keepdim=True)
    sq_norms = explanations.square().sum(-1)
    if target.is_floating_point():
        mixture = teachers.at_explained(target, class_index).to(wide)
        of_target = (explanations * mixture[:, :, None]).sum(1, keepdim=True)
        dots = (explanations * of_target).sum(-1)
        return ExplanationStats(dots.detach(), sq_norms.detach(), class_index)
    column, known = teachers.target_column(target, gradients.shape[1], class_index)
    of_target = explanations.take_along_dim(column[:, :, None], 1)
    dots = (explanations * of_target).sum(-1)
    live = (target != ignore_index)[:, None]
    dots = torch.where(known, dots, float("nan"))
    return ExplanationStats(
        torch.where(live, dots, 0).detach(), torch.where(live, sq_norms, 0).detach(), class_index
    )


def teacher_logits(
    stats: ExplanationStats,
    target: Tensor,
    *,
    temperature: float = 4.0,
    similarity_temperature: float = 1.0,
    similarity: Similarity = "cosine",
    label_mode: LabelMode = "softmax",
    non_target_mass: float = 0.1,
    ignore_index: int = -100,
) -> Tensor:
    """Teacher logits ``t [B, K]`` of the explained classes, in float64."""
    wide = ExplanationStats(stats.dots.double(), stats.sq_norms.double(), stats.class_index)
    return teachers.of_similarities(
        teachers.similarities_of(wide, target, similarity),
        teachers.without_ignored(target, ignore_index),
        class_index=stats.class_index,
        temperature=temperature,
        similarity_temperature=similarity_temperature,
        label_mode=label_mode,
        non_target_mass=non_target_mass,
    )


def soft_labels(
    stats: ExplanationStats, target: Tensor, *, temperature: float = 4.0, **labels: Any
) -> Tensor:
    """Soft labels ``q = softmax(t / T) [B, K]``; the keywords are those of `teacher_logits`."""
    logits = teacher_logits(stats, target, temperature=temperature, **labels)
    return torch.softmax(logits / temperature, 1).to(stats.dots.dtype)


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
    """Hinton's distillation from any teacher.

    Logits ``[B, C, d1, ...]``, teacher logits alike or another teacher, target ``[B, d1, ...]``,
    class probabilities of the shape of the logits, or None.
    """
    shape = (logits.shape[0], *logits.shape[2:])
    logits = logits.movedim(1, -1).reshape(-1, logits.shape[1])
    num_rows, num_classes = logits.shape
    live = known = logits.new_ones(num_rows, dtype=torch.bool)
    target_weight = logits.new_ones(num_rows, dtype=torch.float64)
    if target is None:
        ce = logits.new_full((num_rows,), float("nan"), dtype=torch.float64)
    elif target.is_floating_point():
        probabilities = target.movedim(1, -1).reshape(-1, num_classes)
        ce = cross_entropies(logits, probabilities, live, weight, label_smoothing)
    else:
        target = target.reshape(-1)
        live, known = target != ignore_index, (target >= 0) & (target < num_classes)
        is_target = target[:, None] == torch.arange(num_classes, device=target.device)
        ce = cross_entropies(logits, is_target, live, weight, label_smoothing)
        if weight is not None:
            target_weight = torch.where(is_target, weight.detach().double(), 0).sum(1)
    student, teacher_rows = _rows_of(logits, teacher, target, live, temperature)
    kl = divergences(student, teacher_rows, live, temperature, divergence, beta)

    of_row = torch.where(live, 1.0 if row_weight is None else row_weight.reshape(-1).double(), 0)
    ce, kl = (
        torch.where(live, torch.where(known, terms, float("nan")), 0) * of_row for terms in (ce, kl)
    )
    loss, ce, kl = reduce_terms(
        RowTerms(ce, kl, totals(of_row, of_row * target_weight)),
        temperature,
        ce_weight,
        kl_weight,
        reduction,
    )
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    parts = LossParts(loss.to(dtype), ce.detach().to(dtype), kl.detach().to(dtype))
    if reduction == "none":
        parts = LossParts(*(part.reshape(shape) for part in parts))
    return parts if return_parts else parts.loss


def similarity_loss(
    logits: Tensor,
    target: Tensor,
    stats: ExplanationStats,
    *,
    temperature: float = 4.0,
    similarity_temperature: float = 1.0,
    similarity: Similarity = "cosine",
    label_mode: LabelMode = "softmax",
    non_target_mass: float = 0.1,
    ignore_index: int = -100,
    **keywords: Any,
) -> Tensor | LossParts:
    """Distillation of the soft labels that explanation statistics give.

    Logits ``[B, C]``, target ``[B]`` or ``[B, C]``, statistics ``[B, C or K]``; the other keywords
    are those of `distillation_loss`.
    """
    explained = teacher_logits(
        stats,
        target,
        temperature=temperature,
        similarity_temperature=similarity_temperature,
        similarity=similarity,
        label_mode=label_mode,
        non_target_mass=non_target_mass,
        ignore_index=ignore_index,
    )
    teacher = teachers.among_all(explained, stats.class_index, logits.shape[1])
    return distillation_loss(
        logits, teacher, target, temperature=temperature, ignore_index=ignore_index, **keywords
    )


def introspective_loss(
    logits: Tensor,
    target: Tensor,
    gradients: Tensor,
    inputs: Tensor,
    *,
    center: bool = False,
    class_index: Tensor | None = None,
    ignore_index: int = -100,
    **keywords: Any,
) -> Tensor | LossParts:
    """The statistics of the explanations, and the loss on them.

    Logits ``[B, C]``, target ``[B]`` or ``[B, C]``, gradients ``[B, C or K, *S]``, inputs
    ``[B, *S]``; the other keywords are those of `similarity_loss`.
    """
    stats = explanation_stats(
        gradients, inputs, target, center=center, class_index=class_index, ignore_index=ignore_index
    )
    return similarity_loss(logits, target, stats, ignore_index=ignore_index, **keywords)


def linear_introspective_loss(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    return_parts: bool = False,
    **keywords: Any,
) -> Tensor | LossParts:
    """The loss of a linear head explained at its features: ``g_c`` is row ``c`` of ``weight``.

    Features ``[..., D]``, weight ``[C, D]``, target ``[...]``, bias ``[C]``; the other keywords are
    those of `introspective_loss`.
    """
    rows = features.reshape(math.prod(features.shape[:-1]), features.shape[-1])
    rows = zero_ignored(rows, target.reshape(-1), ignore_index)
    result = introspective_loss(
        linear_logits(rows, weight, bias),
        target.reshape(-1),
        weight.detach().expand(len(rows), -1, -1),
        rows.detach(),
        weight=class_weight,
        row_weight=None if row_weight is None else row_weight.reshape(-1),
        ignore_index=ignore_index,
        return_parts=True,
        **keywords,
    )
    return _of_shape(result, target.shape, return_parts)


def linear_distillation_loss(
    features: Tensor,
    weight: Tensor,
    teacher: Teacher,
    target: Tensor | None,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    return_parts: bool = False,
    **keywords: Any,
) -> Tensor | LossParts:
    """Distillation of a linear head from any teacher.

    Features ``[..., D]``, weight ``[C, D]``, target ``[...]`` or None, bias ``[C]``; the other
    keywords are those of `distillation_loss`.
    """
    rows = features.reshape(math.prod(features.shape[:-1]), features.shape[-1])
    if target is not None:
        target = target.reshape(-1)
        rows = zero_ignored(rows, target, ignore_index)
    if isinstance(teacher, Tensor):
        teacher = teacher.reshape(len(rows), teacher.shape[-1])
    result = distillation_loss(
        linear_logits(rows, weight, bias),
        teacher,
        target,
        weight=class_weight,
        row_weight=None if row_weight is None else row_weight.reshape(-1),
        ignore_index=ignore_index,
        return_parts=True,
        **keywords,
    )
    return _of_shape(result, features.shape[:-1], return_parts)


def _of_shape(
    parts: Tensor | LossParts, shape: Sequence[int], return_parts: bool
) -> Tensor | LossParts:
    """Parts of rows in the shape that the rows came in; those of a batch as they are."""
    assert isinstance(parts, LossParts)
    if parts.loss.dim() > 0:
        parts = LossParts(*(part.reshape(shape) for part in parts))
    return parts if return_parts else parts.loss


def _rows_of(
    logits: Tensor, teacher: Teacher, target: Tensor | None, live: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """What the divergence is between: logits of student and teacher, of as many classes."""
    num_classes = logits.shape[1]
    if isinstance(teacher, Tensor):
        return logits, teacher.movedim(1, -1).reshape(-1, num_classes)
    if isinstance(teacher, LinearTeacher):
        features = teacher.features.reshape(len(logits), teacher.weight.shape[1])
        return logits, linear_logits(features, teacher.weight, teacher.bias)
    if isinstance(teacher, ExplanationStats):
        assert target is not None
        explained = teacher_logits(teacher, target, temperature=temperature)
        return logits, teachers.among_all(explained, teacher.class_index, num_classes)
    shape = (len(logits), teacher.indices.shape[-1])
    log_probs = teacher.log_probs.reshape(shape).detach().double()
    indices = teacher.indices.reshape(shape)
    logits = torch.where(live[:, None], logits.double(), 0)
    indices = torch.where(live[:, None], indices, torch.arange(shape[1], device=indices.device))
    student = logits.gather(1, indices)
    if teacher.tail == "renormalize" or indices.shape[1] == num_classes:
        return student, log_probs
    others = logits.scatter(1, indices, _NEVER)
    nothing = (others == _NEVER).all(1, keepdim=True)
    # The gradient of a sum of no exponentials would be NaN.
    others = torch.where(nothing, 0, others).logsumexp(1, keepdim=True)
    others = torch.where(nothing, _NEVER, others)
    missing = (1 - log_probs.exp().sum(1, keepdim=True)).clamp(min=0).log()
    return torch.cat([student, others], 1), torch.cat([log_probs, missing], 1)


def linear_logits(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``features @ weight.T + bias`` in float32 at least, under autocast too."""
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    with torch.autocast(features.device.type, enabled=False):
        return F.linear(features.to(wide), weight.to(wide), None if bias is None else bias.to(wide))


def zero_ignored(rows: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """``rows`` without what ignored ones hold, which would reach the weight's gradient if NaN."""
    return torch.where((target != ignore_index)[:, None], rows, 0)


class RowTerms(NamedTuple):
    """What a loss is made of before it is reduced: ``[B]``, ``[B]``, and `totals`."""

    ce: Tensor
    kl: Tensor
    totals: Tensor | Sequence[Tensor | float]


def cross_entropies(
    logits: Tensor, target: Tensor, live: Tensor, weight: Tensor | None, label_smoothing: float
) -> Tensor:
    """Cross entropies ``[N]`` with class probabilities ``target [N, C]``, in float64.

    A class whose logit is -inf does not exist in its row: it has no probability and no part in
    label smoothing. A target which does not exist costs +inf.
    """
    z, exists = _existing(logits, live)
    target = target.detach().double()
    smooth = exists / exists.double().sum(1, keepdim=True).clamp(min=1)
    smoothed = (1 - label_smoothing) * target + label_smoothing * smooth
    if weight is not None:
        smoothed = smoothed * weight.detach().double()
    nll = torch.logsumexp(z, 1, keepdim=True) - torch.where(exists, z, 0)
    ce = torch.where(smoothed != 0, smoothed * nll, 0).sum(1)
    # Its infinity comes last, so that no weight of zero turns it into NaN.
    return torch.where((target.ne(0) & ~exists).any(1), ce + float("inf"), ce)


def divergences(
    logits: Tensor,
    teacher_logits: Tensor,
    live: Tensor,
    temperature: float,
    divergence: Divergence,
    beta: float,
) -> Tensor:
    """Divergences ``[N]`` of ``p = softmax(z / T)`` and ``q = softmax(t / T)``, in float64.

    A class whose logit is -inf does not exist in its row: it has no soft label either. A teacher
    that excludes every class is no distribution: NaN.
    """
    z, exists = _existing(logits, live)
    any_exists = exists.any(1, keepdim=True)
    t = torch.where(live[:, None], teacher_logits.detach().double(), 0)
    t = torch.where(any_exists, t.masked_fill(~exists, _NEVER), 0)
    log_p = torch.where(exists, torch.log_softmax(z / temperature, 1), _NEVER)
    log_q = torch.log_softmax((t - _row_max(t)) / temperature, 1)
    p, q = torch.where(exists, log_p.exp(), 0), log_q.exp()
    if divergence == "forward_kl":
        terms = _relative(q, log_q, log_p)
    elif divergence == "reverse_kl":
        terms = _relative(p, log_p, log_q)
    else:
        log_m = (beta * q + (1 - beta) * p).log()
        terms = beta * _relative(q, log_q, log_m) + (1 - beta) * _relative(p, log_p, log_m)
    return torch.where(any_exists[:, 0], terms.sum(1), 0)


def _relative(of: Tensor, log_of: Tensor, log_to: Tensor) -> Tensor:
    """``of * (log of - log to)``, zero where ``of`` is."""
    some = of != 0
    return torch.where(some, of, 0) * (torch.where(some, log_of, 0) - torch.where(some, log_to, 0))


def _existing(logits: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Logits in float64 less the largest of their row, and which classes exist.

    Whatever an ignored row holds, even NaN, it stays out of the loss and its gradient; and a row
    without any class has equal logits.
    """
    z = torch.where(live[:, None], logits.double(), 0)
    exists = z != _NEVER
    # Even where a row is NaN, classes that do not exist have no gradient.
    z = torch.where(exists, z, _NEVER)
    # A row without any class would turn its gradient into NaN on the way through log_softmax.
    z = torch.where(exists.any(1, keepdim=True), z, 0)
    return z - _row_max(z), exists


def reduce_terms(
    terms: RowTerms, temperature: float, ce_weight: float, kl_weight: float, reduction: Reduction
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, its cross entropy and its divergence, reduced, in the dtype of the terms."""
    ce, kl, (weights, rows) = terms
    if reduction != "none":
        ce, kl = ce.sum(), kl.sum()
    if reduction == "mean":
        ce, kl = ce / weights, kl / rows
    # A term that is switched off can't spoil the loss: 0 * inf would be NaN. The cross entropy
    # keeps its graph, so that a loss without either can be differentiated.
    if ce_weight > 0:
        loss = ce_weight * ce
    else:
        loss = torch.where(torch.zeros_like(ce, dtype=torch.bool), ce, 0)
    if kl_weight > 0:
        loss = loss + kl_weight * temperature**2 * kl
    return loss, ce, kl


def totals(rows: Tensor, target_weight: Tensor) -> Tensor:
    """What means are divided by, ``[2]``: the sums of target weights and of rows.

    Where all weights are 0 there is nothing to divide by: NaN, as in ``F.cross_entropy``, and not
    the infinity that label smoothing would make of it.
    """
    weights = target_weight.sum()
    return torch.stack([torch.where(weights == 0, float("nan"), weights), rows.sum().double()])


def _row_max(values: Tensor) -> Tensor:
    """The largest finite-or-NaN value of each row, a constant; 0 in a row of -inf."""
    top = values.detach().amax(1, keepdim=True)
    return torch.where(top == _NEVER, 0, top)
