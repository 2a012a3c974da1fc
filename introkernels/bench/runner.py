"""One case after the other: check every contender, time the right ones together, ask for memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch

from introkernels import checkout
from introkernels.bench import accuracy, environment
from introkernels.bench.devices import COPY, DEVICES, MOST_SETS, READ, Device
from introkernels.bench.first_call import FirstCallError, first_call
from introkernels.bench.memory import ProbeError
from introkernels.bench.model import Case, Contender, Suite, Tensors
from introkernels.bench.peers.installed import version_of
from introkernels.bench.records import FORMAT, Record
from introkernels.bench.timing import Member, Times, measure

GIGA = 1e9
# A set of inputs is used again only after that many times the last cache has passed.
CACHES_BETWEEN = 2
_SHARE_OF_MEMORY = 8

# What the bandwidth of a contender is compared with, beside it in the same rounds, and beside the
# device's own yardstick.
SUM = "sum"


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        threads: of torch, and of everything that asks torch.
        budget: seconds that the samples of a case may take.
        memory: measure peak memory too.
        read_bytes: size of the float32 tensor that is summed, on a GPU copied, as the plain read
            or copy of this machine.
    """

    threads: int
    budget: float = 8.0
    memory: bool = True
    read_bytes: int = 256 << 20


Report = Callable[[str, float], None]
"""Told what is being done, and which share of the case is done, from 0 to 1."""


@dataclass
class _Entry:
    """A contender on its way through a case."""

    contender: Contender
    status: str = "timed"
    reason: str | None = None
    function: Callable[..., Any] | None = None
    error: dict[str, float] | None = None
    tolerance: dict[str, float] | None = None
    handed_out: int = 0
    memory: dict[str, Any] | None = None
    first_call: dict[str, Any] | None = None

    @property
    def runs(self) -> bool:
        return self.status == "timed"


def run_suite(
    suite: Suite,
    cases: Sequence[Case],
    settings: Settings,
    on_progress: Callable[[Case, str, float], None] = lambda case, stage, share: None,
) -> Iterator[list[Record]]:
    """Yield the records of each case, as soon as it is measured.

    The number of threads of this process is set for the run and restored after it.
    """
    threads_before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        with closing(DEVICES[suite.device](settings.threads)) as device:
            common = {
                "run": datetime.now(UTC).isoformat(timespec="seconds"),
                "suite": suite.name,
                "machine": environment.machine(device.name),
                "versions": environment.versions(gpu=device.name == "cuda"),
                "commit": checkout.commit(),
                "settings": asdict(settings) | {"environment": environment.thread_variables()},
            }
            yardstick = device.yardstick_call(settings.read_bytes)
            for case in cases:

                def report(stage: str, share: float, case: Case = case) -> None:
                    on_progress(case, stage, share)

                found = _run_case(suite, case, settings, device, yardstick, report)
                yield [{"format": FORMAT, **common, **record} for record in found]
    finally:
        torch.set_num_threads(threads_before)


