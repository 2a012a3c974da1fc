"""First calls are measured in fresh processes: what they import, prepare and compile counts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from bench_cases import DISTILLATION_CASE, QUICK
from torch import Tensor

from introkernels.bench.first_call import FirstCallError, first_call
from introkernels.bench.model import Contender, Suite
from introkernels.bench.operators.distillation import distillation_eager
from introkernels.bench.runner import run_suite

PAUSE = 0.3


def prepare_slowly(operator: object) -> Callable[..., Any]:
    time.sleep(PAUSE)
    started: list[bool] = []

    def call(*tensors: Tensor) -> Tensor:
        if not started:
            started.append(True)
            time.sleep(PAUSE)
        return distillation_eager(*tensors)

    return call


def prepare_telling_caches(operator: object) -> Callable[..., Any]:
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    raise RuntimeError(" ".join(os.environ[name] for name in names))


COMPILING = Contender("compiling", prepare_slowly)
TELLING = Contender("telling", prepare_telling_caches)


def test_preparing_and_the_first_call_count_together() -> None:
    before = time.perf_counter()
    found = first_call(DISTILLATION_CASE, COMPILING, "cpu", threads=1)
    wall = time.perf_counter() - before
    assert 2 * PAUSE <= found.call < wall
    assert 0 < found.second < PAUSE
    # Python takes some milliseconds to find torch alone.
    assert 0.01 < found.import_torch < wall
    assert 0 < found.import_introkernels < wall
    assert sum(asdict(found).values()) < wall


def test_caches_are_empty_folders_of_their_own_and_failures_are_told() -> None:
    with pytest.raises(FirstCallError, match="^RuntimeError: ") as raised:
        first_call(DISTILLATION_CASE, TELLING, "cpu", threads=1)
    folders = [Path(folder) for folder in str(raised.value).removeprefix("RuntimeError: ").split()]
    assert len(set(folders)) == 2
    assert not any(folder.exists() for folder in folders)


@pytest.mark.parametrize("wanted", [False, True])
def test_only_suites_that_ask_for_it_record_first_calls(wanted: bool) -> None:
    suite = Suite("tiny", (DISTILLATION_CASE,), (COMPILING,), first_call=wanted)
    (found,) = run_suite(suite, suite.cases, QUICK)
    measured = {record["contender"]: record["first_call"] for record in found}
    assert measured["sum"] is measured["read"] is None
    if wanted:
        assert measured["compiling"]["call"] >= 2 * PAUSE
        assert measured["compiling"]["reason"] is None
    else:
        assert measured["compiling"] is None
