"""How samples are taken: in turns, within the budget, long enough."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from introkernels.bench.timing import FEWEST_SAMPLES, MOST_SAMPLES, Member, Times, measure


class Log:
    """Members that sleep and write down who was called."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def member(self, name: str, seconds: float) -> Member:
        def call() -> None:
            self.calls.append(name)
            time.sleep(seconds)

        return Member(name, call)


def test_members_take_turns_and_go_first_in_turn() -> None:
    log = Log()
    measure([log.member(name, 0.021) for name in "abc"], budget=1e-9)
    assert "".join(log.calls) == "abc" + "abc" + "bca"


def test_slow_members_have_fewer_samples_spread_over_the_whole_time() -> None:
    log = Log()
    times = measure([log.member("fast", 0.001), log.member("slow", 0.03)], budget=0.3)
    assert times["slow"].samples < times["fast"].samples
    assert times["slow"].samples >= FEWEST_SAMPLES
    where = [number for number, name in enumerate(log.calls) if name == "slow"]
    assert where[-1] > 0.8 * len(log.calls)


def test_at_least_three_samples_whatever_the_budget() -> None:
    log = Log()
    times = measure([log.member("a", 0.021)], budget=1e-9)
    assert times["a"].samples == FEWEST_SAMPLES
    assert Counter(log.calls) == {"a": FEWEST_SAMPLES}


def test_short_calls_are_repeated_within_a_sample_and_samples_are_bounded() -> None:
    times = measure([Member("nothing", lambda: None)], budget=5.0)["nothing"]
    assert times.calls * times.median > 0.2e-3
    assert times.calls > 1000
    assert times.samples == MOST_SAMPLES
    assert times.median < 1e-4


def test_the_context_holds_during_calls_and_is_not_timed() -> None:
    inside: list[bool] = []
    entered = []

    @contextmanager
    def context() -> Iterator[None]:
        time.sleep(0.02)
        entered.append(True)
        yield
        entered.pop()

    def call() -> None:
        inside.append(bool(entered))
        time.sleep(0.001)

    times = measure([Member("a", call, context)], budget=0.01)
    assert all(inside)
    assert times["a"].median < 0.02


def test_shares_grow_to_one() -> None:
    shares: list[float] = []
    measure([Member("a", lambda: time.sleep(0.002))], 0.02, shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_quartiles() -> None:
    times = Times.of([5.0, 1.0, 4.0, 2.0, 3.0], calls=7)
    assert (times.lower_quartile, times.median, times.upper_quartile) == (2.0, 3.0, 4.0)
    assert (times.best, times.samples, times.calls) == (1.0, 5, 7)
    assert Times.of([1.0, 2.0, 9.0], 1).median == pytest.approx(2.0)
