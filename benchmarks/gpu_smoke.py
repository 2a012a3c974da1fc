"""The first two minutes on a GPU, in one process: whether kernels are right, and how fast they are.

Each operator is checked on each backend: within the bounds of the tests, the same bits twice, and
again from a CUDA graph. Then each direction is timed beside a plain copy, replayed from CUDA
graphs, so that it is not Python that is timed. Each line is written as it comes, to the standard
output and to ``smoke.txt``, and so are the records of what was timed. What fails is told in a line
and stops nothing else, and what no longer fits into the time is told not to have run.
"""

from __future__ import annotations

import os
import sys
import textwrap
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from gpu_suite import LIMIT, within
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "gpu"))

from gpu_cases import assert_same, leaves_of, results
from helpers.cases import (
    Case,
    distillation_case,
    introspective_case,
    linear_case,
    similarity_case,
)
from helpers.oracle import assert_follows_definition
from helpers.tolerance import assert_accurate

import introkernels as ik
from introkernels.bench import environment, records, tables
from introkernels.bench.contenders import CUDA, TRITON
from introkernels.bench.model import Case as Measured
from introkernels.bench.model import Contender, Operator, Suite
from introkernels.bench.operators import row_losses
from introkernels.bench.operators.head import HEAD
from introkernels.bench.operators.introspective import STATISTICS
from introkernels.bench.records import Record
from introkernels.bench.runner import Settings, run_suite

# Beside it, a case takes some time to draw and to check, and for Triton to compile.
SECONDS_OF_A_CASE = 0.4
# Where `make gpu-check` does not say otherwise; of that, for imports before the first line.
SECONDS = 120.0
SECONDS_OF_THE_REST = 15.0

TERA = 1e12

# The kernels of operators that do nothing else, as benchmarks/predicted.toml names them.
PREDICTED = {
    "distillation-forward": "row_loss_forward",
    "distillation-backward": "row_loss_backward",
    "statistics": "explanation_stats",
}

Results = Callable[[], list[Tensor]]

_LANGUAGE = ("language-32k", "language model, 32,000 tokens")
_SHAPES = ((*_LANGUAGE, (8192, 32000)), ("imagenet", "ImageNet, large batch", (4096, 1000)))


def _cases_of(*operators: Operator) -> Iterator[Measured]:
    for dtype in ("bfloat16", "float32"):
        for shape in _SHAPES:
            for operator in operators:
                yield Measured(operator, *shape, dtype)


KERNELS = Suite(
    name="kernels",
    cases=(
        *_cases_of(row_losses.DISTILLATION_FORWARD, row_losses.DISTILLATION_BACKWARD),
        Measured(STATISTICS, "cifar100", "CIFAR-100, large batch", (256, 100, 3072), "bfloat16"),
        Measured(replace(HEAD, contenders=()), *_LANGUAGE, (4096, 32000, 2048), "bfloat16"),
        *_cases_of(row_losses.CONFIDENT_FORWARD),
        *_cases_of(row_losses.SIMILARITY_FORWARD, row_losses.SIMILARITY_BACKWARD),
    ),
    contenders=(CUDA, TRITON),
    device="cuda-graphs",
)


