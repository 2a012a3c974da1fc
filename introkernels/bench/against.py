"""Two revisions of the kernels compared: both measure the same cases in turns, in a process each.

The processes take turns of a few hundredths of a second, in the order before, after, after, before,
so that whatever else the machine does hits both alike. Each pair of neighbouring turns gives a
ratio of their median times; what is told is the median of these ratios. Its 95 % interval lies
between two of them, chosen by their rank as in a sign test: the number of ratios below the true
median has the binomial distribution B(n, 1/2) whatever theirs is (G. J. Hahn and W. Q. Meeker,
Statistical Intervals, Wiley 1991, section 5.2).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

TURN_SECONDS = 0.05
FEWEST_PAIRS = 9
MOST_PAIRS = 200
CONFIDENCE = 0.95
# Two processes of the same code can differ so much: memory lies elsewhere in each.
SMALLEST_DIFFERENCE = 0.02

Verdict = Literal["faster", "slower", "no clear difference"]


class WorkerError(RuntimeError):
    """A process could not measure; says which revision's, and why."""


class Worker(Protocol):
    """Measures one revision; see `introkernels.bench.against_worker` for what it answers."""

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer, which has the key ``failed`` where there is none.

        Raises:
            WorkerError: the process is no more.
        """


@dataclass(frozen=True)
class Ratio:
    """Time after over time before: the median of pairs of turns, and its 95 % interval."""

    median: float
    low: float
    high: float
    pairs: int

    @staticmethod
    def of(before: Sequence[float], after: Sequence[float]) -> Ratio:
        """The ratio of pairs of times.

        Raises:
            ValueError: the pairs are too few for an interval of 95 %, or not pairs.
        """
        ratios = sorted(b / a for a, b in zip(before, after, strict=True))
        rank = rank_of_interval(len(ratios))
        return Ratio(statistics.median(ratios), ratios[rank - 1], ratios[-rank], len(ratios))

    @property
    def verdict(self) -> Verdict:
        """Faster or slower where the whole interval says so, by 2 % or more."""
        if self.high < 1 - SMALLEST_DIFFERENCE:
            return "faster"
        if self.low > 1 + SMALLEST_DIFFERENCE:
            return "slower"
        return "no clear difference"


@dataclass(frozen=True)
class Comparison:
    """One of our contenders in a case.

    Attributes:
        before, after: median seconds of a call, None where it wasn't timed.
        ratio: None where not both were timed; ``reason`` says why.
    """

    case: str
    contender: str
    before: float | None = None
    after: float | None = None
    ratio: Ratio | None = None
    reason: str | None = None


def rank_of_interval(count: int) -> int:
    """The rank, from 1, of the lower end of the median's 95 % interval among ``count`` values.

    The upper end has the same rank from above.

    Raises:
        ValueError: fewer than six values have no such interval.
    """
    rank, outside = 0, 0.0
    while True:
        outside += 2 * math.comb(count, rank) / 2**count
        if outside > 1 - CONFIDENCE:
            break
        rank += 1
    if rank == 0:
        raise ValueError(f"count: got {count}, expected 6 or more for an interval of 95 %")
    return rank


def compare(
    before: Worker,
    after: Worker,
    case: str,
    budget: float,
    on_share: Callable[[float], None] = lambda share: None,
) -> list[Comparison]:
    """Compare our contenders in a case within about ``budget`` seconds, but nine pairs of turns.

    Args:
        case: its name.
        on_share: told now and then which share of the work is done, from 0 to 1.

    Raises:
        WorkerError: a process is no more.
    """
    new = after.ask({"ask": "prepare", "case": case, "sets": None})
    if "failed" in new:
        return [Comparison(case, "", reason=new["failed"])]
    old = before.ask({"ask": "prepare", "case": case, "sets": new["sets"]})
    if "failed" in old:
        return [Comparison(case, "", reason=f"before: {old['failed']}")]
    if old["shape"] != new["shape"]:
        shapes = ("×".join(map(str, answer["shape"])) for answer in (old, new))
        return [Comparison(case, "", reason="its shape was {}, and is {}".format(*shapes))]
    on_share(0.2)
    names = list(new["contenders"])
    found = []
    for number, name in enumerate(names):

        def report(share: float, number: int = number) -> None:
            on_share(0.2 + 0.8 * (number + share) / len(names))

        reason = new["contenders"][name]
        if reason is None and (reason := old["contenders"].get(name, "did not exist")) is not None:
            reason = f"before: {reason}"
        if reason is None:
            found.append(_in_turns(before, after, case, name, budget / len(names), report))
        else:
            found.append(Comparison(case, name, reason=reason))
    return found


def _in_turns(
    before: Worker,
    after: Worker,
    case: str,
    contender: str,
    budget: float,
    on_share: Callable[[float], None],
) -> Comparison:
    # A small budget for a case makes turns shorter, not fewer than it takes.
    seconds = min(TURN_SECONDS, budget / (2 * FEWEST_PAIRS))
    request = {"ask": "measure", "contender": contender, "seconds": seconds}
    medians: tuple[list[float], list[float]] = ([], [])
    done, wanted = 0, FEWEST_PAIRS
    start = time.perf_counter()
    while done < wanted:
        for side in (0, 1) if done % 2 == 0 else (1, 0):
            answer = (before, after)[side].ask(request)
            if "failed" in answer:
                reason = f"{'' if side else 'before: '}{answer['failed']}"
                return Comparison(case, contender, reason=reason)
            medians[side].append(statistics.median(answer["seconds"]))
        done += 1
        affordable = int(done * budget / (time.perf_counter() - start))
        wanted = min(max(affordable, FEWEST_PAIRS), MOST_PAIRS)
        on_share(min(1.0, done / wanted))
    old, new = medians
    return Comparison(
        case, contender, statistics.median(old), statistics.median(new), Ratio.of(old, new)
    )
