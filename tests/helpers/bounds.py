"""How far a loss, its terms and its gradients may lie from the definition's, number by number.

Every backend is held to a good evaluation in the accumulation type, no better and no worse. Let
``eps`` be half a unit in the last place of that type: 2**-24, or 2**-53 for float64. The terms of a
row may err by 16 eps times

    ce:    1 + |CE|
    kl:    1 + sum over c of q_c (|log q_c| + |log p_c|)

and the gradient of a class by 16 eps times

    of ce:         p1_c (1 + |log p1_c|) + [c = y],  p1 = softmax(z)
    of T**2 * kl:  T (p_c (1 + |log p_c|) + q_c (1 + |log q_c|))

The terms of the other divergences are likewise counted with their logarithms apart: with
``m = beta q + (1 - beta) p``, those of the reverse KL are ``p_c (|log p_c| + |log q_c|)``, of JS
``beta q_c (|log q_c| + |log m_c|)`` and ``(1 - beta) p_c (|log p_c| + |log m_c|)``; and the
gradient of a class is ``T p_c`` times what is subtracted there, of its own and of the mean over
``p``. A row's weight is a factor of all of these.

Each part has its weight, and the smallest normal number comes on top. These are relative to the
terms that are subtracted, not to what is left of them: where q is almost p, or p_y almost 1, digits
cancel.

What is computed before the row loss errs too: teacher logits made of statistics by
``8 eps (1 / tau + |t_c|)``, statistics made of explanations by 2e-6 of their norm (1e-12 in
float64), the logits of a head by ``4 eps`` of the sum of their products' sizes. The row loss passes
such errors on by its derivatives.

A head of half features and a weight of the same type has its products in that type, accumulated in
float32. Features and weight are as they are, so that logits are no less precise; squares and
products with the target's weight are rounded once, which leaves statistics an error of 2**-8 of
their norm in bfloat16 and 2**-11 in float16; and so is the gradient of the logits, of which the
gradients of features and weight are made. Other mixtures have their products in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import introkernels as ik
from helpers.cases import HEADS, Case
from helpers.tolerance import computed_precision
from introkernels import teachers

reference = ik.reference


class Bounds(NamedTuple):
    """The largest errors of a result: float64, in the shapes of what they bound."""

    loss: Tensor
    ce: Tensor
    kl: Tensor
    grads: dict[str, Tensor]


class _Rows(NamedTuple):
    """The row loss of a case in float64, and by how much its arguments may be off."""

    logits: Tensor
    teacher_logits: Tensor
    target: Tensor
    weight: Tensor | None
    row_weight: Tensor | None
    logits_error: Tensor
    teacher_error: Tensor


def bounds_of(case: Case, grad_loss: Tensor | None) -> Bounds:
    """The bounds of a case under the incoming gradient that :func:`oracle.evaluate` was given."""
    dtype = case[case.differentiable[0]].dtype
    info = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    eps = info.eps / 2
    exact = case.upcast()
    keywords = {**_DEFAULTS, **exact.keywords}
    temperature, smoothing = keywords["temperature"], keywords["label_smoothing"]
    reduction = keywords["reduction"]
    rounding = _rounding_of_factors(case)
    rows = _rows_of(exact, keywords, eps, max(computed_precision(dtype), rounding))

    num_classes = rows.logits.shape[1]
    is_target, live = rows.target.double(), torch.ones(len(rows.logits), dtype=torch.bool)
    if not rows.target.is_floating_point():
        live = rows.target != keywords["ignore_index"]
        is_target = (rows.target[:, None] == torch.arange(num_classes)).double()
    of_row = torch.where(live, 1.0 if rows.row_weight is None else rows.row_weight, 0)
    exists = rows.logits != float("-inf")
    log_p1 = _log_softmax(rows.logits, exists)
    log_p = _log_softmax(rows.logits / temperature, exists)
    log_q = _log_softmax(rows.teacher_logits / temperature, exists)
    p1, p, q = log_p1.exp(), log_p.exp(), log_q.exp()
    size_p1, size_p, size_q = (
        torch.where(exists & (log != float("-inf")), log.abs(), 0) for log in (log_p1, log_p, log_q)
    )

    ones = torch.ones(num_classes, dtype=torch.float64)
    weight = ones if rows.weight is None else rows.weight
    share = smoothing / exists.sum(1, keepdim=True).clamp(min=1)
    # What each class's surprise is multiplied by, and the sum of these in a row.
    of_class = ((1 - smoothing) * is_target + share * exists) * weight
    of_all = of_class.sum(1, keepdim=True)

    ce = 16 * eps * (of_class * (1 + size_p1)).sum(1)
    grad_ce = 16 * eps * (of_all * p1 * (1 + size_p1) + of_class)

    dz, dt = rows.logits_error, rows.teacher_error
    ce = ce + (of_all * (p1 + is_target) * dz).sum(1)
    grad_ce = grad_ce + of_all * _moved(p1, dz)
    if keywords["divergence"] == "forward_kl":
        kl = 16 * eps * (1 + (q * (size_q + size_p)).sum(1))
        grad_kl = 16 * eps * temperature * (p * (1 + size_p) + q * (1 + size_q))
        distance = torch.where((q > 0) & exists, log_q - log_p, 0)
        level = (q * distance).sum(1, keepdim=True)
        kl = kl + ((p + q) * dz + q * (distance - level).abs() * dt).sum(1) / temperature
        grad_kl = grad_kl + _moved(p, dz) + _moved(q, dt)
    else:
        log_m, beta = log_q, 0.0
        if keywords["divergence"] == "js":
            beta = keywords["beta"]
            log_m = (beta * q + (1 - beta) * p).log()
        size_m = torch.where(exists & (log_m != float("-inf")), log_m.abs(), 0)
        of_p = (1 - beta) * (size_p + size_m)
        mean = (p * of_p).sum(1, keepdim=True)
        kl = 16 * eps * (1 + mean[:, 0] + beta * (q * (size_q + size_m)).sum(1))
        grad_kl = 16 * eps * temperature * p * (1 + of_p + mean)
        # No derivative of what is subtracted exceeds 1, and none of p itself p.
        moved = dz + dt + ((p + q) * (dz + dt)).sum(1, keepdim=True)
        kl = kl + (p * (1 + of_p) * moved).sum(1) / temperature
        grad_kl = grad_kl + p * (1 + of_p + mean) * moved

    ce, kl = (torch.where(live, of_row * bound, 0) for bound in (ce, kl))
    ce_scale = kl_scale = torch.ones((), dtype=torch.float64)
    if reduction == "mean":
        mixed = rows.target.is_floating_point()
        target_weight = of_row if mixed else of_row * torch.where(is_target > 0, weight, 0).sum(1)
        ce_scale, kl_scale = 1 / target_weight.sum().abs(), 1 / of_row.sum()
    if reduction != "none":
        ce, kl = ce.sum() * ce_scale, kl.sum() * kl_scale
    incoming = (
        torch.ones_like(ce) if grad_loss is None else grad_loss.double().abs().reshape(ce.shape)
    )
    by_row = incoming[:, None] if reduction == "none" else incoming
    # A divergence that is switched off can't spoil a loss, whatever it is.
    of_kl = keywords["kl_weight"] * temperature**2 * kl if keywords["kl_weight"] > 0 else 0.0
    grad = keywords["ce_weight"] * ce_scale * grad_ce
    if keywords["kl_weight"] > 0:
        grad = grad + keywords["kl_weight"] * kl_scale * grad_kl
    grad = by_row * of_row[:, None] * grad
    grad = torch.where(live[:, None] & exists, grad, 0) + info.smallest_normal
    loss = keywords["ce_weight"] * ce + of_kl
    loss, ce, kl = (bound + info.smallest_normal for bound in (loss, ce, kl))
    if case.function not in HEADS:
        return Bounds(loss, ce, kl, {"logits": grad})
    shape = case["target"].shape if reduction == "none" else ()
    loss, ce, kl = (bound.reshape(shape) for bound in (loss, ce, kl))
    return Bounds(loss, ce, kl, _head_bounds(exact, grad, by_row, keywords, (eps, rounding)))


_DEFAULTS = {
    "temperature": 4.0,
    "similarity_temperature": 1.0,
    "ce_weight": 0.7,
    "kl_weight": 0.3,
    "similarity": "cosine",
    "label_mode": "softmax",
    "non_target_mass": 0.1,
    "center": False,
    "ignore_index": -100,
    "label_smoothing": 0.0,
    "reduction": "mean",
    "divergence": "forward_kl",
    "beta": 0.5,
}


_OF_LABELS = ("similarity_temperature", "similarity", "label_mode", "non_target_mass", "center")


def _rounding_of_factors(case: Case) -> float:
    """What rounding once may change in a factor of a head's products; 0 where none is rounded."""
    if case.function not in HEADS:
        return 0.0
    dtype = case["features"].dtype
    if dtype not in (torch.bfloat16, torch.float16) or case["weight"].dtype != dtype:
        return 0.0
    return torch.finfo(dtype).eps / 2


