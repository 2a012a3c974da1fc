"""The suite gpu of `introkernels bench` without compiled code, where only PyTorch and Triton are.

Results are written after each case, so that a run that is cut short keeps what it measured. A case
is not begun where the longest one so far would not fit into the time that `make gpu-check` gives.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from introkernels.bench import environment, records, tables
from introkernels.bench.contenders import COMPILE
from introkernels.bench.records import Record
from introkernels.bench.runner import Settings, run_suite
from introkernels.bench.suites import GPU

# Inductor takes minutes that this has not.
SUITE = replace(GPU, contenders=tuple(one for one in GPU.contenders if one is not COMPILE))

# Less than on a CPU: times on a GPU that nobody else uses hardly vary.
SECONDS_OF_A_CASE = 2.0
# What a part of `make gpu-check` may take, as its environment says; of that, for imports before and
# for the table after the cases.
LIMIT = "INTROKERNELS_PART_SECONDS"
SECONDS_OF_THE_REST = 25.0

Result = TypeVar("Result")


def within(
    seconds: float, results: Iterator[Result], clock: Callable[[], float] = time.monotonic
) -> Iterator[Result]:
    """What ``results`` gives, until the one that took longest would no longer fit."""
    longest = 0.0
    before = clock()
    end = before + seconds
    while before + longest < end:
        try:
            result = next(results)
        except StopIteration:
            return
        now = clock()
        longest = max(longest, now - before)
        before = now
        yield result


def main(out: Path) -> int:
    """Measure into ``gpu-<name of the GPU>.jsonl`` in ``out``.

    1 where a kernel of ours failed, or where there was no time for a case.
    """
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no GPU: nothing is measured")
        return 1
    name = f"{SUITE.name}-{environment.slug(environment.machine(SUITE.device))}.jsonl"
    settings = Settings(torch.get_num_threads(), budget=SECONDS_OF_A_CASE, read_bytes=1 << 30)
    stored: list[Record] = []
    seconds = float(os.environ.get(LIMIT, "inf")) - SECONDS_OF_THE_REST
    left_out = [case.name for case in SUITE.cases]
    for found in within(seconds, run_suite(SUITE, SUITE.cases, settings)):
        left_out.remove(found[0]["case"])
        stored += found
        records.write(out / name, stored)
        print(tables.label(found[0]))
        for record in tables.ranking(found):
            print(f"  {line(record)}")
    print(f"\n{tables.markdown(stored, name)}")
    failed = [r for r in stored if r["role"] == "ours" and r["status"] != "timed"]
    for record in failed:
        print(f"{record['case']}: {record['contender']} {record['status']}: {record['reason']}")
    if left_out:
        print(f"no time was left for {', '.join(left_out)}")
    return 1 if failed or left_out else 0


def line(record: Record) -> str:
    """Contender, median, share of a copy's bandwidth, memory added; or why there are none."""
    if record["seconds"] is None:
        return f"{record['contender']:<10} {record['status']}: {record['reason']}"
    share = tables.bandwidth(record, "percent_of_copy")
    added = tables.added_memory(record)
    return f"{record['contender']:<10} {tables.time_cell(record):>9}  {share:>5} of copy  {added}"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
