"""A case from inputs to records: the wrong refused, the slow last, the machine on record."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import (
    ABSENT,
    DISTILLATION_CASE,
    MISSHAPEN,
    NAN,
    QUICK,
    RAISING,
    SLOW,
    SUITE,
    TINY,
    WRONG_GRADIENT,
    WRONG_LOSS,
)

import introkernels as ik
from introkernels import checkout
from introkernels.bench import environment, records, tables
from introkernels.bench.contenders import COMPILE, EAGER, REFERENCE
from introkernels.bench.model import Case, Contender, Suite
from introkernels.bench.operators.distillation import distillation_eager
from introkernels.bench.runner import MOST_SETS, number_of_sets, run_suite

ROOT = Path(__file__).resolve().parents[2]


def run(*contenders: Contender, case: Case = DISTILLATION_CASE) -> dict[str, dict[str, Any]]:
    """The records of one case by contender."""
    (found,) = run_suite(Suite("tiny", (case,), contenders), [case], QUICK)
    return {record["contender"]: record for record in found}


@pytest.mark.parametrize(
    ("contender", "wrong"),
    [(WRONG_LOSS, "loss"), (WRONG_GRADIENT, "grad logits"), (NAN, "loss"), (MISSHAPEN, "loss")],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_wrong_contender_is_refused_and_never_timed(contender: Contender, wrong: str) -> None:
    calls = []

    def counting(operator: object) -> Callable[..., Any]:
        function = contender.prepare(operator)

        def call(*tensors: torch.Tensor) -> Any:
            calls.append(contender.name)
            return function(*tensors)

        return call

    found = run(EAGER, Contender(contender.name, counting))
    record = found[contender.name]
    assert record["status"] == "refused"
    assert record["reason"].startswith(f"{wrong} is off by")
    assert record["seconds"] is None
    assert record["gigabytes_per_second"] is None
    assert calls == [contender.name]
    assert found["eager"]["status"] == "timed"


def test_the_error_of_a_refused_one_is_on_record() -> None:
    found = run(EAGER, WRONG_LOSS, WRONG_GRADIENT, NAN)
    assert found["wrong loss"]["error"]["loss"] == pytest.approx(1e-3, rel=1e-2)
    assert found["wrong gradient"]["error"]["loss"] < 1e-6
    assert found["wrong gradient"]["error"]["grad logits"] == pytest.approx(1e-2, rel=1e-2)
    assert found["nan"]["error"]["loss"] is None
    assert found["eager"]["error"]["grad logits"] < found["eager"]["tolerance"]["grad logits"]


def test_a_failing_and_an_absent_contender_leave_the_others_alone() -> None:
    found = run(RAISING, ABSENT, EAGER)
    assert found["raising"]["status"] == found["absent"]["status"] == "unavailable"
    assert found["raising"]["reason"] == "RuntimeError: out of order"
    assert found["absent"]["reason"] == "not installed"
    assert found["eager"]["seconds"]["samples"] >= 3


def test_a_slow_contender_ranks_last() -> None:
    found = run(SLOW, WRONG_LOSS, EAGER, REFERENCE)
    ranked = [record["contender"] for record in tables.ranking(list(found.values()))]
    assert ranked[-1] == "wrong loss"
    assert ranked[-2] == "slow"
    assert found["slow"]["seconds"]["median"] >= 0.1
    assert tables.speedup(list(found.values()), "slow", "eager") < 1


@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a compiler"
)
def test_torch_compile_competes() -> None:
    record = run(COMPILE)["compile"]
    assert record["status"] == "timed", record["reason"]
    # Compilation takes seconds; it is over before the first sample.
    assert record["seconds"]["upper_quartile"] < 0.1


def test_a_floor_is_timed_without_being_compared() -> None:
    (case,) = (case for case in TINY if case.operator.name == "head")
    record = run(EAGER, case=case)["matmuls"]
    assert (record["role"], record["status"], record["error"]) == ("floor", "timed", None)
    assert record["seconds"]["median"] > 0


def test_reads_give_the_percentages() -> None:
    found = run(EAGER)
    eager, plain, read = found["eager"], found["sum"], found["read"]
    assert plain["bytes"] == 5 * 7 * 4
    assert read["bytes"] == QUICK.read_bytes
    rate = eager["bytes"] / eager["seconds"]["median"] / 1e9
    assert eager["gigabytes_per_second"] == pytest.approx(rate)
    of_sum = 100 * rate / (plain["bytes"] / plain["seconds"]["median"] / 1e9)
    assert eager["percent_of_sum"] == pytest.approx(of_sum)
    of_read = 100 * rate / (read["bytes"] / read["seconds"]["best"] / 1e9)
    assert eager["percent_of_read"] == pytest.approx(of_read)
    assert plain["percent_of_sum"] == pytest.approx(100)


def test_every_record_says_where_and_how() -> None:
    threads = torch.get_num_threads()
    stages: set[str] = set()
    found = [
        record
        for case in run_suite(SUITE, TINY, QUICK, lambda case, stage, share: stages.add(stage))
        for record in case
    ]
    assert torch.get_num_threads() == threads
    assert {"checking", "timing"} <= stages
    assert len({record["case"] for record in found}) == len(TINY)
    assert len({record["run"] for record in found}) == 1
    for record in found:
        records.check(record)
        assert record["machine"]["cpu"]
        assert record["machine"]["cores"] >= 1
        assert record["machine"]["memory"] > 1 << 20
        assert record["versions"]["torch"] == torch.__version__
        assert record["versions"]["introkernels"] == ik.__version__
        assert record["settings"]["threads"] == 1


def test_threads_are_those_asked_for() -> None:
    seen: list[int] = []

    def prepare(operator: object) -> Callable[..., Any]:
        seen.append(torch.get_num_threads())
        return EAGER.prepare(operator)

    case = DISTILLATION_CASE
    suite = Suite("tiny", (case,), (Contender("spy", prepare),))
    for threads in (1, 2):
        settings = type(QUICK)(threads, budget=0.01, memory=False, read_bytes=4)
        list(run_suite(suite, [case], settings))
    assert seen == [1, 2]


def test_sets_of_inputs_take_turns() -> None:
    """As many as are recorded, in the same order over and over: no call sees the last one's."""
    seen: list[int] = []

    def prepare(operator: object) -> Callable[..., Any]:
        def call(logits: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
            seen.append(logits.data_ptr())
            return distillation_eager(logits, *others)

        return call

    record = run(Contender("spy", prepare))["spy"]
    sets = record["input_sets"]
    assert 2 <= sets <= MOST_SETS
    # The first call is the check's; each one of the timing has the next set.
    turns = seen[1:]
    assert len(set(turns)) == sets
    assert turns[sets:] == turns[:-sets]


def test_the_spread_of_times_is_on_record() -> None:
    times = run(EAGER)["eager"]["seconds"]
    order = ("best", "lower_quartile", "median", "upper_quartile", "worst")
    spread = [times[name] for name in order]
    assert spread == sorted(spread)
    assert 0 < times["best"] < times["worst"]


def test_without_a_definition_results_only_have_to_be_finite() -> None:
    operator = replace(DISTILLATION_CASE.operator, definition=None)
    found = run(WRONG_LOSS, NAN, case=replace(DISTILLATION_CASE, operator=operator))
    assert found["wrong loss"]["status"] == "timed"
    assert found["wrong loss"]["error"] is None
    assert found["nan"]["status"] == "refused"
    assert found["nan"]["reason"] == "not finite: loss, grad logits"


def test_what_was_made_equal_and_the_package_are_on_record() -> None:
    peer = replace(EAGER, name="peer", distribution="numpy", made_equal="T² outside")
    found = run(peer, EAGER)
    assert found["peer"]["made_equal"] == "T² outside"
    assert found["peer"]["package"] == f"numpy {metadata.version('numpy')}"
    assert found["eager"]["made_equal"] is found["eager"]["package"] is None


def test_contenders_of_other_devices_stay_out() -> None:
    found = run(EAGER, replace(SLOW, devices=("cuda",)))
    assert "slow" not in found


def test_records_from_before_a_field_can_be_read(tmp_path: Path) -> None:
    later = ("first_call", "package", "made_equal")
    found = list(run(EAGER).values())
    older = [{name: value for name, value in r.items() if name not in later} for r in found]
    for record in older:
        del record["seconds"]["worst"]
    path = tmp_path / "older.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in older))
    read = records.read(path)
    assert [record["contender"] for record in read] == [record["contender"] for record in found]
    assert all(record[name] is None for record in read for name in later)
    records.write(path, older)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks/results").glob("*.jsonl")), ids=lambda path: path.stem
)
def test_committed_results_can_be_read(path: Path) -> None:
    assert records.read(path)


