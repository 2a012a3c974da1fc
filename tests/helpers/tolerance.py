"""How far a result may lie from the oracle's, and why.

Errors are relative in the Frobenius norm, ``|out - ref| / |ref|``, against float64 on the same
inputs. Results in float64 may be off by 1e-12 and in float32 by 2e-6: their units in the last place
are 2e-16 and 1.2e-7, and the sums and exponentials of a row lose about a decimal digit of these.
A result in a half type is computed in float32 and rounded once: on top of the 2e-6 each number may
be off by half of its last place, which is ``eps / 2`` of it, or half of the smallest subnormal
number where it is subnormal (gradients of a mean over many rows are, in float16).
"""

from __future__ import annotations

import torch
from torch import Tensor

_COMPUTED = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 2e-6,
    torch.float16: 2e-6,
}
_HALF_TYPES = (torch.bfloat16, torch.float16)


def computed_precision(dtype: torch.dtype) -> float:
    """The relative error allowed before a result in ``dtype`` is rounded to it."""
    return _COMPUTED[dtype]


def allowed_error(dtype: torch.dtype, reference: Tensor, factor: float = 1.0) -> float:
    """The largest ``|out - reference|`` of a result in ``dtype``.

    ``factor`` scales what computation may lose, for ill-conditioned cases: how much larger the
    relative error of the exact result is than that of the numbers it is made of.
    """
    reference = reference.double()
    computed = factor * _COMPUTED[dtype] * float(reference.norm())
    if dtype not in _HALF_TYPES:
        return computed
    info = torch.finfo(dtype)
    half_a_last_place = torch.clamp(
        reference.abs() * (info.eps / 2), min=info.smallest_normal * info.eps / 2
    )
    # A number whose oracle is exactly zero (masked, ignored) has nothing to round.
    rounded = torch.where(reference == 0, 0, half_a_last_place)
    return computed + float(rounded.norm())


def error_of(actual: Tensor, reference: Tensor) -> float:
    """``|actual - reference|``, where equal infinities and two NaNs count as equal."""
    actual, reference = actual.detach().double(), reference.detach().double()
    same = (actual == reference) | (actual.isnan() & reference.isnan())
    return float(torch.where(same, 0, actual - reference).norm())


def assert_accurate(
    actual: Tensor,
    reference: Tensor,
    what: str = "result",
    *,
    factor: float = 1.0,
    slack: float = 0.0,
) -> None:
    """Fail unless ``actual`` is as near to the float64 ``reference`` as its dtype allows.

    Infinities and NaNs have to stand where the reference has them. ``slack`` is an absolute error
    granted on top.
    """
    assert actual.shape == reference.shape, (
        f"{what}: shape {list(actual.shape)}, oracle {list(reference.shape)}"
    )
    finite = reference.isfinite()
    assert torch.equal(actual.isnan(), reference.isnan()), f"{what}: NaN in other places"
    assert torch.equal(actual.isfinite(), finite), f"{what}: infinite in other places"
    error = error_of(actual, reference)
    allowed = allowed_error(actual.dtype, torch.where(finite, reference, 0), factor) + slack
    size = float(torch.where(finite, reference, 0).double().norm())
    assert error <= allowed, (
        f"{what} in {actual.dtype}: |out - ref| = {error:.3e} where {allowed:.3e} is allowed, "
        f"|ref| = {size:.3e}, relative {error / size if size else float('inf'):.3e}"
    )


def assert_within(actual: Tensor, reference: Tensor, bound: Tensor, what: str) -> None:
    """Fail unless every number is within its ``bound``, and one rounding, of the ``reference``.

    Infinities and NaNs have to stand where the reference has them. The rounding is that to the
    dtype of ``actual``, half a unit in the last place.
    """
    assert actual.shape == reference.shape, (
        f"{what}: shape {list(actual.shape)}, oracle {list(reference.shape)}"
    )
    actual, reference, dtype = actual.double(), reference.double(), actual.dtype
    finite = reference.isfinite()
    same = (actual == reference) | (actual.isnan() & reference.isnan())
    info = torch.finfo(dtype)
    rounding = torch.clamp(
        reference.abs() * (info.eps / 2), min=info.smallest_normal * info.eps / 2
    )
    rounding = torch.where(reference == 0, 0, rounding) if dtype in _HALF_TYPES else 0
    error = torch.where(same, 0, (actual - reference).abs())
    share = error / (bound + rounding)
    wrong = torch.where(finite, ~(error <= bound + rounding), ~same)
    if wrong.any():
        worst = torch.where(wrong, share.nan_to_num(float("inf")), -1).argmax()
        got, expected, allowed = (
            float(values.expand_as(wrong).reshape(-1)[worst])
            for values in (actual, reference, bound + rounding)
        )
        raise AssertionError(
            f"{what} in {dtype}: {int(wrong.sum())} of {wrong.numel()} numbers are off; the "
            f"worst, number {int(worst)}, is {got!r} where {expected!r} ± {allowed:.3e} is right"
        )


def assert_rows_accurate(actual: Tensor, reference: Tensor, what: str = "result") -> None:
    """Hold every row to the accuracy that `assert_accurate` asks of the whole."""
    assert actual.shape == reference.shape
    for row, (of_row, expected) in enumerate(zip(actual, reference, strict=True)):
        assert_accurate(of_row, expected, f"{what} of row {row}")