def replayed(call: Results) -> list[Tensor]:
    """What a CUDA graph of a call gives when it is replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Libraries take memory at their first call in a stream.
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    graph.replay()
    return captured


class Place(NamedTuple):
    """Where this runs: on a GPU, or on what stands in for one.

    Attributes:
        device: where the tensors of the checks lie.
        suite: what is timed, and on which backends, which are checked before.
        replay: the results of a call from a graph.
        read_bytes: what the plain copy copies.
    """

    device: str
    suite: Suite
    replay: Callable[[Results], list[Tensor]]
    read_bytes: int


GPU = Place("cuda", KERNELS, replayed, 1 << 30)


# As many classes as in what is timed, so that Triton compiles each kernel once; few rows will do.
LOSSES: dict[str, Callable[[], Case]] = {
    "distillation, 128 × 1000, bfloat16": lambda: distillation_case(
        128, 1000, torch.bfloat16, ignored=3
    ),
    "distillation, 16 × 32000, float32": lambda: distillation_case(16, 32000),
    "similarity, 128 × 1000, float32": lambda: similarity_case(128, 1000, ignored=3),
    "introspective, 32 × 100 × 3072, bfloat16": lambda: introspective_case(
        32, 100, torch.bfloat16, shape=(3072,), ignored=2
    ),
    "head, 128 × 1000 × 256, bfloat16": lambda: linear_case(
        128, 1000, torch.bfloat16, width=256, ignored=2
    ),
}
EXPLANATIONS: dict[str, Callable[[], Case]] = {
    "statistics, 32 × 100 × 3072, bfloat16": lambda: introspective_case(
        32, 100, torch.bfloat16, shape=(3072,)
    ),
}


class ItemError(Exception):
    """Why an item failed, in a line."""


def check_loss(case: Case) -> Results:
    """Hold a loss and its gradients to the definition; gives what computes them again."""
    assert_follows_definition(case)
    return partial(results, leaves_of(case))


def check_statistics(case: Case) -> Results:
    """The same of the statistics of a case's explanations."""
    arguments = case["gradients"], case["inputs"], case["target"]
    gradients, inputs, target = arguments
    exact = ik.reference.explanation_stats(gradients.double(), inputs.double(), target)
    stats = ik.explanation_stats(*arguments)
    assert_accurate(stats.dots, exact.dots, "dots")
    assert_accurate(stats.sq_norms, exact.sq_norms, "sq_norms")
    return lambda: [*ik.explanation_stats(*arguments)[:2]]


def check(
    place: Place,
    backend: Contender,
    against_definition: Callable[[Case], Results],
    build: Callable[[], Case],
) -> str:
    """Have a backend compute a case against the definition, then twice and from a graph."""
    if (missing := backend.missing()) is not None:
        raise ItemError(f"not loaded: {missing}")
    torch.manual_seed(0)
    with backend.context(), torch.device(place.device):
        compute = against_definition(build())
        expected = compute()
        for when, actual in (("the second time", compute()), ("replayed", place.replay(compute))):
            try:
                assert_same(actual, expected)
            except AssertionError as error:
                raise ItemError(f"{when}, {error}") from error
    return "right, the same bits twice and from a graph"


def measure(
    place: Place, backend: Contender, case: Measured, keep: Callable[[list[Record]], None]
) -> str:
    """Time a case on a backend; ``keep`` gets the records, whatever they tell."""
    suite = replace(place.suite, contenders=(backend,))
    settings = Settings(
        torch.get_num_threads(), SECONDS_OF_A_CASE, memory=False, read_bytes=place.read_bytes
    )
    (found,) = run_suite(suite, [case], settings)
    keep(found)
    ours, *_, copy = found
    if ours["status"] != "timed":
        raise ItemError(f"{ours['status']}: {ours['reason']}")
    if case.flops is not None:
        rate = f"{case.flops / ours['seconds']['median'] / TERA:.0f} TFLOP/s"
    else:
        share = tables.percent(ours["percent_of_copy"])
        rate = f"{tables.bandwidth_cell(ours)}, {share} of a copy's {tables.bandwidth_cell(copy)}"
        gpu = ours["machine"].get("gpu", {}).get("name", "")
        if (expected := predicted(backend.name, case, gpu)) is not None:
            rate += f", predicted {tables.percent(100 * expected)}"
    return f"{tables.time_cell(ours)}, {rate}"