@pytest.mark.parametrize(
    ("size", "cache", "memory", "expected"),
    [
        (1000, 32_000, 1 << 40, 16),  # small: sixteen at most
        (8000, 32_000, 1 << 40, 8),  # twice the cache
        (9000, 32_000, 1 << 40, 8),  # rounded up
        (1 << 30, 32_000, 1 << 34, 2),  # large: two
        (1 << 30, 32_000, 1 << 31, 2),  # even where memory is short
        (8000, 32_000, 320_000, 5),  # an eighth of the memory
    ],
)
def test_number_of_input_sets(size: int, cache: int, memory: int, expected: int) -> None:
    assert number_of_sets(size, cache, memory) == expected


def test_slug() -> None:
    assert environment.slug({"cpu": "AMD EPYC(TM) 9B14 ", "cores": 2}) == "amd-epyc-tm-9b14-2-cores"


def test_commit_is_that_of_a_checkout_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    module = tmp_path / "site-packages/introkernels/__init__.py"
    module.parent.mkdir(parents=True)
    module.write_text("")
    monkeypatch.setattr(ik, "__file__", str(module))
    assert checkout.commit() is None
    if shutil.which("git") is None:
        return
    git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b")
    from subprocess import run as call

    call([*git, "init", "-q"], check=True)
    call([*git, "commit", "-q", "--allow-empty", "-m", "outer"], check=True)
    # Installed below a checkout of something else.
    assert checkout.commit() is None
    call([*git, "add", "."], check=True)
    call([*git, "commit", "-q", "-m", "tracked"], check=True)
    found = checkout.commit()
    assert found is not None
    assert len(found["revision"]) == 40
    assert found["changed"] is False
    module.write_text("# changed\n")
    assert checkout.commit() == {"revision": found["revision"], "changed": True}
