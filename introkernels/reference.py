"""The definition of every loss, in plain PyTorch: the oracle of all tests and of all backends.

Read it beside the mathematics of the README. It is written for the reader, not for speed: it
materialises every explanation, ``[B, C, D]``. Everything after the explanations is ``C`` numbers a
row and is computed in float64, whatever the dtype of the inputs, so that the definition itself is
accurate. Autograd differentiates it; soft labels are constants.

The functions have the names and arguments of the public ones and do not check them. A row whose
target is neither a class nor ``ignore_index`` comes out as NaN. Float32 explanations are formed and
summed in float32.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

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
    is_target = target_columns(target, gradients.shape[1], class_index)
    # The target's explanation is picked by a sum over one-hot rows rather than by an index, so
    # that a target which is no class reads nothing.
    picked = torch.where(is_target[:, :, None], explanations, 0).sum(1, keepdim=True)
    dots = (explanations * picked).sum(-1)
    sq_norms = explanations.square().sum(-1)
    live = (target != ignore_index)[:, None]
    known = is_target.any(1, keepdim=True)
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
    """Teacher logits ``t [B, K]`` of the explained classes, in the dtype of the statistics."""
    is_target = target_columns(target, stats.dots.shape[1], stats.class_index)
    s = similarities(stats, is_target, similarity)
    if label_mode == "softmax":
        logits = (s - 1) / similarity_temperature
    else:
        logits = temperature * _log_soft_labels(
            s / similarity_temperature,
            is_target,
            torch.ones_like(is_target),
            temperature,
            label_mode,
            non_target_mass,
        )
    labelled = is_target.any(1, keepdim=True) & (target != ignore_index)[:, None]
    return torch.where(labelled, logits, float("nan")).to(stats.dots.dtype)


def soft_labels(
    stats: ExplanationStats, target: Tensor, *, temperature: float = 4.0, **labels: Any
) -> Tensor:
    """Soft labels ``q = softmax(t / T) [B, K]``; the keywords are those of `teacher_logits`."""
    logits = teacher_logits(
        ExplanationStats(stats.dots.double(), stats.sq_norms.double(), stats.class_index),
        target,
        temperature=temperature,
        **labels,
    )
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
    log_q = teacher_log_q(logits, teacher_logits, temperature)
    return _loss(
        logits,
        log_q,
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
    log_q = similarity_log_q(
        logits,
        target,
        stats,
        temperature=temperature,
        similarity_temperature=similarity_temperature,
        similarity=similarity,
        label_mode=label_mode,
        non_target_mass=non_target_mass,
        ignore_index=ignore_index,
    )
    return _loss(
        logits,
        log_q,
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


def teacher_log_q(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """``log softmax(teacher_logits / T)`` over the classes that exist in ``logits``, ``[B, C]``."""
    teacher = teacher_logits.detach().double().masked_fill(logits == _NEVER, _NEVER)
    return torch.log_softmax((teacher - _row_max(teacher)) / temperature, 1)


def similarity_log_q(
    logits: Tensor,
    target: Tensor,
    stats: ExplanationStats,
    *,
    temperature: float,
    similarity_temperature: float,
    similarity: Similarity,
    label_mode: LabelMode,
    non_target_mass: float,
    ignore_index: int,
) -> Tensor:
    """``log q`` of the explanations, ``[B, C]``: -inf for classes masked or not explained."""
    is_target = target_columns(target, stats.dots.shape[1], stats.class_index)
    exists = logits != _NEVER
    index = stats.class_index
    if index is not None:
        live = (target != ignore_index)[:, None]
        index = torch.where(live & (index >= 0) & (index < logits.shape[1]), index, 0)
        exists = exists.gather(1, index)
    log_q = _log_soft_labels(
        similarities(stats, is_target, similarity) / similarity_temperature,
        is_target,
        exists,
        temperature,
        label_mode,
        non_target_mass,
    )
    if index is None:
        return log_q
    return log_q.new_full(logits.shape, _NEVER).scatter(1, index, log_q)


class RowTerms(NamedTuple):
    """What the loss of each row is made of, before it is reduced; all float64."""

    ce: Tensor
    kl: Tensor
    live: Tensor
    target_weight: Tensor


def row_terms(
    logits: Tensor,
    log_q: Tensor,
    target: Tensor,
    temperature: float,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> RowTerms:
    """Cross entropy and ``KL(q || softmax(z / T))`` of each row, zero where it is ignored.

    A class whose logit is -inf does not exist in its row: it has no probability, no soft label
    and no part in label smoothing. A target which does not exist costs +inf.
    """
    num_classes = logits.shape[1]
    live = target != ignore_index
    known = (target >= 0) & (target < num_classes)
    is_target = target_columns(target, num_classes, None)
    # Whatever an ignored row holds, even NaN, it stays out of the loss and its gradient.
    logits = torch.where(live[:, None], logits, 0)
    log_q = torch.where(live[:, None], log_q.detach(), 0)
    exists = logits != _NEVER
    # A row without any class would turn its gradient into NaN on the way through logsumexp.
    exists_or_empty_row = exists | ~exists.any(1, keepdim=True)
    z = torch.where(exists_or_empty_row, logits.double(), _NEVER)
    z = torch.where(exists.any(1, keepdim=True), z, 0)
    z = z - _row_max(z)
    class_weight = z.new_ones(num_classes) if weight is None else weight.detach().double()

    # -log p_y as log(1 + sum over the others of exp(z_c - z_y)), which keeps its relative
    # precision where p_y is almost 1 and log(p_y) would cancel.
    z_target = torch.where(is_target, z, 0).sum(1)
    log_norm = torch.logsumexp(z, 1, keepdim=True)
    others = torch.logsumexp(z.masked_fill(is_target, _NEVER), 1)
    none_else = ~(exists & ~is_target).any(1)
    nll = torch.where(
        none_else,
        0.0 * z_target,
        torch.logaddexp(torch.zeros_like(z_target), torch.where(none_else, 0, others) - z_target),
    )
    # A target that does not exist costs log_norm - (-inf); its infinity comes last, so that no
    # weight of zero turns it into NaN.
    has_target = (exists & is_target).any(1)
    nll = torch.where(has_target, nll, log_norm[:, 0])

    target_weight = torch.where(is_target, class_weight, 0).sum(1)
    ce = target_weight * nll
    if label_smoothing > 0:
        nll_of_all = torch.where(exists, log_norm - z, 0)
        share = label_smoothing / exists.double().sum(1).clamp(min=1)
        ce = (1 - label_smoothing) * ce + share * (class_weight * nll_of_all).sum(1)
    ce = torch.where(has_target, ce, ce + float("inf"))

    log_p = torch.where(exists, torch.log_softmax(z / temperature, 1), 0)
    kl = torch.where(unlabelled(log_q), 0, kl_divergence(log_q, log_p, exists))

    ce = torch.where(known, ce, float("nan"))
    kl = torch.where(known, kl, float("nan"))
    return RowTerms(
        torch.where(live, ce, 0),
        torch.where(live, kl, 0),
        live,
        torch.where(live, target_weight, 0),
    )


def reduce_terms(
    terms: RowTerms, temperature: float, ce_weight: float, kl_weight: float, reduction: Reduction
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, its cross entropy and its divergence, reduced; float64."""
    ce, kl = terms.ce, terms.kl
    if reduction != "none":
        ce, kl = ce.sum(), kl.sum()
    if reduction == "mean":
        ce, kl = ce / total_weight(terms.target_weight), kl / terms.live.sum()
    loss = _weighted(ce, ce_weight) + _weighted(kl, kl_weight * temperature**2)
    return loss, ce, kl