def _rows_of(case: Case, keywords: dict[str, object], eps: float, precision: float) -> _Rows:
    """The row loss of a case in float64; ``precision`` is that of statistics of explanations."""
    if case.function in HEADS:
        head, case = case, _spelt_out(case, keywords["ignore_index"])
        features = head["features"].reshape(case.rows, head["features"].shape[-1])
        logits_error = 4 * eps * F.linear(features.abs(), head["weight"].abs())
    else:
        logits_error = torch.zeros_like(case["logits"])
    logits, target = case["logits"], case["target"]
    weights = case.keywords.get("weight"), case.keywords.get("row_weight")
    if case.function == "distillation_loss":
        teacher = case["teacher_logits"]
        return _Rows(logits, teacher, target, *weights, logits_error, torch.zeros_like(logits))
    is_given = case.function == "similarity_loss"
    if is_given:
        stats = ik.ExplanationStats(case["dots"], case["sq_norms"], case.tensors["stats_index"])
    else:
        stats = reference.explanation_stats(
            case["gradients"],
            case["inputs"],
            target,
            center=keywords["center"],
            class_index=case.keywords.get("class_index"),
            ignore_index=keywords["ignore_index"],
        )
    names = ("temperature", "similarity_temperature", "similarity", "label_mode")
    labels = {name: keywords[name] for name in (*names, "non_target_mass", "ignore_index")}
    teacher = reference.teacher_logits(stats, target, **labels)
    teacher = teachers.among_all(teacher, stats.class_index, logits.shape[1])
    error = _similarity_error(stats, target, keywords["similarity"], 0.0 if is_given else precision)
    tau = keywords["similarity_temperature"]
    size = torch.where(teacher.isfinite(), teacher.abs(), 0)
    # The logits of one label hang on the similarities of all, but for a softmax over them.
    of_others = error.amax(1, keepdim=True)
    if stats.class_index is not None or keywords["label_mode"] == "split":
        error = 2 * of_others
    teacher_error = 8 * eps * (1 / tau + size) + error / tau
    return _Rows(logits, teacher, target, *weights, logits_error, teacher_error)


