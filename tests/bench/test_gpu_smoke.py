"""The smoke stage of `make gpu-check`, rehearsed on a CPU, and how it tells what goes wrong."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_check
import gpu_smoke
import pytest
import torch
from bench_cases import ABSENT, MEGABYTE, RAISING, WRONG_LOSS, Copying
from gpu_smoke import KERNELS, Item, Place
from torch import Tensor

import introkernels as ik
from introkernels.bench import devices, records, runner
from introkernels.bench.contenders import CPP, REFERENCE
from introkernels.bench.devices import MOST_SETS, ReplayedGpu
from introkernels.bench.model import DTYPES, Contender

ROOT = Path(__file__).resolve().parents[2]
COMPOSITE = replace(
    REFERENCE, name="composite", role="ours", context=partial(ik.use_backend, "composite")
)
BACKENDS = (CPP, COMPOSITE) if CPP.missing() is None else (COMPOSITE,)


def once_more(compute: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What stands in for a graph."""
    return compute()


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Place:
    """A CPU that is measured as a GPU is, and a tiny case for each operator."""
    monkeypatch.setitem(runner.DEVICES, "copying", Copying)
    monkeypatch.setattr(gpu_smoke, "SECONDS_OF_A_CASE", 0.01)
    monkeypatch.delenv(gpu_smoke.LIMIT, raising=False)
    # Of fewer rows, what a head in a half type rounds does not average out.
    shapes = {2: (5, 7), 3: (128, 20, 33)}
    cases = {
        case.operator.name: replace(case, shape=shapes[len(case.shape)]) for case in KERNELS.cases
    }
    suite = replace(KERNELS, cases=(*cases.values(),), contenders=BACKENDS, device="copying")
    return Place("cpu", suite, once_more, MEGABYTE)


def with_backends(place: Place, *contenders: Contender, cases: int) -> Place:
    """The same of other backends, and of the first cases alone."""
    few = place.suite.cases[:cases]
    return place._replace(suite=replace(place.suite, contenders=contenders, cases=few))