def total_weight(target_weight: Tensor) -> Tensor:
    """The sum of the target weights, by which the mean of the cross entropy is divided.

    Where it is 0 there is nothing to divide by: NaN, as in ``F.cross_entropy``, and not the
    infinity that label smoothing would make of it.
    """
    total = target_weight.sum()
    return torch.where(total == 0, float("nan"), total)


def _weighted(term: Tensor, factor: float) -> Tensor:
    """``factor * term``, but 0 for a factor of 0 even where the term is infinite or NaN."""
    return torch.where(torch.full_like(term, factor) == 0, 0, factor * term)


def kl_divergence(log_q: Tensor, log_p: Tensor, exists: Tensor) -> Tensor:
    """``KL(q || p)`` of each row, summed over the classes that exist.

    Both distributions sum to one, so ``sum(q - p) = 0`` may be taken away term by term:
    ``KL = sum(q d - (q - p))`` with ``d = log q - log p``. Every term is then >= 0, and nothing
    cancels where q is close to p.
    """
    has_label = exists & (log_q != _NEVER)
    q = torch.where(has_label, log_q.exp(), 0)
    difference = torch.where(has_label, log_q, 0) - torch.where(has_label, log_p, 0)
    cross = torch.where(q == 0, 0, q * difference)
    return (cross + p_minus_q(log_q, log_p, exists)).sum(1)


