"""Functions of numbers and tiles that kernels share, each as precise as its type.

Nothing here calls a device library: the same source serves NVIDIA, AMD and the interpreter.
"""

import triton
import triton.language as tl

NEVER = tl.constexpr(float("-inf"))
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def widened(values, dtype: tl.constexpr):
    """``values`` in the compute type."""
    # From half types to float64 through float32: Triton's interpreter knows no other way.
    if values.dtype.primitive_bitwidth == 16:
        values = values.to(tl.float32)
    return values.to(dtype)


@triton.jit
def exp_rest(x):
    """``exp(x) - 1 - x`` for x in [-1, 1].

    x^2 times the polynomial that interpolates the rest at Chebyshev nodes of the interval; it errs
    by 6e-9 (float32) and 2e-17 (float64) of its value.
    """
    if x.dtype == tl.float64:
        p = x * 7.7461785930188274892e-13 + 1.1639194124150522395e-11
        p = p * x + 1.6057679623801637746e-10
        p = p * x + 2.0874435575864274724e-9
        p = p * x + 2.5052117695907823572e-8
        p = p * x + 2.755733506893372671e-7
        p = p * x + 2.7557319191381816996e-6
        p = p * x + 0.000024801587246096816904
        p = p * x + 0.00019841269841324197917
        p = p * x + 0.0013888888888981404452
        p = p * x + 0.0083333333333332993552
        p = p * x + 0.041666666666666088346
        p = p * x + 0.16666666666666666701
        p = p * x + 0.5000000000000000059
    else:
        p = x * 2.806280258e-6 + 2.535851224e-5
        p = p * x + 0.0001983810197
        p = p * x + 0.001388539691
        p = p * x + 0.008333339676
        p = p * x + 0.0416667366
        p = p * x + 0.1666666665
        p = p * x + 0.4999999978
    return x * x * p


@triton.jit
def expm1(x):
    """``exp(x) - 1``."""
    return tl.where(tl.abs(x) < 1, x + exp_rest(x), tl.exp(x) - 1)


@triton.jit
def log1p(x):
    """``log(1 + x)`` for x >= -1."""
    # What 1 + x loses, dividing by the difference that is left gives back (W. Kahan).
    y = 1 + x
    rounded = y - 1
    return tl.where(rounded == 0, x, tl.log(y) * (x / tl.where(rounded == 0, 1, rounded)))


@triton.jit
def divergence_of_pair(q, p, log_ratio):
    """A class's part of ``KL(q || p)``, and ``q - p``, from both and ``d = log q - log p``.

    The part is ``q d - (q - p)``: as both distributions sum to one, taking ``q - p`` away changes
    nothing in the sum, but makes every part >= 0, so that nothing cancels. Where q and p are close,
    both results are made of p and d alone, ``p (d exp(d) - (exp(d) - 1))`` and ``p (exp(d) - 1)``,
    and keep the relative precision of d.
    """
    is_small = tl.abs(log_ratio) < 1
    rest = exp_rest(log_ratio)
    growth = log_ratio + rest
    part = tl.where(is_small, p * (log_ratio * growth - rest), q * (log_ratio - 1) + p)
    return part, tl.where(is_small, p * growth, q - p)


@triton.jit
def minus_difference_of_pair(q, p, log_ratio):
    """``p - q`` from both and ``log q - log p``, precise also where they are close."""
    return tl.where(tl.abs(log_ratio) < 1, -p * (log_ratio + exp_rest(log_ratio)), p - q)


@triton.jit
def log_ratio_of(t, z, t_max, z_max, shift, inverse_temperature, EXACT: tl.constexpr):
    """``((t - t_max) - (z - z_max)) * inverse_temperature - shift``, a finite number.

    It is precise also where q is almost p, and so the differences of the logits are almost the same
    for all classes. With ``EXACT`` what their rounding loses is kept, in an order in which float32
    can tell. Float64 has digits to spare, and half types need none: float32 holds the differences
    of theirs. A class without a soft label, t = -inf, gets a ratio so low that its q is 0, and so
    does a class that does not exist, of which both are -inf.
    """
    if EXACT:
        difference, difference_of_max = t - z, t_max - z_max
        total = difference - difference_of_max
        rounded = lost(t, z, difference) - lost(t_max, z_max, difference_of_max)
        # An infinite t leaves nothing to keep.
        total += tl.where(tl.abs(total) < float("inf"), rounded, 0)
    else:
        total = (t - t_max) - (z - z_max)
    ratio = total * inverse_temperature - shift
    # Finite, because 0 times infinity is none; NaN turns into the lowest, and its p or q is NaN.
    if ratio.dtype == tl.float64:
        ratio = tl.minimum(tl.maximum(ratio, -1e308), 1e308)
    else:
        ratio = tl.minimum(tl.maximum(ratio, -3e38), 3e38)
    return ratio


@triton.jit
def lost(a, b, difference):
    """What rounding took from ``difference = a - b`` (D. Knuth's two-sum)."""
    minus_b = difference - a
    return (a - (difference - minus_b)) - (b + minus_b)