def _similarity_error(
    stats: ik.ExplanationStats, target: Tensor, similarity: str, precision: float
) -> Tensor:
    """By how much similarities may be off, of statistics whose rows have this ``precision``."""
    classes = torch.arange(stats.dots.shape[1]) if stats.class_index is None else stats.class_index
    if target.is_floating_point():
        is_target = torch.zeros_like(stats.dots, dtype=torch.bool)
        of_target = (teachers.at_explained(target, stats.class_index) * stats.dots).sum(1, True)
    else:
        is_target = target[:, None] == classes
        of_target = torch.where(is_target, stats.sq_norms, 0).sum(1, keepdim=True)
    dots_error, norms_error = (
        precision * values.norm(dim=1, keepdim=True) for values in (stats.dots, stats.sq_norms)
    )
    norms = stats.sq_norms if similarity == "cosine" else of_target
    error = dots_error / (norms * of_target).sqrt() + norms_error * (1 / norms + 1 / of_target)
    # Similarities lie within [-1, 1], whatever the statistics; without a norm they are 0.
    return torch.where(is_target, 0, error.nan_to_num(precision, posinf=2).clamp(max=2))


def _spelt_out(case: Case, ignore_index: object) -> Case:
    """A head as the loss of its logits, explained at the features."""
    features = case["features"].reshape(case.rows, case["weight"].shape[1])
    target = case["target"].reshape(-1)
    features = torch.where((target != ignore_index)[:, None], features, 0)
    row_weight = case.keywords.get("row_weight")
    weights = {
        "weight": case.keywords.get("class_weight"),
        "row_weight": None if row_weight is None else row_weight.reshape(-1),
    }
    logits = F.linear(features, case["weight"], case.tensors["bias"])
    if case.function == "linear_distillation_loss":
        teacher = case["teacher_logits"].reshape(logits.shape)
        tensors = {"logits": logits, "teacher_logits": teacher, "target": target}
        return Case("distillation_loss", tensors, weights)
    return Case(
        "introspective_loss",
        {
            "logits": logits,
            "target": target,
            "gradients": case["weight"].expand(case.rows, -1, -1),
            "inputs": features,
        },
        weights,
    )