def run(place: Place, out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """The exit status, and the lines that were said."""
    status = gpu_smoke.main(out, place)
    return status, capsys.readouterr().out.splitlines()


def test_all_of_it(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = run(place, tmp_path, capsys)
    *items, total = lines
    assert status == 0, items
    assert total == f"{len(items)} of {len(items)} items passed"
    assert (tmp_path / "smoke.txt").read_text().splitlines() == lines
    for backend in BACKENDS:
        checked = [line for line in items if ": right, the same bits twice and from a" in line]
        of_backend = [line for line in checked if line.startswith(f"{backend.name}: ")]
        assert [line.split(": ")[1].split(",")[0] for line in of_backend] == [
            *("distillation", "distillation", "similarity", "introspective", "head", "statistics")
        ]
    assert f"{BACKENDS[0].name}: distillation-forward, 5 × 7, float32: " in "\n".join(items)
    timed = [line for line in items if " GB/s, " in line or " TFLOP/s " in line]
    assert len(timed) == len(place.suite.cases) * len(BACKENDS)
    assert all("TFLOP/s" in line or " % of a copy's " in line for line in timed)

    (path,) = tmp_path.glob("kernels-*.jsonl")
    stored = records.read(path)
    names = [*(backend.name for backend in BACKENDS), "sum", "copy"]
    for case in place.suite.cases:
        found = [record for record in stored if record["case"] == case.name]
        assert sorted(record["contender"] for record in found) == sorted(names)
        assert {record["status"] for record in found} == {"timed"}


def test_a_wrong_loss_is_told_and_stops_nothing(
    place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = ik.distillation_loss

    def wrong(*arguments: Any, **keywords: Any) -> Any:
        loss, *parts = right(*arguments, **keywords)
        return 1.001 * loss, *parts

    monkeypatch.setattr(ik, "distillation_loss", wrong)
    status, lines = run(with_backends(place, COMPOSITE, cases=0), tmp_path, capsys)
    assert status == 1
    *items, total = lines
    failed = [line for line in items if "FAILED" in line]
    assert len(failed) == 2
    for line in failed:
        assert line.startswith("composite: distillation, ")
        assert ": FAILED: loss in torch.float32: 1 of 1 numbers are off; the worst, " in line
    assert total == f"{len(items) - 2} of {len(items)} items passed"
    # What is said is a line; where it comes from is in the file.
    assert not any("Traceback" in line for line in lines)
    assert "    Traceback (most recent call last):\n" in (tmp_path / "smoke.txt").read_text()


def test_wrong_statistics_are_told(
    place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = ik.explanation_stats

    def wrong(*arguments: Any) -> Any:
        stats = right(*arguments)
        return stats._replace(sq_norms=stats.sq_norms * (1 + 1e-4))

    monkeypatch.setattr(ik, "explanation_stats", wrong)
    status, lines = run(with_backends(place, COMPOSITE, cases=0), tmp_path, capsys)
    assert status == 1
    (failed,) = [line for line in lines if "FAILED" in line]
    assert failed.startswith("composite: statistics, 32 × 100 × 3072, bfloat16: FAILED: sq_norms")


def test_what_is_raised_is_told_in_a_line(
    place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*arguments: Any, **keywords: Any) -> Any:
        raise RuntimeError("out of order\nand more of it")

    monkeypatch.setattr(ik, "similarity_loss", fails)
    status, lines = run(with_backends(place, COMPOSITE, cases=0), tmp_path, capsys)
    assert status == 1
    (failed,) = [line for line in lines if "FAILED" in line]
    told = "FAILED: RuntimeError: out of order"
    assert failed == f"composite: similarity, 128 × 1000, float32: {told}"
    assert "and more of it" in (tmp_path / "smoke.txt").read_text()


def test_other_bits_from_a_graph_are_told(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def off(compute: Callable[[], list[Tensor]]) -> list[Tensor]:
        first, *others = compute()
        return [first * (1 + 1e-6), *others]

    one = with_backends(place._replace(replay=off), COMPOSITE, cases=0)
    status, (first, *_, total) = run(one, tmp_path, capsys)
    assert status == 1
    assert first.endswith(": FAILED: replayed, result 0 differs in 1 of 1 places")
    assert total == "0 of 6 items passed"


def test_other_bits_the_second_time_are_told(
    place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    drift = iter(range(1000))
    monkeypatch.setattr(gpu_smoke, "results", lambda case: [torch.full((), next(drift))])
    status, (first, *_) = run(with_backends(place, COMPOSITE, cases=0), tmp_path, capsys)
    assert status == 1
    assert first.endswith(": FAILED: the second time, result 0 differs in 1 of 1 places")


@pytest.mark.parametrize(
    ("contender", "told"),
    [
        (WRONG_LOSS, "FAILED: refused: loss is off by 1.0e-03 where 1.0e-05 is allowed"),
        (replace(RAISING, role="ours"), "FAILED: unavailable: RuntimeError: out of order"),
        (replace(ABSENT, role="ours"), "FAILED: unavailable: not installed"),
    ],
    ids=lambda value: value.name if isinstance(value, Contender) else "",
)
def test_what_is_not_right_is_not_timed(
    contender: Contender,
    told: str,
    place: Place,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, lines = run(with_backends(place, contender, COMPOSITE, cases=1), tmp_path, capsys)
    assert status == 1
    name = "distillation-forward, 5 × 7, float32"
    assert f"{contender.name}: {name}: {told}" in lines
    # The other backend of the case is timed.
    assert any(line.startswith(f"composite: {name}: ") and "GB/s" in line for line in lines)
    (path,) = tmp_path.glob("kernels-*.jsonl")
    states = {record["contender"]: record["status"] for record in records.read(path)}
    assert states.pop(contender.name) in ("refused", "unavailable")
    assert states == dict.fromkeys(("composite", "sum", "copy"), "timed")


def test_a_backend_that_is_not_loaded_fails_its_checks(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, lines = run(with_backends(place, ABSENT, cases=0), tmp_path, capsys)
    assert status == 1
    assert all(line.endswith(": FAILED: not loaded: not installed") for line in lines[:-1])


def test_what_is_raised_while_it_is_timed_stops_nothing(
    place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Breaking(Copying):
        def clock(self, call: Callable[[], object], calls: int) -> float:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setitem(runner.DEVICES, "copying", Breaking)
    status, lines = run(with_backends(place, COMPOSITE, cases=2), tmp_path, capsys)
    assert status == 1
    failed = [line for line in lines if "FAILED: RuntimeError: operation failed due to" in line]
    assert len(failed) == 2
    assert lines[-1] == "6 of 8 items passed"


def test_what_no_longer_fits_is_told_not_to_have_run(
    place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(gpu_smoke.LIMIT, str(gpu_smoke.SECONDS_OF_THE_REST + 1e-3))
    assert gpu_smoke.LIMIT == gpu_check.LIMIT
    status, (first, *others, total) = run(place, tmp_path, capsys)
    assert status == 1
    assert ": right, " in first
    assert all(line.endswith(": not run, no time was left") for line in others)
    assert total == f"1 of {1 + len(others)} items passed"


def items(*runs: Callable[[], str]) -> Callable[..., list[Item]]:
    return lambda place, keep: [Item(f"item {i}", run) for i, run in enumerate(runs)]


def test_one_that_is_ended_from_outside_says_so(
    place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As `make gpu-check` does at the limit of a part, a while before it kills it."""

    def long() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_smoke, "items_of", items(lambda: "fine", long, lambda: "late"))
    status, lines = run(place, tmp_path, capsys)
    assert status == 1
    assert lines[0].startswith("item 0: fine (")
    assert lines[1:] == [
        "item 1: FAILED: ended from outside",
        "item 2: not run, no time was left",
        "1 of 3 items passed",
    ]


def test_one_that_is_killed_leaves_all_lines(tmp_path: Path) -> None:
    """A kernel that never ends listens to nothing."""
    code = (
        "import signal, sys, time\n"
        "from pathlib import Path\n"
        "import gpu_smoke\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "gpu_smoke.items_of = lambda place, keep: [\n"
        "    gpu_smoke.Item('first', lambda: 'fine'),\n"
        "    gpu_smoke.Item('hangs', lambda: time.sleep(600)),\n"
        "]\n"
        "gpu_smoke.main(Path(sys.argv[1]), gpu_smoke.GPU._replace(device='cpu'))\n"
    )
    paths = os.pathsep.join((str(ROOT), str(ROOT / "benchmarks")))
    printed, written = tmp_path / "printed", tmp_path / "smoke.txt"
    with printed.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            env={**os.environ, "PYTHONPATH": paths},
            stdout=output,
        )
    try:
        for _ in range(1200):
            if written.exists() and "hangs" in written.read_text():
                break
            time.sleep(0.05)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    for path in (printed, written):
        first, hanging = path.read_text().split("\n")
        assert first.startswith("first: fine (")
        assert hanging == "hangs: "


def test_kernels_are_timed_at_the_sizes_they_are_predicted_for() -> None:
    names = [case.name for case in KERNELS.cases]
    assert len(set(names)) == len(names)
    shapes = {(case.operator.name, case.shape, case.dtype) for case in KERNELS.cases}
    for loss in ("distillation", "similarity"):
        for direction in ("forward", "backward"):
            for shape in ((8192, 32000), (4096, 1000)):
                for dtype in ("bfloat16", "float32"):
                    assert (f"{loss}-{direction}", shape, dtype) in shapes
    assert ("confident-forward", (8192, 32000), "bfloat16") in shapes
    assert ("statistics", (256, 100, 3072), "bfloat16") in shapes
    assert ("head", (4096, 32000, 2048), "bfloat16") in shapes
    assert all(case.dtype in DTYPES for case in KERNELS.cases)


def test_what_is_predicted_is_told_beside_what_is_measured() -> None:
    found = [
        (gpu_smoke.predicted(backend, case, "NVIDIA H200"), case.operator.name)
        for case in KERNELS.cases
        for backend in ("cuda", "triton")
    ]
    told = {name for share, name in found if share is not None}
    assert told == set(gpu_smoke.PREDICTED)
    assert all(0 < share < 1.2 for share, _ in found if share is not None)
    # Nothing is predicted of confident rows, of what is more than a kernel, and of other GPUs.
    assert {name for share, name in found if share is None}.isdisjoint(told)
    assert gpu_smoke.predicted("triton", KERNELS.cases[0], "NVIDIA L4") is None


def test_a_prediction_stands_in_the_line(
    place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu_smoke, "LOSSES", {})
    monkeypatch.setattr(gpu_smoke, "EXPLANATIONS", {})
    monkeypatch.setattr(gpu_smoke, "predicted", lambda backend, case, gpu: 0.85)
    status, (line, _) = run(with_backends(place, COMPOSITE, cases=1), tmp_path, capsys)
    assert status == 0
    assert re.search(r" of a copy's [\d.]+ GB/s, predicted 85 % \(", line)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_says_that_there_is_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_smoke.main(tmp_path) == 1
    assert capsys.readouterr().out.endswith("sees no GPU: nothing is checked or measured\n")
    assert not list(tmp_path.iterdir())


class Graphs:
    """As much of CUDA's graphs and streams as is used, on a CPU; notes what happens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.current = "usual"
        cuda: dict[str, Any] = {
            "get_device_properties": lambda: SimpleNamespace(total_memory=1 << 30),
            "current_stream": lambda: Stream(self, self.current),
            "Stream": lambda: Stream(self, "side"),
            "set_stream": self.set_stream,
            "stream": self.stream,
            "graph": self.graph,
            "CUDAGraph": lambda: Graph(self),
            "Event": lambda **options: Event(),
            "synchronize": lambda: None,
            "empty_cache": lambda: None,
        }
        for name, value in cuda.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def set_stream(self, stream: Stream) -> None:
        self.current = stream.name

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before

    @contextmanager
    def graph(self, graph: Graph, stream: Stream | None = None) -> Iterator[None]:
        self.events.append(f"capture in {self.current}")
        yield


class Stream:
    def __init__(self, graphs: Graphs, name: str) -> None:
        self.name = name

    def wait_stream(self, other: Stream) -> None:
        pass


class Graph:
    def __init__(self, graphs: Graphs) -> None:
        self.graphs = graphs

    def replay(self) -> None:
        self.graphs.events.append("replay")


class Event:
    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return 12.0


def test_calls_are_timed_from_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = Graphs(monkeypatch)
    device = ReplayedGpu(threads=1)
    assert graphs.current == "side"

    def call() -> None:
        graphs.events.append("call")

    assert device.clock(call, 3) == pytest.approx(4e-3)
    # Once for each set of inputs before, then as many as a sample has.
    assert graphs.events == ["call"] * MOST_SETS + ["capture in side"] + ["call"] * 3 + ["replay"]
    graphs.events.clear()
    assert device.clock(call, 3) == pytest.approx(4e-3)
    assert device.clock(call, 2) == pytest.approx(6e-3)
    assert graphs.events == ["replay", "capture in side", "call", "call", "replay"]
    device.close()
    assert graphs.current == "usual"
    assert devices.DEVICES[KERNELS.device] is ReplayedGpu


def test_a_check_takes_its_results_from_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = Graphs(monkeypatch)
    seen = []

    def compute() -> list[Tensor]:
        seen.append(graphs.current)
        return [torch.tensor(len(seen))]

    assert gpu_smoke.replayed(compute) == [torch.tensor(2)]
    assert seen == ["side", "usual"]
    assert graphs.events == ["capture in usual", "replay"]
