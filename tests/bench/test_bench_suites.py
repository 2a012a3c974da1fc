"""The suites: which cases they have, of what sizes, and how training steps are shown."""

from __future__ import annotations

from typing import Any

import pytest
from bench_cases import QUICK

from introkernels.bench import tables
from introkernels.bench.contenders import COMPILE, CPP, EAGER
from introkernels.bench.model import DTYPES, Case, Contender, Suite
from introkernels.bench.operators.step import STEP_SMALL_CNN
from introkernels.bench.runner import run_suite
from introkernels.bench.suites import CPU, FIRST_CALL, GPU, MEMORY, STEP, SUITES, SWEEP

# Of a machine with 24 GiB, inputs and what eager code makes of them.
MOST_BYTES = 2 << 30


@pytest.mark.parametrize("suite", SUITES.values(), ids=lambda suite: suite.name)
def test_suites_are_consistent(suite: Suite) -> None:
    names = [case.name for case in suite.cases]
    assert len(set(names)) == len(names)
    for case in suite.cases:
        assert len(case.shape) == len(case.operator.dims)
        assert case.operator.dims[0] == "B"
        assert case.dtype in DTYPES
        contenders = [contender.name for contender in suite.contenders_of(case)]
        assert len(set(contenders)) == len(contenders) > 0
        assert not {"sum", "read", "copy"} & set(contenders)


@pytest.mark.parametrize("suite", [CPU, SWEEP, MEMORY, STEP], ids=lambda suite: suite.name)
def test_suites_of_a_cpu_fit_a_small_machine(suite: Suite) -> None:
    assert max(case.bytes_moved for case in suite.cases) < MOST_BYTES
    assert suite.device == "cpu"


def test_peers_for_gpus_are_in_the_suite_for_gpus_alone() -> None:
    def names(suite: Suite) -> set[str]:
        return {one.name for case in suite.cases for one in suite.contenders_of(case)}

    for_gpus = {"liger", "fla", "cut-cross-entropy"}
    assert for_gpus < names(GPU)
    everywhere = {"torchdistill", "orda", "captum", "torch-linear-ce", "torch-chunked-ce"}
    assert everywhere < names(GPU)
    assert everywhere < names(CPU)
    for suite in set(SUITES.values()) - {GPU}:
        assert not for_gpus & names(suite)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # CIFAR: Krizhevsky 2009: images of 3×32×32, 10 or 100 classes.
        ("introspective/cifar10/float32", {"C": 10, "D": 3 * 32 * 32}),
        ("introspective/cifar100/float32", {"C": 100, "D": 3 * 32 * 32}),
        # ImageNet, cropped to 3×224×224; 1000 classes, 21841 of the whole; widths of last layers.
        ("introspective/imagenet-16/float32", {"C": 16, "D": 3 * 224 * 224}),
        ("head/imagenet/float32", {"C": 1000, "D": 2048}),
        ("head/imagenet21k/float32", {"C": 21841, "D": 768}),
        ("distillation/imagenet21k/float32", {"C": 21841}),
        # Vocabularies of Llama 2 and Llama 3.
        ("head/language-32k/float32", {"C": 32000}),
        ("head/language-128k/float32", {"C": 128256}),
        ("distillation/language-32k/float32", {"C": 32000}),
        ("distillation/language-128k/float32", {"C": 128256}),
    ],
)
def test_shapes_are_those_of_their_names(name: str, expected: dict[str, int]) -> None:
    (case,) = (case for case in CPU.cases if case.name == name)
    assert expected.items() <= case.sizes.items()


def test_sweeps_change_one_size_and_leave_the_others() -> None:
    groups: dict[tuple[str, str], list[Case]] = {}
    for case in SWEEP.cases:
        groups.setdefault((case.operator.name, case.use.partition("-")[0]), []).append(case)
    assert set(groups) == {
        *((name, "classes") for name in ("introspective", "distillation", "head")),
        *((name, "dims") for name in ("introspective", "head")),
    }
    for (_, kind), cases in groups.items():
        changed = {"classes": "C", "dims": "D"}[kind]
        values = [case.sizes[changed] for case in cases]
        assert values == sorted(set(values))
        assert len(values) >= 4
        assert [case.use for case in cases] == [f"{kind}-{value}" for value in values]
        rest = {tuple(v for n, v in case.sizes.items() if n != changed) for case in cases}
        assert len(rest) == 1


