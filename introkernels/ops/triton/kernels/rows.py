"""The loss of rows and its gradient, tile by tile: what every loss kernel shares.

A tile is ``[R, N]``: N classes of R rows. ``z`` are logits, ``t`` teacher logits. A class whose
logit is -inf does not exist: it has no probability, no soft label and no part in label smoothing.
A teacher logit of -inf means that the class has no soft label.

Each tile is read once. A tile knows its own sums before it computes its part of the divergence,
and what came before is brought to the new norms by the chain rule of KL: with ``f_q`` and ``f_p``
the shares of the old classes under the new norms, and ``d = log(f_q / f_p)``,

    sum over old classes of q' log(q' / p') = f_q * sum(q log(q / p)) + f_q * d * sum(q).

Written for parts ``q d - (q - p)``, which are never negative, nothing in it cancels.

Logits are held as quarters of themselves, so that no difference of two of them overflows.
"""

import triton
import triton.language as tl

from introkernels.ops.triton.kernels.math import (
    LOG2_E,
    NEVER,
    divergence_of_pair,
    expm1,
    log1p,
    log_ratio_of,
    minus_difference_of_pair,
)


@triton.jit
def no_classes(R: tl.constexpr, dtype: tl.constexpr):
    """The state of R rows of which nothing was seen yet, each ``[R]``.

    - a quarter of the largest logit; sum over all classes but the target of ``exp(z - max)``; sum
      of ``exp((z - max) / T)``
    - a quarter of the largest teacher logit; sum of ``exp((t - max) / T)``
    - ``shift``: ``log q - log p = ((t - t_max) - (z - z_max)) / T - shift``
    - sums over the classes of ``q d - (q - p)`` and of ``q - p``
    - number of classes that exist, their weights, and the sum of ``weight * (max - z)``
    """
    never = tl.full((R,), NEVER, dtype)
    zero = tl.zeros((R,), dtype)
    return never, zero, zero, never, zero, zero, zero, zero, zero, zero, zero


@triton.jit
def _reference(largest):
    """The number that exponents are taken relative to: 0 where there is no class."""
    return tl.where(largest == NEVER, 0, largest)


@triton.jit
def add_tile(
    state, z, t, is_target, weight, inverse_temperature, WEIGHTED: tl.constexpr, EXACT: tl.constexpr
):
    """The state with a tile added. Beyond the last class the tile holds logits of -inf.

    ``inverse_temperature`` is a float64 tensor. ``weight`` is ``[1, N]`` and read with ``WEIGHTED``
    only, which also says that the numbers for class weights and label smoothing are wanted.
    """
    (z_max, others, z_sum, t_max, t_sum, shift, divergence, excess, count, weights, below) = state
    # Of quarters.
    factor = (inverse_temperature * 4).to(z.dtype)
    exponent_t = (inverse_temperature * (4 * LOG2_E)).to(z.dtype)
    t = tl.where(z == NEVER, NEVER, t * 0.25)
    z = z * 0.25

    new_z_max = tl.maximum(z_max, tl.max(z, 1))
    new_t_max = tl.maximum(t_max, tl.max(t, 1))
    z_top, t_top = _reference(new_z_max), _reference(new_t_max)
    old_z_sum = z_sum * tl.exp2((z_max - z_top) * exponent_t)
    old_t_sum = t_sum * tl.exp2((t_max - t_top) * exponent_t)

    shifted = z - z_top[:, None]
    z_exp = tl.exp2(shifted * (4 * LOG2_E))
    others = others * tl.exp2((z_max - z_top) * (4 * LOG2_E))
    others += tl.sum(tl.where(is_target, 0, z_exp), 1)
    z_exp_t = tl.exp2(shifted * exponent_t)
    t_exp_t = tl.exp2((t - t_top[:, None]) * exponent_t)
    new_z_sum = old_z_sum + tl.sum(z_exp_t, 1)
    new_t_sum = old_t_sum + tl.sum(t_exp_t, 1)
    no_labels, no_class = new_t_sum == 0, new_z_sum == 0
    z_norm = 1 / tl.where(no_class, 1, new_z_sum)
    t_norm = 1 / tl.where(no_labels, 1, new_t_sum)
    # Exactly 0 for equal distributions, whatever a quotient of equal numbers is rounded to.
    no_shift = no_labels | no_class | (new_t_sum == new_z_sum)
    new_shift = tl.where(no_shift, 0, tl.log(new_t_sum * z_norm))

    # The old classes under the new norms, as one class of the sums that they had. Where none of
    # them had a soft label they are one class without it.
    ratio = log_ratio_of(
        tl.where(t_sum == 0, NEVER, t_max),
        _reference(z_max),
        t_top,
        z_top,
        new_shift - shift,
        factor,
        EXACT,
    )
    share_q, share_p = old_t_sum * t_norm, old_z_sum * z_norm
    part, difference = divergence_of_pair(share_q, share_p, ratio)
    # `difference` is share_q - share_p, but with all of its digits.
    divergence = share_q * divergence + part + excess * difference
    excess = difference + share_p * excess

    ratio = log_ratio_of(t, z, t_top[:, None], z_top[:, None], new_shift[:, None], factor, EXACT)
    q, p = t_exp_t * t_norm[:, None], z_exp_t * z_norm[:, None]
    part, difference = divergence_of_pair(q, p, ratio)
    divergence = tl.where(no_labels, 0, divergence + tl.sum(part, 1))
    excess = tl.where(no_labels, 0, excess + tl.sum(difference, 1))

    if WEIGHTED:
        exists = z != NEVER
        # The distance to the largest logit so far: sums of it only grow.
        risen = tl.where(weights == 0, 0, weights * (4 * (z_top - _reference(z_max))))
        below += risen + tl.sum(tl.where(exists, weight * (-4 * shifted), 0), 1)
        count += tl.sum(tl.where(exists, 1.0, 0.0).to(z.dtype), 1)
        weights += tl.sum(tl.where(exists, weight, 0), 1)
    return (
        new_z_max,
        others,
        new_z_sum,
        new_t_max,
        new_t_sum,
        new_shift,
        divergence,
        excess,
        count,
        weights,
        below,
    )


