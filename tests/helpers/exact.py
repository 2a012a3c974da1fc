"""The mathematics of one row in 50 digits and plain Python, written from the formulas alone.

It shares no code with the package and knows nothing of tensors, so it can tell whether the float64
definition is right, and how much of it is left where float64 itself cancels. Numbers come in as
Python floats, which hold any tensor's values exactly, and -inf marks a class that does not exist.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mpmath

mpmath.mp.dps = 50

Number = mpmath.mpf


@dataclass(frozen=True)
class Row:
    """One row's loss, its terms, and the loss's gradient in the logits."""

    loss: float
    ce: float
    kl: float
    grad: list[float]


def explanation_stats(
    gradients: Sequence[Sequence[float]], inputs: Sequence[float], target: int, center: bool
) -> tuple[list[float], list[float]]:
    """``<E_c, E_y>`` and ``<E_c, E_c>`` with ``E_c = g_c * x``, less their mean with ``center``."""
    explanations = [
        [Number(g) * Number(x) for g, x in zip(gradient, inputs, strict=True)]
        for gradient in gradients
    ]
    if center:
        mean = [
            mpmath.fsum(column) / len(explanations) for column in zip(*explanations, strict=True)
        ]
        explanations = [
            [e - m for e, m in zip(explanation, mean, strict=True)] for explanation in explanations
        ]
    of_target = explanations[target]
    dots = [mpmath.fdot(explanation, of_target) for explanation in explanations]
    sq_norms = [mpmath.fdot(explanation, explanation) for explanation in explanations]
    return [float(d) for d in dots], [float(n) for n in sq_norms]


def softmax(values: Sequence[Number]) -> list[Number]:
    """Softmax; 0 at -inf, and all 0 where every value is -inf."""
    top = max(values)
    if top == -mpmath.inf:
        return [Number(0)] * len(values)
    powers = [mpmath.exp(v - top) if v != -mpmath.inf else Number(0) for v in values]
    total = mpmath.fsum(powers)
    return [power / total for power in powers]


def soft_labels(
    dots: Sequence[float],
    sq_norms: Sequence[float],
    target: int,
    *,
    temperature: float,
    similarity_temperature: float = 1.0,
    similarity: str = "cosine",
    label_mode: str = "softmax",
    non_target_mass: float = 0.1,
) -> list[Number]:
    """``q`` over the classes of ``dots``, of which ``target`` is a position."""
    teacher = []
    for c, (dot, sq_norm) in enumerate(zip(dots, sq_norms, strict=True)):
        square = Number(sq_norms[target])
        scale = mpmath.sqrt(Number(sq_norm) * square) if similarity == "cosine" else square
        s = min(max(Number(dot) / scale, Number(-1)), Number(1)) if scale else Number(0)
        s = Number(1) if c == target else s
        teacher.append(s / Number(similarity_temperature) / Number(temperature))
    if label_mode == "softmax":
        return softmax(teacher)
    others = [-mpmath.inf if c == target else t for c, t in enumerate(teacher)]
    # A class without others has all of the mass.
    mass = Number(non_target_mass) if len(dots) > 1 else Number(0)
    q = [mass * share for share in softmax(others)]
    q[target] = 1 - mass
    return q


def teacher_labels(
    teacher_logits: Sequence[float], temperature: float, exists: Sequence[bool]
) -> list[Number]:
    """``softmax(t / T)`` over the classes that exist."""
    return softmax(
        [
            Number(t) / Number(temperature) if there else -mpmath.inf
            for t, there in zip(teacher_logits, exists, strict=True)
        ]
    )


def row(
    logits: Sequence[float],
    q: Sequence[Number],
    target: int,
    *,
    temperature: float = 4.0,
    ce_weight: float = 0.7,
    kl_weight: float = 0.3,
    weight: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
) -> Row:
    """``ce_weight * CE + kl_weight * T**2 * KL(q || softmax(z / T))`` of one row, unreduced."""
    z = [Number(value) for value in logits]
    T = Number(temperature)
    exists = [not math.isinf(value) or value > 0 for value in logits]
    factors = [Number(w) for w in weight] if weight is not None else [Number(1)] * len(z)
    p = softmax(z)
    p_soft = softmax([value / T for value in z])
    smoothing = Number(label_smoothing)
    share = smoothing / max(sum(exists), 1)
    # F.cross_entropy is the divergence from these, unnormalised with class weights.
    hard = [
        (factors[c] * ((1 - smoothing) * (c == target) + share) if exists[c] else Number(0))
        for c in range(len(z))
    ]
    ce = mpmath.fsum(-h * _log_p(z, c) for c, h in enumerate(hard) if h)
    if not exists[target]:
        ce = mpmath.inf
    z_soft = [value / T for value in z]
    kl = mpmath.fsum(
        share * (mpmath.log(share) - _log_p(z_soft, c)) for c, share in enumerate(q) if share
    )
    # A target that does not exist still pushes the other classes down, as in F.cross_entropy.
    total = mpmath.fsum(hard) + (0 if exists[target] else factors[target] * (1 - smoothing))
    grad = [
        Number(ce_weight) * (total * p[c] - hard[c]) + Number(kl_weight) * T * (p_soft[c] - q[c])
        if exists[c]
        else Number(0)
        for c in range(len(z))
    ]
    loss = Number(kl_weight) * T**2 * kl + (Number(ce_weight) * ce if ce_weight else 0)
    return Row(float(loss), float(ce), float(kl), [float(g) for g in grad])


def _log_p(z: Sequence[Number], c: int) -> Number:
    top = max(z)
    total = mpmath.fsum(mpmath.exp(v - top) for v in z if v != -mpmath.inf)
    return z[c] - top - mpmath.log(total)
