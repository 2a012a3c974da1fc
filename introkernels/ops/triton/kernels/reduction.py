"""From rows to the loss: the last program of a launch adds up what all of them found."""

import triton
import triton.language as tl

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
def _sum_of_rows(terms, num_rows, BLOCK: tl.constexpr):
    """The sum of ``terms [B]`` float64, in an order that only B decides."""
    total = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, num_rows, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        total += tl.load(terms + row, mask=row < num_rows, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def total_weight(sum_of_target_weights):
    """What the mean of the cross entropy is divided by: NaN where the weights sum to 0.

    ``F.cross_entropy`` has it so; label smoothing would make an infinity of it.
    """
    return tl.where(sum_of_target_weights == 0, float("nan"), sum_of_target_weights)


@triton.jit
def finish_losses(
    ce,
    kl,
    target_weight,
    live,
    rows,
    num_rows,
    outputs,
    terms,
    totals,
    counter,
    num_programs,
    temperature,
    ce_weight,
    kl_weight,
    REDUCTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Hand in the terms of this program's rows; the last program reduces those of all.

    ``ce``, ``kl`` and ``target_weight`` are ``[R]``, 0 in rows that are not ``live``, which are
    ignored. ``outputs`` are loss, ce and kl. Each of ``num_programs`` programs calls this once and
    leaves its rows in ``terms [4, B]`` float64, from which the last one reads 32 bytes a row.
    """
    mask = rows < num_rows
    # The four terms of a batch may be more numbers than 32 bits count.
    num_rows = tl.full((), num_rows, tl.int64)
    ce, kl = ce.to(tl.float64), kl.to(tl.float64)
    if REDUCTION == REDUCTION_NONE:
        _store_loss(outputs, rows, ce, kl, mask, temperature, ce_weight, kl_weight)
    tl.store(terms + rows, ce, mask=mask)
    tl.store(terms + num_rows + rows, kl, mask=mask)
    tl.store(terms + 2 * num_rows + rows, target_weight.to(tl.float64), mask=mask)
    tl.store(terms + 3 * num_rows + rows, tl.where(live, 1.0, 0.0).to(tl.float64), mask=mask)
    if is_last_to_arrive(counter, num_programs):
        weight_sum = total_weight(_sum_of_rows(terms + 2 * num_rows, num_rows, BLOCK))
        num_live = _sum_of_rows(terms + 3 * num_rows, num_rows, BLOCK)
        tl.store(totals, weight_sum)
        tl.store(totals + 1, num_live)
        if REDUCTION != REDUCTION_NONE:
            ce_sum = _sum_of_rows(terms, num_rows, BLOCK)
            kl_sum = _sum_of_rows(terms + num_rows, num_rows, BLOCK)
            if REDUCTION == REDUCTION_MEAN:
                ce_sum /= weight_sum
                kl_sum /= num_live
            _store_loss(outputs, 0, ce_sum, kl_sum, None, temperature, ce_weight, kl_weight)
