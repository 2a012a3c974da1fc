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
from introkernels.types import ExplanationStats, LabelMode, LossParts, Reduction, Similarity

__all__ = [
    "distillation_loss",
    "explanation_stats",
    "introspective_loss",
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

    Gradients ``[B, K, *S]``, inputs ``[B, *S]``, target ``[B]`` -> dots and sq_norms ``[B, K]``.
    """
    dtype = torch.promote_types(gradients.dtype, inputs.dtype)
    wide = dtype if dtype == torch.float64 else torch.float32
    explanations = gradients.to(wide) * inputs.to(wide).unsqueeze(1)
    explanations = explanations.reshape(*gradients.shape[:2], math.prod(gradients.shape[2:]))
    if center:
        explanations = explanations - explanations.mean(1, keepdim=True)
    column, known = teachers.target_column(target, gradients.shape[1], class_index)
    of_target = explanations.take_along_dim(column[:, :, None], 1)
    dots = (explanations * of_target).sum(-1)
    sq_norms = explanations.square().sum(-1)
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
        torch.where(target == ignore_index, -1, target),
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
    """Hinton's distillation: soft labels ``q = softmax(teacher_logits / T)``.

    Logits and teacher_logits ``[B, C]``, target ``[B]``.
    """
    terms = row_terms(
        logits, teacher_logits, target, temperature, weight, ignore_index, label_smoothing
    )
    loss, ce, kl = reduce_terms(terms, temperature, ce_weight, kl_weight, reduction)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    parts = LossParts(loss.to(dtype), ce.detach().to(dtype), kl.detach().to(dtype))
    return parts if return_parts else parts.loss


def similarity_loss(
    logits: Tensor,
    target: Tensor,
    stats: ExplanationStats,
    *,
    temperature: float = 4.0,
    similarity_temperature: float = 1.0,
    ce_weight: float = 0.7,
    kl_weight: float = 0.3,
    similarity: Similarity = "cosine",
    label_mode: LabelMode = "softmax",
    non_target_mass: float = 0.1,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    return_parts: bool = False,
) -> Tensor | LossParts:
    """Distillation of the soft labels that explanation statistics give.

    Logits ``[B, C]``, target ``[B]``, statistics ``[B, C or K]``.
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
    return distillation_loss(
        logits,
        teachers.among_all(explained, stats.class_index, logits.shape[1]),
        target,
        temperature=temperature,
        ce_weight=ce_weight,
        kl_weight=kl_weight,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
        return_parts=return_parts,
    )


def introspective_loss(
    logits: Tensor,
    target: Tensor,
    gradients: Tensor,
    inputs: Tensor,
    *,
    temperature: float = 4.0,
    similarity_temperature: float = 1.0,
    ce_weight: float = 0.7,
    kl_weight: float = 0.3,
    similarity: Similarity = "cosine",
    label_mode: LabelMode = "softmax",
    non_target_mass: float = 0.1,
    center: bool = False,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    class_index: Tensor | None = None,
    return_parts: bool = False,
) -> Tensor | LossParts:
    """The statistics of the explanations, and the loss on them.

    Logits ``[B, C]``, target ``[B]``, gradients ``[B, C or K, *S]``, inputs ``[B, *S]``.
    """
    return similarity_loss(
        logits,
        target,
        explanation_stats(
            gradients,
            inputs,
            target,
            center=center,
            class_index=class_index,
            ignore_index=ignore_index,
        ),
        temperature=temperature,
        similarity_temperature=similarity_temperature,
        ce_weight=ce_weight,
        kl_weight=kl_weight,
        similarity=similarity,
        label_mode=label_mode,
        non_target_mass=non_target_mass,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
        return_parts=return_parts,
    )


def linear_introspective_loss(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 4.0,
    similarity_temperature: float = 1.0,
    ce_weight: float = 0.7,
    kl_weight: float = 0.3,
    similarity: Similarity = "cosine",
    label_mode: LabelMode = "softmax",
    non_target_mass: float = 0.1,
    center: bool = False,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    return_parts: bool = False,
) -> Tensor | LossParts:
    """The loss of a linear head explained at its features: ``g_c`` is row ``c`` of ``weight``.

    Features ``[..., D]``, weight ``[C, D]``, target ``[...]``, bias ``[C]``.
    """
    rows = features.reshape(math.prod(features.shape[:-1]), features.shape[-1])
    rows = zero_ignored(rows, target.reshape(-1), ignore_index)
    logits = linear_logits(rows, weight, bias)
    result = introspective_loss(
        logits,
        target.reshape(-1),
        weight.detach().expand(len(rows), -1, -1),
        rows.detach(),
        temperature=temperature,
        similarity_temperature=similarity_temperature,
        ce_weight=ce_weight,
        kl_weight=kl_weight,
        similarity=similarity,
        label_mode=label_mode,
        non_target_mass=non_target_mass,
        center=center,
        weight=class_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
        return_parts=True,
    )
    assert isinstance(result, LossParts)
    shape = target.shape if reduction == "none" else ()
    parts = LossParts(*(part.reshape(shape) for part in result))
    return parts if return_parts else parts.loss


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


def row_terms(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    temperature: float,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> RowTerms:
    """Cross entropy and ``KL(q || softmax(z / T))`` of each row, zero where it is ignored.

    A class whose logit is -inf does not exist in its row: it has no probability, no soft label
    and no part in label smoothing. A target which does not exist costs +inf. A teacher that
    excludes every class is no distribution: NaN.
    """
    num_classes = logits.shape[1]
    live = target != ignore_index
    known = (target >= 0) & (target < num_classes)
    is_target = target[:, None] == torch.arange(num_classes, device=target.device)
    # Whatever an ignored row holds, even NaN, it stays out of the loss and its gradient.
    z = torch.where(live[:, None], logits.double(), 0)
    t = torch.where(live[:, None], teacher_logits.detach().double(), 0)
    exists = z != _NEVER
    # Even where a row is NaN, classes that do not exist have no gradient.
    z = torch.where(exists, z, _NEVER)
    any_exists = exists.any(1, keepdim=True)
    # A row without any class would turn its gradient into NaN on the way through log_softmax.
    z = torch.where(any_exists, z, 0)
    t = torch.where(any_exists, t.masked_fill(~exists, _NEVER), 0)
    z, t = z - _row_max(z), t - _row_max(t)
    class_weight = z.new_ones(num_classes) if weight is None else weight.detach().double()

    log_norm = torch.logsumexp(z, 1, keepdim=True)
    target_weight = torch.where(is_target, class_weight, 0).sum(1)
    z_target = torch.where(exists & is_target, z, 0).sum(1)
    ce = target_weight * (log_norm[:, 0] - z_target)
    if label_smoothing > 0:
        nll_of_all = torch.where(exists, log_norm - z, 0)
        share = label_smoothing / exists.double().sum(1).clamp(min=1)
        ce = (1 - label_smoothing) * ce + share * (class_weight * nll_of_all).sum(1)
    # A target that does not exist costs log_norm - (-inf). Its infinity comes last, so that no
    # weight of zero turns it into NaN.
    ce = torch.where((exists & is_target).any(1), ce, ce + float("inf"))

    log_p = torch.where(exists, torch.log_softmax(z / temperature, 1), 0)
    log_q = torch.log_softmax(t / temperature, 1)
    q = log_q.exp()
    has_label = q != 0
    kl = torch.where(has_label, q * (torch.where(has_label, log_q, 0) - log_p), 0).sum(1)
    kl = torch.where(any_exists[:, 0], kl, 0)

    ce = torch.where(known, ce, float("nan"))
    kl = torch.where(known, kl, float("nan"))
    return RowTerms(
        torch.where(live, ce, 0),
        torch.where(live, kl, 0),
        totals(live, torch.where(live, target_weight, 0)),
    )


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


def totals(live: Tensor, target_weight: Tensor) -> Tensor:
    """What means are divided by, ``[2]``: the sum of the target weights and the live rows.

    Where all weights are 0 there is nothing to divide by: NaN, as in ``F.cross_entropy``, and not
    the infinity that label smoothing would make of it.
    """
    weights = target_weight.sum()
    return torch.stack([torch.where(weights == 0, float("nan"), weights), live.sum().double()])


def _row_max(values: Tensor) -> Tensor:
    """The largest finite-or-NaN value of each row, a constant; 0 in a row of -inf."""
    top = values.detach().amax(1, keepdim=True)
    return torch.where(top == _NEVER, 0, top)