def _head_bounds(
    case: Case,
    grad: Tensor,
    by_row: Tensor,
    keywords: dict[str, object],
    errors: tuple[float, float],
) -> dict[str, Tensor]:
    """The bounds of a head's gradients: those of its logits, and what the products lose.

    ``errors`` are those of accumulating and of rounding factors.
    """
    eps, rounding = errors
    spelt_out = _spelt_out(case, keywords["ignore_index"])
    live = (spelt_out["target"] != keywords["ignore_index"])[:, None]
    features = case["features"].reshape(len(live), case["features"].shape[-1])
    features = torch.where(live, features, 0).abs()
    weight = case["weight"].abs()
    logits = spelt_out["logits"].detach().requires_grad_()
    # The gradient of the logits itself, of which the products add up sizes.
    of_head = {name: keywords[name] for name in keywords if name != "class_weight"}
    if spelt_out.function == "distillation_loss":
        of_head = {name: value for name, value in of_head.items() if name not in _OF_LABELS}
    loss = getattr(reference, spelt_out.function)(
        *spelt_out.with_tensors(logits=logits).arguments(), **{**of_head, **spelt_out.keywords}
    )
    incoming = by_row[:, 0] if loss.dim() else by_row
    (exact,) = torch.autograd.grad(loss, logits, incoming)
    exact = torch.where(exact.isfinite(), exact, 0).abs()
    sizes = grad + 4 * eps * exact
    factors = sizes + rounding * (exact + grad)
    bounds = {
        "features": (factors @ weight).reshape(case["features"].shape),
        "weight": factors.mT @ features,
        "bias": sizes.sum(0),
    }
    return {name: bounds[name] for name in case.differentiable}


def _log_softmax(values: Tensor, exists: Tensor) -> Tensor:
    """``log_softmax`` over the classes that exist; -inf for others, in rows without any too."""
    top = torch.where(exists, values, 0).amax(1, keepdim=True)
    log_softmax = torch.log_softmax(torch.where(exists, values, float("-inf")) - top, 1)
    return torch.where(exists, log_softmax, float("-inf"))


def _moved(p: Tensor, error: Tensor) -> Tensor:
    """By how much a softmax may move where its logits are off by ``error``."""
    moved = p * (error + (p * error).sum(1, keepdim=True))
    return torch.where(p == 0, 0, moved)
