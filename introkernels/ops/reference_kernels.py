"""The definition in the shape of the operators: forwards and backwards without autograd.

Forward operators call :mod:`introkernels.reference`. Backward operators write out its gradient,

    d loss / d z_c = ce_weight * d CE / d z_c + kl_weight * T * (p_c - q_c),

because an operator runs below autograd; tests hold it against autograd of the definition. The
``row_state`` that compiled kernels keep for their backward stays zero here: the gradient is made
from the inputs alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from introkernels import checks, reference
from introkernels.ops.schema import loss_dtype, row_state_like
from introkernels.types import LABEL_MODES, REDUCTIONS, SIMILARITIES, ExplanationStats

_NEVER = float("-inf")


def distillation_forward(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    temperature: float,
    ce_weight: float,
    kl_weight: float,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
) -> tuple[Tensor, ...]:
    checks.target_in_range(target, logits.shape[1], ignore_index)
    return _forward(
        logits,
        reference.teacher_log_q(logits, teacher_logits, temperature),
        target,
        (weight, temperature, ce_weight, kl_weight, ignore_index, label_smoothing, reduction),
    )


def distillation_backward(
    grad_loss: Tensor,
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    row_state: Tensor,
    totals: Tensor,
    weight: Tensor | None,
    temperature: float,
    ce_weight: float,
    kl_weight: float,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
) -> Tensor:
    return _backward(
        grad_loss,
        logits,
        reference.teacher_log_q(logits, teacher_logits, temperature),
        target,
        totals,
        (weight, temperature, ce_weight, kl_weight, ignore_index, label_smoothing, reduction),
    ).to(logits.dtype, memory_format=torch.contiguous_format)


def similarity_forward(
    logits: Tensor,
    target: Tensor,
    dots: Tensor,
    sq_norms: Tensor,
    class_index: Tensor | None,
    weight: Tensor | None,
    temperature: float,
    ce_weight: float,
    kl_weight: float,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    similarity_temperature: float,
    similarity: int,
    label_mode: int,
    non_target_mass: float,
) -> tuple[Tensor, ...]:
    checks.target_in_range(target, logits.shape[1], ignore_index)
    checks.class_index_values(class_index, target, logits.shape[1], ignore_index)
    return _forward(
        logits,
        _similarity_log_q(
            logits,
            target,
            ExplanationStats(dots, sq_norms, class_index),
            temperature,
            ignore_index,
            (similarity_temperature, similarity, label_mode, non_target_mass),
        ),
        target,
        (weight, temperature, ce_weight, kl_weight, ignore_index, label_smoothing, reduction),
    )


def similarity_backward(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    dots: Tensor,
    sq_norms: Tensor,
    class_index: Tensor | None,
    row_state: Tensor,
    totals: Tensor,
    weight: Tensor | None,
    temperature: float,
    ce_weight: float,
    kl_weight: float,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    similarity_temperature: float,
    similarity: int,
    label_mode: int,
    non_target_mass: float,
) -> Tensor:
    return _backward(
        grad_loss,
        logits,
        _similarity_log_q(
            logits,
            target,
            ExplanationStats(dots, sq_norms, class_index),
            temperature,
            ignore_index,
            (similarity_temperature, similarity, label_mode, non_target_mass),
        ),
        target,
        totals,
        (weight, temperature, ce_weight, kl_weight, ignore_index, label_smoothing, reduction),
    ).to(logits.dtype, memory_format=torch.contiguous_format)


def explanation_stats(
    gradients: Tensor,
    inputs: Tensor,
    target: Tensor,
    class_index: Tensor | None,
    center: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    if class_index is None:
        checks.target_in_range(target, gradients.shape[1], ignore_index)
    else:
        checks.target_in_range(target, torch.iinfo(torch.int64).max, ignore_index)
        checks.class_index_values(class_index, target, None, ignore_index)
    stats = reference.explanation_stats(
        gradients,
        inputs,
        target,
        center=center,
        class_index=class_index,
        ignore_index=ignore_index,
    )
    return stats.dots, stats.sq_norms


def introspective_forward(
    logits: Tensor,
    target: Tensor,
    gradients: Tensor,
    inputs: Tensor,
    class_index: Tensor | None,
    center: bool,
    weight: Tensor | None,
    temperature: float,
    ce_weight: float,
    kl_weight: float,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    similarity_temperature: float,
    similarity: int,
    label_mode: int,
    non_target_mass: float,
) -> tuple[Tensor, ...]:
    checks.target_in_range(target, logits.shape[1], ignore_index)
    dots, sq_norms = explanation_stats(gradients, inputs, target, class_index, center, ignore_index)
    dots, sq_norms = dots.double(), sq_norms.double()
    outputs = similarity_forward(
        logits,
        target,
        dots,
        sq_norms,
        class_index,
        weight,
        temperature,
        ce_weight,
        kl_weight,
        ignore_index,
        label_smoothing,
        reduction,
        similarity_temperature,
        similarity,
        label_mode,
        non_target_mass,
    )
    return (*outputs, dots, sq_norms)


def linear_forward(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    need_features: bool,
    need_weight: bool,
    need_bias: bool,
    center: bool,
    class_weight: Tensor | None,
    temperature: float,
    ce_weight: float,
    kl_weight: float,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    similarity_temperature: float,
    similarity: int,
    label_mode: int,
    non_target_mass: float,
) -> tuple[Tensor, ...]:
    checks.target_in_range(target, weight.shape[0], ignore_index)
    features = reference.zero_ignored(features, target, ignore_index)
    logits = reference.linear_logits(features, weight, bias)
    stats = _head_stats(features, weight, target, center, ignore_index)
    outputs = similarity_forward(
        logits,
        target,
        *stats,
        class_weight,
        temperature,
        ce_weight,
        kl_weight,
        ignore_index,
        label_smoothing,
        reduction,
        similarity_temperature,
        similarity,
        label_mode,
        non_target_mass,
    )
    needs = (need_features, need_weight, need_bias)
    grads = tuple(outputs[0].new_empty(0) for _ in needs)
    if any(needs):
        grads = _head_grads(
            torch.ones_like(outputs[0], dtype=torch.float64),
            (features, weight, logits),
            target,
            stats,
            outputs[-1],
            needs,
            (
                class_weight,
                temperature,
                ce_weight,
                kl_weight,
                ignore_index,
                label_smoothing,
                reduction,
            ),
            (similarity_temperature, similarity, label_mode, non_target_mass),
        )
    return (*outputs, *grads)


def linear_backward(
    grad_loss: Tensor,
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    row_state: Tensor,
    totals: Tensor,
    need_features: bool,
    need_weight: bool,
    center: bool,
    class_weight: Tensor | None,
    temperature: float,
    ce_weight: float,
    kl_weight: float,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    similarity_temperature: float,
    similarity: int,
    label_mode: int,
    non_target_mass: float,
) -> tuple[Tensor, Tensor, Tensor]:
    features = reference.zero_ignored(features, target, ignore_index)
    logits = reference.linear_logits(features, weight, bias)
    stats = _head_stats(features, weight, target, center, ignore_index)
    # The gradient of a scalar loss is scaled last, so that it is the same number, to the bit,
    # whether it was made here or along with the loss.
    per_row = REDUCTIONS[reduction] == "none"
    grads = _head_grads(
        grad_loss if per_row else torch.ones_like(grad_loss),
        (features, weight, logits),
        target,
        stats,
        totals,
        (need_features, need_weight, bias is not None),
        (class_weight, temperature, ce_weight, kl_weight, ignore_index, label_smoothing, reduction),
        (similarity_temperature, similarity, label_mode, non_target_mass),
    )
    if not per_row:
        grads = tuple(grad * grad_loss for grad in grads)
    dtypes = (features.dtype, weight.dtype, features.dtype if bias is None else bias.dtype)
    grad_features, grad_weight, grad_bias = (
        grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)
    )
    return grad_features, grad_weight, grad_bias


def _head_grads(
    grad_loss: Tensor,
    head: tuple[Tensor, Tensor, Tensor],
    target: Tensor,
    stats: ExplanationStats,
    totals: Tensor,
    needs: tuple[bool, bool, bool],
    loss_options: _LossOptions,
    label_options: tuple[float, int, int, float],
) -> tuple[Tensor, ...]:
    """Gradients of features, weight and bias in the dtype of the loss, empty where not needed.

    ``head`` holds features, weight and logits.
    """
    features, weight, logits = head
    _, temperature, _, _, ignore_index, _, _ = loss_options
    log_q = _similarity_log_q(logits, target, stats, temperature, ignore_index, label_options)
    grad_logits = _backward(grad_loss, logits, log_q, target, totals, loss_options)
    need_features, need_weight, need_bias = needs
    nothing = grad_logits.new_empty(0)
    with torch.autocast(features.device.type, enabled=False):
        grads = (
            grad_logits @ weight.double() if need_features else nothing,
            grad_logits.mT @ features.double() if need_weight else nothing,
            grad_logits.sum(0) if need_bias else nothing,
        )
    return tuple(grad.to(loss_dtype(features)) for grad in grads)


def _head_stats(
    features: Tensor, weight: Tensor, target: Tensor, center: bool, ignore_index: int
) -> ExplanationStats:
    """Statistics of a linear head in closed form: ``[B, C, D]`` would be too much even here."""
    wide = torch.promote_types(torch.promote_types(features.dtype, weight.dtype), torch.float32)
    weight = weight.to(wide)
    if center:
        # A mean that is large against what is left of the weight has to keep more digits than that.
        weight = (weight.double() - weight.double().mean(0)).to(wide)
    # Similarities are ratios: scaling a row or the whole weight by a power of two changes nothing
    # in them, but keeps squares in range.
    weight = _near_one(weight, weight.abs().amax() if weight.numel() else weight.sum())
    features = features.to(wide)
    largest = features.abs().amax(1, keepdim=True) if features.numel() else features[:, :1]
    squares = _near_one(features, largest).square()
    known = (target >= 0) & (target < len(weight))
    weight_of_target = weight[torch.where(known, target, 0)]
    with torch.autocast(features.device.type, enabled=False):
        dots = (squares * weight_of_target) @ weight.mT
        sq_norms = squares @ weight.square().mT
    live = (target != ignore_index)[:, None]
    return ExplanationStats(torch.where(live, dots, 0), torch.where(live, sq_norms, 0))


def _near_one(values: Tensor, largest: Tensor) -> Tensor:
    """``values`` times the power of two that brings ``largest`` near 1; as they are for 0."""
    exponent = torch.frexp(largest).exponent
    return torch.ldexp(values, torch.where(largest.isfinite(), -exponent, 0))


def _similarity_log_q(
    logits: Tensor,
    target: Tensor,
    stats: ExplanationStats,
    temperature: float,
    ignore_index: int,
    label_options: tuple[float, int, int, float],
) -> Tensor:
    similarity_temperature, similarity, label_mode, non_target_mass = label_options
    return reference.similarity_log_q(
        logits,
        target,
        stats,
        temperature=temperature,
        similarity_temperature=similarity_temperature,
        similarity=SIMILARITIES[similarity],
        label_mode=LABEL_MODES[label_mode],
        non_target_mass=non_target_mass,
        ignore_index=ignore_index,
    )


_LossOptions = tuple[Tensor | None, float, float, float, int, float, int]


def _forward(
    logits: Tensor, log_q: Tensor, target: Tensor, options: _LossOptions
) -> tuple[Tensor, ...]:
    weight, temperature, ce_weight, kl_weight, ignore_index, label_smoothing, reduction = options
    terms = reference.row_terms(
        logits, log_q, target, temperature, weight, ignore_index, label_smoothing
    )
    parts = reference.reduce_terms(terms, temperature, ce_weight, kl_weight, REDUCTIONS[reduction])
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    totals = torch.stack([reference.total_weight(terms.target_weight), terms.live.sum().double()])
    return (*(part.to(dtype) for part in parts), row_state_like(logits).zero_(), totals)


def _backward(
    grad_loss: Tensor,
    logits: Tensor,
    log_q: Tensor,
    target: Tensor,
    totals: Tensor,
    options: _LossOptions,
) -> Tensor:
    """The gradient ``[B, C]`` of the logits, float64."""
    weight, temperature, ce_weight, kl_weight, ignore_index, label_smoothing, reduction = options
    num_classes = logits.shape[1]
    live = (target != ignore_index)[:, None]
    known = ((target >= 0) & (target < num_classes))[:, None]
    is_target = target[:, None] == torch.arange(num_classes, device=target.device)
    exists = logits != _NEVER
    top = logits.double().amax(1, keepdim=True)
    z = logits.double() - torch.where(top == _NEVER, 0, top)

    class_weight = torch.ones_like(z[:1]) if weight is None else weight.double()[None]
    target_weight = torch.where(is_target, class_weight, 0).sum(1, keepdim=True)
    p = torch.where(exists, torch.softmax(z, 1), 0)
    # 1 - p_y as the sum of the other probabilities: the difference would cancel near p_y = 1.
    p_minus_target = torch.where(is_target, -torch.where(is_target, 0, p).sum(1, keepdim=True), p)
    grad_ce = target_weight * p_minus_target
    if label_smoothing > 0:
        share = label_smoothing / exists.double().sum(1, keepdim=True).clamp(min=1)
        weight_sum = torch.where(exists, class_weight, 0).sum(1, keepdim=True)
        grad_ce = (1 - label_smoothing) * grad_ce + share * (weight_sum * p - class_weight)

    log_p = torch.log_softmax(z / temperature, 1)
    grad_kl = temperature * reference.p_minus_q(log_q, log_p, exists)
    grad_kl = torch.where(reference.unlabelled(log_q)[:, None], 0, grad_kl)

    if REDUCTIONS[reduction] == "mean":
        ce_scale, kl_scale = grad_loss.double() / totals
    else:
        ce_scale = kl_scale = grad_loss.double()
    if REDUCTIONS[reduction] == "none":
        ce_scale = kl_scale = ce_scale[:, None]
    grad = torch.zeros_like(grad_kl)
    if ce_weight > 0:
        grad = grad + ce_weight * ce_scale * grad_ce
    if kl_weight > 0:
        grad = grad + kl_weight * kl_scale * grad_kl
    grad = torch.where(known, torch.where(exists, grad, 0), float("nan"))
    return torch.where(live, grad, 0)