@triton.jit
def finish_rows(
    state,
    z_target,
    weight_target,
    label_smoothing,
    WEIGHTED: tl.constexpr,
    NO_LABELS_IS_NAN: tl.constexpr,
):
    """The two terms of each row, then the nine numbers that its backward needs.

    ``z_target`` and ``weight_target`` are the target's logit and class weight, ``label_smoothing``
    a float64 tensor. The numbers are those of ``RowState`` in csrc/common/row_loss.h.
    """
    (z_max, others, z_sum, t_max, t_sum, shift, divergence, excess, count, weights, below) = state
    z_top, t_top = 4 * _reference(z_max), 4 * _reference(t_max)
    has_target = z_target != NEVER
    at_target = tl.exp(z_target - z_top)
    norm = others + at_target
    log_norm = tl.log(norm)
    # -log p_y as log(1 + others / e_y) keeps its relative precision where p_y is almost 1.
    above_others = at_target > others
    near_one = log1p(tl.where(above_others, others, 0) / tl.where(above_others, at_target, 1))
    nll = tl.where(above_others, near_one, log_norm - (z_target - z_top))
    nll = tl.where(has_target, nll, log_norm)

    ce = weight_target * nll
    share = tl.zeros_like(nll)
    if WEIGHTED:
        smoothing = label_smoothing.to(nll.dtype)
        share = smoothing / tl.where(count == 0, 1, count)
        smooth = (1 - smoothing) * ce + share * (weights * log_norm + below)
        ce = tl.where(smoothing > 0, smooth, ce)
    # The infinity of a target that does not exist comes last, so that no weight of zero turns it
    # into NaN.
    ce = tl.where(has_target, ce, ce + float("inf"))
    ce = tl.where(norm == 0, float("inf"), ce)

    # The excess E tells by how much the shift was off, log(1 + E): taken back,
    # KL = (D + E) / (1 + E) - log(1 + E), and (E / (1 + E) - log(1 + E)) is about -E^2 / 2.
    log_excess = log1p(excess)
    correction = tl.where(
        tl.abs(excess) < 1e-3,
        excess * excess * (-0.5 + excess * (2.0 / 3.0 - 0.75 * excess)),
        excess / (1 + excess) - log_excess,
    )
    kl = divergence / (1 + excess) + correction
    if NO_LABELS_IS_NAN:
        # A teacher that excludes every class is no distribution: as torch's softmax, NaN.
        without_labels = tl.where(norm == 0, 0, float("nan"))
    else:
        without_labels = tl.zeros_like(kl)
    kl = tl.where(t_sum == 0, without_labels, kl)
    shift = tl.where(t_sum == 0, 0, shift + log_excess)
    return ce, kl, (z_top, norm, z_sum, t_top, t_sum, shift, nll, share, weights)


@triton.jit
def gradient_tile(
    row_state,
    z,
    t,
    is_target,
    weight,
    ce_scale,
    ce_scale_target,
    kl_scale,
    inverse_temperature,
    WEIGHTED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """The gradient of a tile's logits, ``[R, N]``.

    ``ce_scale``, ``kl_scale`` and ``ce_scale_target`` (the share of the target alone, its class
    weight included) are ``[R]`` factors of the terms; ``kl_scale`` includes T. A factor of exactly
    0 leaves its term out, whatever it is.
    """
    (z_max, norm, z_sum, t_max, t_sum, shift, nll, share, weights) = row_state
    factor = (inverse_temperature * 4).to(z.dtype)
    exponent_t = (inverse_temperature * (4 * LOG2_E)).to(z.dtype)
    exists = z != NEVER
    t = tl.where(exists, t * 0.25, NEVER)
    z = z * 0.25
    z_top, t_top = (0.25 * z_max)[:, None], (0.25 * t_max)[:, None]
    z_norm = (1 / tl.where(z_sum == 0, 1, z_sum))[:, None]
    t_norm = (1 / tl.where(t_sum == 0, 1, t_sum))[:, None]

    shifted = z - z_top
    ratio = log_ratio_of(t, z, t_top, z_top, shift[:, None], factor, EXACT)
    q = tl.exp2((t - t_top) * exponent_t) * t_norm
    p = tl.exp2(shifted * exponent_t) * z_norm
    of_kl = kl_scale[:, None] * minus_difference_of_pair(q, p, ratio)
    grad = tl.where(kl_scale[:, None] == 0, 0, of_kl)

    p = tl.exp2(shifted * (4 * LOG2_E)) * (1 / tl.where(norm == 0, 1, norm))[:, None]
    # p_y - 1 from the loss itself: the difference would cancel where p_y is almost 1.
    of_ce = ce_scale_target[:, None] * tl.where(is_target, expm1(-nll)[:, None], p)
    if WEIGHTED:
        of_ce += (ce_scale * share)[:, None] * (weights[:, None] * p - weight)
    grad += tl.where(ce_scale[:, None] == 0, 0, of_ce)
    return tl.where(exists, grad, 0)