def test_memory_is_asked_across_classes_of_three_contenders() -> None:
    for name in ("head", "introspective"):
        classes = [case.sizes["C"] for case in MEMORY.cases if case.operator.name == name]
        assert max(classes) >= 100 * min(classes)
    assert MEMORY.contenders == (EAGER, COMPILE, CPP)


def test_steps_are_of_two_networks_at_10_and_100_classes() -> None:
    found = [(case.operator.name, case.sizes) for case in STEP.cases]
    assert found == [
        (f"step-{network}", {"B": 64, "C": classes})
        for network in ("small_cnn", "resnet20")
        for classes in (10, 100)
    ]
    for case in STEP.cases:
        names = {contender.name for contender in STEP.contenders_of(case)}
        assert names >= {"plain", "smoothing", "teacher", "exact", "sketch", "projection", "head"}


def test_first_calls_are_measured_in_their_suite_alone() -> None:
    assert [suite for suite in SUITES.values() if suite.first_call] == [FIRST_CALL]
    assert COMPILE in FIRST_CALL.contenders


@pytest.fixture(scope="module")
def steps() -> list[dict[str, Any]]:
    case = Case(STEP_SMALL_CNN, "tiny", "a tiny case", (4, 5))
    (found,) = run_suite(Suite("tiny", (case,), ()), [case], QUICK)
    return found


def test_steps_are_timed_without_being_compared(steps: list[dict[str, Any]]) -> None:
    recipes = [contender.name for contender in STEP_SMALL_CNN.contenders]
    timed = {record["contender"]: record for record in steps if record["role"] != "read"}
    assert list(timed) == recipes
    assert all(record["status"] == "timed" for record in timed.values())
    assert all(record["error"] is None for record in timed.values())
    assert all(record["backward"] for record in timed.values())
    # A network's own reads and writes are not counted.
    assert all(record["gigabytes_per_second"] is None for record in timed.values())
    assert all(record["percent_of_sum"] is None for record in timed.values())


def test_the_table_of_steps_has_the_ratio_to_the_plain_one(steps: list[dict[str, Any]]) -> None:
    median = {"plain": 0.010, "smoothing": 0.011, "exact": 0.25}
    shown = [
        record | {"seconds": record["seconds"] | {"median": median[record["contender"]]}}
        for record in steps
        if record["contender"] in median
    ]
    header, (row,) = tables.step_costs(shown)
    cells = dict(zip(header, row, strict=True))
    assert cells["plain step"] == "10.0 ms"
    assert (cells["smoothing"], cells["exact"]) == ("1.10×", "25.0×")
    assert tables.is_steps(shown)
    assert "| 25.0× |" in tables.markdown(shown, "data.jsonl")


def test_the_table_of_first_calls_has_their_parts(steps: list[dict[str, Any]]) -> None:
    parts = {"import_torch": 1.5, "import_introkernels": 0.1, "call": 20.0, "second": 0.002}
    shown = [
        steps[0] | {"first_call": parts | {"reason": None}},
        steps[1] | {"first_call": {"reason": "not over"}},
        steps[2],
    ]
    header, rows = tables.first_calls(shown)
    assert header[2:] == ["import torch", "import introkernels", "first call", "second"]
    assert rows[0][1:] == ["plain", "1.50 s", "100 ms", "20.0 s", "2.00 ms"]
    assert rows[1][1:] == ["smoothing", "not over", "", "", ""]
    assert len(rows) == 2


def test_a_contender_of_another_device_is_left_out() -> None:
    case = CPU.cases[0]
    on_gpus = Contender("on GPUs", EAGER.prepare, devices=("cuda",))
    suite = Suite("tiny", (case,), (EAGER, on_gpus))
    assert on_gpus not in suite.contenders_of(case)
    assert on_gpus in Suite("tiny", (case,), (on_gpus,), device="cuda").contenders_of(case)
