"""Times of several functions on one noisy machine: interleaved samples, medians, quartiles.

All members take turns, so that whatever else the machine does hits all of them alike. A sample
is as many calls as last a millisecond or more. Each member gets an equal share of the time budget:
a slow one has fewer samples, spread over the whole measurement.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

SAMPLE_SECONDS = 1e-3
FEWEST_SAMPLES = 3
MOST_SAMPLES = 200
# A call that lasts as long is a sample by itself, and the first one counts.
LONG_SECONDS = 20 * SAMPLE_SECONDS

Clock = Callable[[Callable[[], object], int], float]
"""Calls a function some times, and tells the seconds of one call."""


def wall_clock(call: Callable[[], object], calls: int) -> float:
    """The mean of ``calls`` calls that are over when they return, as those on a CPU are."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


@dataclass(frozen=True)
class Member:
    """A function without arguments to be timed, and what holds while it is called."""

    name: str
    call: Callable[[], object]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Times:
    """Seconds of one call: quartiles, best and worst over the samples; calls in each sample.

    ``worst`` is None where it was not kept.
    """

    median: float
    lower_quartile: float
    upper_quartile: float
    best: float
    samples: int
    calls: int
    worst: float | None = None

    @staticmethod
    def of(samples: Sequence[float], calls: int) -> Times:
        lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
        return Times(median, lower, upper, min(samples), len(samples), calls, max(samples))


def measure(
    members: Sequence[Member],
    budget: float,
    on_share: Callable[[float], None] = lambda share: None,
    clock: Clock = wall_clock,
) -> dict[str, Times]:
    """Time all members within about ``budget`` seconds, but at least three samples of each.

    Every member has to have been called before: first calls may cost more.

    Args:
        on_share: told now and then which share of the work is done, from 0 to 1.
        clock: how the calls of a sample are timed.
    """
    calls: dict[str, int] = {}
    wanted: dict[str, int] = {}
    samples: dict[str, list[float]] = {member.name: [] for member in members}
    with _without_collection():
        for member in members:
            seconds = _sample(member, 1, clock)
            if seconds >= LONG_SECONDS:
                calls[member.name] = 1
                samples[member.name].append(seconds)
            else:
                calls[member.name], seconds = _short_sample(member, clock)
            share = int(budget / len(members) / seconds)
            count = min(max(share, FEWEST_SAMPLES), MOST_SAMPLES)
            wanted[member.name] = count - len(samples[member.name])
        rounds = max(wanted.values())
        for number in range(rounds):
            # Another one goes first each time, so that nobody always follows the same neighbour.
            first = number % len(members)
            for member in (*members[first:], *members[:first]):
                if _takes_part(number, rounds, wanted[member.name]):
                    samples[member.name].append(_sample(member, calls[member.name], clock))
            on_share((number + 1) / rounds)
    return {name: Times.of(found, calls[name]) for name, found in samples.items()}


def _short_sample(member: Member, clock: Clock) -> tuple[int, float]:
    """How many calls a sample needs, and how many seconds that takes.

    The shortest of some attempts decides: one interrupted call would make every sample too short.
    Single calls are slower than those that follow on each other, hence the second estimate.
    """
    seconds = min(_sample(member, 1, clock) for _ in range(5))
    seconds = min(_sample(member, math.ceil(SAMPLE_SECONDS / seconds), clock) for _ in range(2))
    calls = math.ceil(SAMPLE_SECONDS / seconds)
    return calls, calls * seconds


def _takes_part(number: int, rounds: int, wanted: int) -> bool:
    """True in ``wanted`` of ``rounds`` rounds, evenly spread."""
    return (number + 1) * wanted // rounds > number * wanted // rounds


def _sample(member: Member, calls: int, clock: Clock) -> float:
    with member.context():
        return clock(member.call, calls)


@contextmanager
def _without_collection() -> Iterator[None]:
    """Keep Python's garbage collector out of the samples."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
