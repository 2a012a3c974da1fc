"""Peak memory: what a call holds, whoever allocated it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from bench_cases import DISTILLATION_CASE, DYING, HOLDERS, MEGABYTE, QUICK, RAISING, TINY

from introkernels.bench.contenders import EAGER
from introkernels.bench.memory import MemoryProbe, ProbeError
from introkernels.bench.model import Case, Suite
from introkernels.bench.operators.distillation import DISTILLATION
from introkernels.bench.runner import run_suite

STATISTICS_CASE = TINY[1]


@pytest.fixture(scope="module")
def probe() -> Iterator[MemoryProbe]:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the kernel doesn't let a process reset its peak memory")
    with MemoryProbe(threads=1) as probe:
        yield probe


@pytest.mark.parametrize("holder", HOLDERS)
def test_known_sizes_are_found(probe: MemoryProbe, holder: str) -> None:
    contender, size = HOLDERS[holder]
    peak = probe.peak(STATISTICS_CASE, contender)
    assert size - MEGABYTE < peak < size + 2 * MEGABYTE


def test_a_failure_and_a_death_are_reported_and_survived(probe: MemoryProbe) -> None:
    with pytest.raises(ProbeError, match="RuntimeError: out of order"):
        probe.peak(DISTILLATION_CASE, RAISING)
    with pytest.raises(ProbeError, match="was killed"):
        probe.peak(STATISTICS_CASE, DYING)
    contender, size = HOLDERS["torch"]
    assert probe.peak(STATISTICS_CASE, contender) > size - MEGABYTE


def test_gradients_handed_out_are_not_added_memory(probe: MemoryProbe) -> None:
    case = Case(DISTILLATION, "mid", "some megabytes", (1024, 2048))
    settings = replace(QUICK, memory=True)
    ((eager, *_),) = run_suite(Suite("tiny", (case,), (EAGER,)), [case], settings)
    memory = eager["memory"]
    of_logits = 1024 * 2048 * 4
    assert memory["handed_out"] == of_logits + 4
    assert memory["added"] == memory["peak"] - memory["handed_out"]
    # log_softmax of both temperatures and the teacher's softmax at least, ten at most.
    assert 2 * of_logits < memory["added"] < 10 * of_logits