def unlabelled(log_q: Tensor) -> Tensor:
    """``[B]``: rows that have no soft label at all, and so nothing to diverge from.

    This happens where the target is masked and no other explained class is left.
    """
    return (log_q == _NEVER).all(1)


def p_minus_q(log_q: Tensor, log_p: Tensor, exists: Tensor) -> Tensor:
    """``p - q`` of each class, as ``-p expm1(log q - log p)`` where the two are close."""
    has_label = exists & (log_q != _NEVER)
    q = torch.where(has_label, log_q.exp(), 0)
    p = torch.where(exists, log_p.exp(), 0)
    difference = torch.where(has_label, log_q, 0) - torch.where(has_label, log_p, 0)
    close = has_label & (difference.abs() < 1)
    return torch.where(close, -p * torch.where(close, difference, 0).expm1(), p - q)


def target_columns(target: Tensor, num_classes: int, class_index: Tensor | None) -> Tensor:
    """``[B, K]``: where a row's target stands among its explained classes."""
    if class_index is None:
        classes = torch.arange(num_classes, device=target.device)
        return target[:, None] == classes
    return target[:, None] == class_index


def _row_max(values: Tensor) -> Tensor:
    """The largest finite-or-NaN value of each row, a constant; 0 in a row of -inf."""
    top = values.detach().amax(1, keepdim=True)
    return torch.where(top == _NEVER, 0, top)


def similarities(stats: ExplanationStats, is_target: Tensor, similarity: Similarity) -> Tensor:
    """``s [B, K]`` in float64: the similarity of each explanation to the target's."""
    dots, sq_norms = stats.dots.detach().double(), stats.sq_norms.detach().double()
    sq_norm_target = torch.where(is_target, sq_norms, 0).sum(1, keepdim=True)
    if similarity == "cosine":
        # Two roots rather than the root of the product, which would underflow.
        scale = sq_norms.sqrt() * sq_norm_target.sqrt()
    else:
        scale = sq_norm_target.expand_as(dots)
    # A norm that overflowed says nothing of the angle; dots / inf would pass for a right one.
    scale = torch.where(scale.isinf(), float("nan"), scale)
    s = torch.where(scale == 0, 0, dots / torch.where(scale == 0, 1, scale)).clamp(-1, 1)
    return torch.where(is_target, 1, s)


def _log_soft_labels(
    teacher: Tensor,
    is_target: Tensor,
    exists: Tensor,
    temperature: float,
    label_mode: LabelMode,
    non_target_mass: float,
) -> Tensor:
    """``log q`` over the explained classes that exist in the row; -inf for those that do not."""
    teacher = teacher.masked_fill(~exists, _NEVER) / temperature
    if label_mode == "softmax":
        return torch.where(exists, torch.log_softmax(teacher, 1), _NEVER)
    others = exists & ~is_target
    has_target = (exists & is_target).any(1, keepdim=True)
    # Where one of the two sides does not exist, the other one holds all of the mass.
    mass = torch.full_like(teacher[:, :1], non_target_mass).masked_fill(~has_target, 1)
    mass = mass.masked_fill(~others.any(1, keepdim=True), 0)
    log_others = mass.log() + torch.log_softmax(teacher.masked_fill(~others, _NEVER), 1)
    log_q = torch.where(others, log_others, _NEVER)
    return torch.where(exists & is_target, torch.log1p(-mass), log_q)


def _loss(
    logits: Tensor,
    log_q: Tensor,
    target: Tensor,
    *,
    temperature: float,
    ce_weight: float,
    kl_weight: float,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: Reduction,
    return_parts: bool,
) -> Tensor | LossParts:
    terms = row_terms(logits, log_q, target, temperature, weight, ignore_index, label_smoothing)
    loss, ce, kl = reduce_terms(terms, temperature, ce_weight, kl_weight, reduction)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    parts = LossParts(loss.to(dtype), ce.detach().to(dtype), kl.detach().to(dtype))
    return parts if return_parts else parts.loss