def predicted(backend: str, case: Measured, gpu: str) -> float | None:
    """The share of a copy that a kernel is predicted to reach on a GPU; None where nothing is."""
    kernel = PREDICTED.get(case.operator.name)
    text = Path(__file__).with_name("predicted.toml").read_text(encoding="utf-8")
    for entry in tomllib.loads(text)["kernels"]:
        what = entry["backend"], entry["kernel"], tuple(entry["shape"]), entry["dtype"]
        if what == (backend, kernel, case.shape, case.dtype):
            for name, figures in entry.items():
                if isinstance(figures, dict) and name in gpu:
                    share: float = figures["predicted"]
                    return share
    return None


class Item(NamedTuple):
    """Something to do, under a name; ``run`` gives a line, or raises."""

    name: str
    run: Callable[[], str]


def items_of(place: Place, keep: Callable[[list[Record]], None]) -> list[Item]:
    """All that is to be done, in order."""
    backends = place.suite.contenders
    checks = [
        Item(f"{backend.name}: {name}", partial(check, place, backend, against_definition, build))
        for backend in backends
        for against_definition, builds in (
            (check_loss, LOSSES),
            (check_statistics, EXPLANATIONS),
        )
        for name, build in builds.items()
    ]
    times = [
        Item(
            f"{backend.name}: {case.operator.name}, {size(case)}, {case.dtype}",
            partial(measure, place, backend, case, keep),
        )
        for case in place.suite.cases
        for backend in backends
    ]
    return checks + times


def size(case: Measured) -> str:
    return " × ".join(map(str, case.shape))


class Report:
    """What is said goes to the standard output and to a file, both up to date at any moment.

    Args:
        path: the file, which is to have the traces of what was raised too.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def say(self, text: str, end: str = "\n") -> None:
        print(text, end=end, flush=True)
        self.note(text, end)

    def note(self, text: str, end: str = "\n") -> None:
        """For the file alone."""
        self._file.write(f"{text}{end}")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def attempt(item: Item, report: Report) -> bool:
    """Run an item, and say what came of it on the line of its name; whether it succeeded."""
    report.say(f"{item.name}: ", end="")
    start = time.monotonic()
    try:
        told = item.run()
    except KeyboardInterrupt:
        report.say("FAILED: ended from outside")
        raise
    except Exception as error:  # whatever goes wrong is what is to be known
        first_line = next(iter(str(error).splitlines()), "")
        is_told = isinstance(error, (ItemError, AssertionError))
        report.say(f"FAILED: {first_line if is_told else f'{type(error).__name__}: {first_line}'}")
        report.note(textwrap.indent(traceback.format_exc(), "    "))
        return False
    report.say(f"{told} ({time.monotonic() - start:.1f} s)")
    return True


def main(out: Path, place: Place = GPU) -> int:
    """Do all that there is time for; 0 where nothing failed and nothing was left out."""
    if place.device == "cuda" and not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no GPU: nothing is checked or measured")
        return 1
    machine = environment.machine(place.device)
    path = out / f"{place.suite.name}-{environment.slug(machine)}.jsonl"
    stored: list[Record] = []

    def keep(found: list[Record]) -> None:
        """Both backends of a case are of one run, and one of them tells of the plain reads."""
        known = {record["case"] for record in stored}
        stored.extend(
            record | {"run": (stored or found)[0]["run"]}
            for record in found
            if record["role"] != "read" or record["case"] not in known
        )
        records.write(path, stored)

    items = items_of(place, keep)
    seconds = float(os.environ.get(LIMIT, SECONDS)) - SECONDS_OF_THE_REST
    outcomes: list[bool] = []
    with closing(Report(out / "smoke.txt")) as report:
        try:
            outcomes.extend(within(seconds, (attempt(item, report) for item in items)))
            left_out = items[len(outcomes) :]
        except KeyboardInterrupt:
            left_out = items[len(outcomes) + 1 :]
        for item in left_out:
            report.say(f"{item.name}: not run, no time was left")
        passed = sum(outcomes)
        report.say(f"{passed} of {len(items)} items passed")
    return 0 if passed == len(items) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
