"""The suite gpu of `introkernels bench`, with nothing installed beside PyTorch and Triton.

Results are written after each case, so that a run that is cut short keeps what it measured.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from introkernels.bench import environment, records, tables
from introkernels.bench.records import Record
from introkernels.bench.runner import Settings, run_suite
from introkernels.bench.suites import GPU

# Less than on a CPU: times on a GPU that nobody else uses hardly vary.
SECONDS_OF_A_CASE = 2.0


def main(out: Path) -> int:
    """Measure into ``gpu-<name of the GPU>.jsonl`` in ``out``; 1 where a kernel of ours failed."""
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no GPU: nothing is measured")
        return 1
    name = f"{GPU.name}-{environment.slug(environment.machine(GPU.device))}.jsonl"
    settings = Settings(torch.get_num_threads(), budget=SECONDS_OF_A_CASE, read_bytes=1 << 30)
    stored: list[Record] = []
    for found in run_suite(GPU, GPU.cases, settings):
        stored += found
        records.write(out / name, stored)
        print(tables.label(found[0]))
        for record in tables.ranking(found):
            print(f"  {line(record)}")
    print(f"\n{tables.markdown(stored, name)}")
    failed = [r for r in stored if r["role"] == "ours" and r["status"] != "timed"]
    for record in failed:
        print(f"{record['case']}: {record['contender']} {record['status']}: {record['reason']}")
    return 1 if failed else 0


def line(record: Record) -> str:
    """Contender, median, share of a copy's bandwidth, memory added; or why there are none."""
    if record["seconds"] is None:
        return f"{record['contender']:<10} {record['status']}: {record['reason']}"
    share = tables.bandwidth(record, "percent_of_copy")
    added = tables.added_memory(record)
    return f"{record['contender']:<10} {tables.time_cell(record):>9}  {share:>5} of copy  {added}"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
