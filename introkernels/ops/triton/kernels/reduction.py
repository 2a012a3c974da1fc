"""From rows to the loss: the last program of a launch adds up what all of them found."""

import triton
import triton.language as tl

from introkernels.ops.triton.kernels.rows import ROW_STATE, in_lanes

# Codes of introkernels/ops/schema.py.
REDUCTION_NONE = tl.constexpr(0)
REDUCTION_MEAN = tl.constexpr(1)


@triton.jit
def is_last_to_arrive(counter, num_programs):
    """Whether this program is the last of ``num_programs`` to get here.

    What the others stored before is then visible to this one's loads with ``.cg``. The counter
    starts at 0.
    """
    # All threads of the program have stored before one of them says so.
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == num_programs - 1


@triton.jit
def _store_loss(outputs, place, ce, kl, mask, temperature, ce_weight, kl_weight):
    """Write ``ce_weight * ce + kl_weight * T^2 * kl``, ce and kl to ``place`` of the outputs."""
    loss, ce_out, kl_out = outputs
    # A term that is switched off can't spoil a row: 0 * inf would be NaN.
    of_ce = tl.where(ce_weight > 0, ce_weight * ce, 0)
    of_kl = tl.where(kl_weight > 0, kl_weight * temperature * temperature * kl, 0)
    tl.store(loss + place, of_ce + of_kl, mask=mask)
    tl.store(ce_out + place, ce, mask=mask)
    tl.store(kl_out + place, kl, mask=mask)


@triton.jit
def _sums_of_programs(sums, num_programs, BLOCK: tl.constexpr):
    """The four sums of ``sums [4, num_programs]``, in an order that only their number decides."""
    # All four on their way from memory at a time.
    stride = tl.full((), num_programs, tl.int64)
    ce = tl.zeros((BLOCK,), tl.float64)
    kl, weights, live = ce, ce, ce
    for begin in range(0, num_programs, BLOCK):
        program = begin + tl.arange(0, BLOCK)
        of_ce, mask = sums + program, program < num_programs
        ce += tl.load(of_ce, mask=mask, other=0.0, cache_modifier=".cg")
        kl += tl.load(of_ce + stride, mask=mask, other=0.0, cache_modifier=".cg")
        weights += tl.load(of_ce + 2 * stride, mask=mask, other=0.0, cache_modifier=".cg")
        live += tl.load(of_ce + 3 * stride, mask=mask, other=0.0, cache_modifier=".cg")
    return tl.sum(ce, 0), tl.sum(kl, 0), tl.sum(weights, 0), tl.sum(live, 0)


@triton.jit
def finish_losses(
    ce,
    kl,
    target_weight,
    live,
    rows,
    num_rows,
    outputs,
    state,
    sums,
    counter,
    program,
    num_programs,
    temperature,
    ce_weight,
    kl_weight,
    REDUCTION: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Hand in the terms of this program's rows; the last program reduces those of all.

    ``ce``, ``kl`` and ``target_weight`` are ``[R]``, 0 in rows that are not ``live``, which are
    ignored. ``outputs`` are loss, ce and kl. Each of ``num_programs`` programs calls this once and
    leaves its own sums in ``sums [4, num_programs]`` float64.
    """
    temperature = tl.full((), temperature, ce.dtype)
    ce_weight = tl.full((), ce_weight, ce.dtype)
    kl_weight = tl.full((), kl_weight, ce.dtype)
    if REDUCTION == REDUCTION_NONE:
        mask = rows < num_rows
        _store_loss(outputs, rows, ce, kl, mask, temperature, ce_weight, kl_weight)
    # The four sums of all programs may be more numbers than 32 bits count.
    stride = tl.full((), num_programs, tl.int64)
    terms = ce, kl, target_weight, tl.where(live, 1.0, 0.0).to(ce.dtype)
    for first in tl.static_range(0, 4, LANES):
        term = first + tl.arange(0, LANES)
        of_rows = in_lanes(terms, first, LANES).to(tl.float64)
        tl.store(sums + program + term * stride, tl.sum(of_rows, 0), mask=term < 4)
    if is_last_to_arrive(counter, num_programs):
        ce_sum, kl_sum, weight_sum, num_live = _sums_of_programs(sums, num_programs, BLOCK)
        # As in F.cross_entropy, where label smoothing would make an infinity of it.
        weight_sum = tl.where(weight_sum == 0, float("nan"), weight_sum)
        totals = state + tl.full((), num_rows, tl.int64) * ROW_STATE
        tl.store(totals, weight_sum)
        tl.store(totals + 1, num_live)
        if REDUCTION != REDUCTION_NONE:
            if REDUCTION == REDUCTION_MEAN:
                ce_sum /= weight_sum
                kl_sum /= num_live
            _store_loss(outputs, 0, ce_sum, kl_sum, None, temperature, ce_weight, kl_weight)