def number_of_sets(bytes_of_set: int, last_cache: int, memory: int) -> int:
    """How many sets of inputs take turns, so that caches don't flatter: 2 to 16.

    As many as fill the last cache twice, within an eighth of the memory if that leaves two.
    """
    wanted = -(-CACHES_BETWEEN * last_cache // max(bytes_of_set, 1))
    affordable = memory // _SHARE_OF_MEMORY // max(bytes_of_set, 1)
    return max(2, min(wanted, affordable, MOST_SETS))


def _run_case(
    suite: Suite,
    case: Case,
    settings: Settings,
    device: Device,
    yardstick: tuple[Callable[[], object], int],
    report: Report,
) -> list[Record]:
    report("drawing inputs", 0.0)
    sets = _draw_sets(case, device)
    report("checking", 0.1)
    expected = None if case.operator.is_step else accuracy.expected_outcome(case, sets[0])
    contenders = suite.contenders_of(case)
    entries = []
    for number, contender in enumerate(contenders, 1):
        entries.append(_checked(case, contender, sets[0], expected))
        report("checking", 0.1 + 0.3 * number / len(contenders))
    del expected

    members = [
        Member(entry.contender.name, _rotating(case, entry.function, sets), entry.contender.context)
        for entry in entries
        if entry.function is not None and entry.runs
    ]
    largest = itertools.cycle([tensors[case.operator.largest].detach() for tensors in sets])
    members.append(Member(SUM, lambda: next(largest).sum()))
    move, bytes_moved = yardstick
    members.append(Member(device.yardstick, move))
    times = measure(
        members,
        settings.budget,
        lambda share: report("timing", 0.4 + 0.5 * share),
        device.clock,
    )

    if settings.memory:
        for number, entry in enumerate(entries):
            report("measuring memory", 0.9 + 0.1 * number / len(entries))
            if entry.runs:
                entry.memory = _memory(device, case, entry, sets[0])
    if suite.first_call:
        for number, entry in enumerate(entries):
            report("measuring first calls", 0.9 + 0.1 * number / len(entries))
            if entry.runs:
                entry.first_call = _first_call(device, case, entry.contender, settings)
    report("done", 1.0)

    bytes_of_sum = sets[0][case.operator.largest].nbytes
    rates = {
        SUM: bytes_of_sum / times[SUM].median / GIGA,
        # The best of the samples: what this machine can move at all.
        device.yardstick: bytes_moved / times[device.yardstick].best / GIGA,
    }
    records = [
        *(_record_of_entry(case, entry, times.get(entry.contender.name)) for entry in entries),
        _record(case, SUM, "read", bytes_of_sum, times[SUM]),
        _record(case, device.yardstick, "read", bytes_moved, times[device.yardstick]),
    ]
    for record in records:
        _compare_with_reads(record, rates)
        record["input_sets"] = len(sets)
    return records


def _draw_sets(case: Case, device: Device) -> list[Tensors]:
    first = case.draw(0, device.name)
    size = sum(tensor.nbytes for tensor in first.values())
    count = number_of_sets(size, device.last_cache, device.memory)
    return [first, *(case.draw(seed, device.name) for seed in range(1, count))]


def _checked(
    case: Case, contender: Contender, tensors: Tensors, expected: Tensors | None
) -> _Entry:
    """Call a contender for the first time, and compare what it hands out with the definition.

    Where there is none to compare with, results have to be finite.
    """
    missing = contender.missing()
    if missing is not None:
        return _Entry(contender, "unavailable", missing)
    try:
        function = contender.prepare(case.operator)
        with contender.context():
            result = case.operator.run(function, tensors)
    except Exception as error:  # one contender's failure is its result
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return _Entry(contender, "unavailable", reason)
    found = case.operator.outcome(result, tensors)
    entry = _Entry(contender, function=function)
    entry.handed_out = sum(tensor.nbytes for tensor in found.values())
    if expected is None:
        wrong = [name for name, value in found.items() if not value.isfinite().all()]
        reason = f"not finite: {', '.join(wrong)}"
        return replace(entry, status="refused", reason=reason) if wrong else entry
    if contender.role == "floor":
        return entry
    entry.error = accuracy.errors(found, expected)
    entry.tolerance = accuracy.tolerances(found, expected)
    if not accuracy.is_right(entry.error, entry.tolerance):
        return replace(entry, status="refused", reason=_wrong(entry.error, entry.tolerance))
    return entry


def _wrong(error: dict[str, float], tolerance: dict[str, float]) -> str:
    wrong = [
        f"{name} is off by {value:.1e} where {tolerance[name]:.1e} is allowed"
        for name, value in error.items()
        if not value <= tolerance[name]
    ]
    return "; ".join(wrong)


def _rotating(
    case: Case, function: Callable[..., Any], sets: Sequence[Tensors]
) -> Callable[[], object]:
    turn = itertools.cycle(sets)
    run = case.operator.run
    return lambda: run(function, next(turn))


def _memory(device: Device, case: Case, entry: _Entry, tensors: Tensors) -> dict[str, Any]:
    assert entry.function is not None
    try:
        peak = device.peak(case, entry.contender, entry.function, tensors)
    except ProbeError as error:
        return {"peak": None, "handed_out": entry.handed_out, "added": None, "reason": str(error)}
    added = max(0, peak - entry.handed_out)
    return {"peak": peak, "handed_out": entry.handed_out, "added": added, "reason": None}


def _first_call(
    device: Device, case: Case, contender: Contender, settings: Settings
) -> dict[str, Any]:
    try:
        found = asdict(first_call(case, contender, device.name, settings.threads))
    except FirstCallError as error:
        return {"reason": str(error)}
    return found | {"reason": None}


def _record_of_entry(case: Case, entry: _Entry, times: Times | None) -> Record:
    contender = entry.contender
    record = _record(case, contender.name, contender.role, case.bytes_moved, times)
    return record | {
        "status": entry.status,
        "reason": entry.reason,
        "error": None if entry.error is None else _finite(entry.error),
        "tolerance": entry.tolerance,
        "memory": entry.memory,
        "first_call": entry.first_call,
        "package": contender.distribution and version_of(contender.distribution),
        "made_equal": contender.made_equal,
    }


def _finite(errors: dict[str, float]) -> dict[str, float | None]:
    """JSON has neither NaN nor infinity; such an error is recorded as None."""
    return {name: value if math.isfinite(value) else None for name, value in errors.items()}


def _record(case: Case, contender: str, role: str, moved: int, times: Times | None) -> Record:
    # What a network moves in a training step is not counted, and its bandwidth means nothing.
    counts_all = role == "read" or not case.operator.is_step
    rate = moved / times.median / GIGA if times is not None and counts_all else None
    return {
        "case": case.name,
        "about": case.about,
        "operator": case.operator.name,
        "sizes": case.sizes,
        "dtype": case.dtype,
        "backward": bool(case.operator.differentiable) or case.operator.is_step,
        "contender": contender,
        "role": role,
        "status": "timed",
        "reason": None,
        "seconds": None if times is None else asdict(times),
        "error": None,
        "tolerance": None,
        "bytes": moved,
        "flops": None if role == "read" else case.flops,
        "gigabytes_per_second": rate,
        "percent_of_sum": None,
        "percent_of_read": None,
        "percent_of_copy": None,
        "memory": None,
        "first_call": None,
        "package": None,
        "made_equal": None,
    }


def _compare_with_reads(record: Record, rates: dict[str, float]) -> None:
    rate = record["gigabytes_per_second"]
    if rate is not None:
        for name in (SUM, READ, COPY):
            if name in rates:
                record[f"percent_of_{name}"] = 100 * rate / rates[name]
