"""Tables made from records, and from nothing else: for the README and for the terminal."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from introkernels.bench.environment import is_busy
from introkernels.bench.records import Record, key
from introkernels.bench.stale import AgeOf, fresh, notes

EAGER = "eager"
COMPILE = "compile"
# What other training steps are compared with.
PLAIN = "plain"
TITLES = {COMPILE: "torch.compile", "cpp": "C++", "cuda": "CUDA", "triton": "Triton"}

_MEGABYTE = 1e6
_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


class TableError(ValueError):
    """A table can't be put into a document; says why and what to do."""


def cases(records: Sequence[Record]) -> list[list[Record]]:
    """The records of each case at each number of threads, in the order of the file."""
    found: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        found.setdefault(key(record), []).append(record)
    return list(found.values())


def ranking(records: Sequence[Record]) -> list[Record]:
    """The contenders of a case, the fastest first; those without times last."""

    def order(record: Record) -> tuple[bool, float]:
        times = record["seconds"]
        return times is None, times["median"] if times else 0.0

    return sorted((record for record in records if record["role"] != "read"), key=order)


def speedup(records: Sequence[Record], name: str, over: str) -> float | None:
    """How many times faster contender ``name`` is than ``over``, both of one case and run."""
    ours, other = _find(records, name), _find(records, over)
    if not ours or not other or not ours["seconds"] or not other["seconds"]:
        return None
    return float(other["seconds"]["median"] / ours["seconds"]["median"])


def label(record: Record, age_of: AgeOf = fresh) -> str:
    """A case in words, with the mark of its age."""
    return f"{computation(record)}: {at(record)}{mark(record, age_of)}"


def computation(record: Record) -> str:
    """What is computed: ``head forward and backward``."""
    return f"{record['operator']} {'forward and backward' if record['backward'] else 'forward'}"


def at(record: Record) -> str:
    """At what it is computed: ``CIFAR-100, 64×100, float32``."""
    sizes = "×".join(map(str, record["sizes"].values()))
    return f"{record['about']}, {sizes}, {record['dtype']}"


def mark(record: Record, age_of: AgeOf) -> str:
    """`` †`` or `` ‡``, or nothing for a case that is up to date."""
    sign = age_of(record).value
    return f" {sign}" if sign else ""


def time_cell(record: Record | None) -> str:
    """The median, or what came instead of it."""
    if record is None:
        return ""
    return record["status"] if record["seconds"] is None else seconds(record["seconds"]["median"])


def seconds(value: float) -> str:
    """Three digits and a unit: ``12.3 ms``."""
    size, unit = next((unit for unit in _UNITS if value >= unit[0]), _UNITS[-1])
    return f"{_three_digits(value / size)} {unit}"


def factor(value: float | None) -> str:
    return "" if value is None else f"{_three_digits(value)}×"


def percent(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f} %" if value < 0.95 else f"{value:.0f} %"


def yardstick(records: Sequence[Record]) -> str:
    """What bandwidths were compared with: ``"copy"`` on a GPU, else ``"read"``."""
    return "copy" if _find(records, "copy") else "read"


def bandwidth(record: Record | None, name: str) -> str:
    """A percentage of a bandwidth, where memory, not arithmetic, sets the limit."""
    return "" if record is None or record["flops"] is not None else percent(record[name])


def bandwidth_cell(record: Record) -> str:
    return f"{_three_digits(record['gigabytes_per_second'])} GB/s"


def added_memory(record: Record | None) -> str:
    """Megabytes that a call adds beyond its inputs and what it hands out."""
    if record is None or record["memory"] is None or record["memory"]["added"] is None:
        return ""
    added = record["memory"]["added"] / _MEGABYTE
    return "< 1 MB" if added < 1 else f"{_three_digits(added)} MB"


def summary(records: Sequence[Record], age_of: AgeOf = fresh) -> tuple[list[str], list[list[str]]]:
    """Header and rows, one for each case, of records at one number of threads."""
    ours = _names(records, "ours")
    general = _names_of_all_operators(records)
    baselines = [name for name in (EAGER, COMPILE) if name in general]
    plain = yardstick(records)
    header = ["case", *(TITLES.get(name, name) for name in general)]
    for name in ours:
        title = TITLES.get(name, name)
        header += [f"{title} over {TITLES.get(base, base)}" for base in baselines]
        header += [f"{title} of `sum`", f"{title} of {plain}", f"{title} adds"]
    header += ["eager adds"] if EAGER in general and ours else []
    header.append("beside them")
    rows = []
    for case in cases(records):
        row = [label(case[0], age_of), *(time_cell(_find(case, name)) for name in general)]
        for name in ours:
            record = _find(case, name)
            row += [factor(speedup(case, name, base)) for base in baselines]
            row.append(bandwidth(record, "percent_of_sum"))
            row.append(bandwidth(record, f"percent_of_{plain}"))
            row.append(added_memory(record))
        if EAGER in general and ours:
            row.append(added_memory(_find(case, EAGER)))
        row.append(_beside(case, general, ours))
        rows.append(row)
    return header, rows


def is_steps(records: Sequence[Record]) -> bool:
    """Whether these are training steps, which do different things, beside a plain one."""
    return _find(records, PLAIN) is not None


def step_costs(
    records: Sequence[Record], age_of: AgeOf = fresh
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of training steps: the plain one's time, and how many such others take."""
    others = [name for name in _names(records, "other") if name != PLAIN]
    names = [*others, *_names(records, "ours")]
    rows = [
        [
            label(case[0], age_of),
            time_cell(_find(case, PLAIN)),
            *(factor(speedup(case, PLAIN, name)) for name in names),
        ]
        for case in cases(records)
    ]
    return ["training step", f"{PLAIN} step", *names], rows


def first_calls(
    records: Sequence[Record], age_of: AgeOf = fresh
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of what fresh processes needed, one row for each contender of a case."""
    header = ["case", "contender", "import torch", "import introkernels", "first call", "second"]
    rows = []
    for record in records:
        found = record["first_call"]
        if found is None:
            continue
        times = ("import_torch", "import_introkernels", "call", "second")
        cells = [found["reason"]] if found["reason"] else [seconds(found[name]) for name in times]
        rows.append([label(record, age_of), record["contender"], *cells])
    return header, [row + [""] * (len(header) - len(row)) for row in rows]


def _tables(records: Sequence[Record], age_of: AgeOf) -> list[tuple[list[str], list[list[str]]]]:
    if is_steps(records):
        return [step_costs(records, age_of)]
    found = [summary(records, age_of)]
    calls = first_calls(records, age_of)
    return [*found, calls] if calls[1] else found


def markdown(records: Sequence[Record], source: str, age_of: AgeOf = fresh) -> str:
    """The section of a README: machine, commits, a table for each number of threads, the data.

    Args:
        source: link to the file of the records, relative to the document.
        age_of: which cases get a mark; what it means is said below the tables.
    """
    blocks = []
    for threads in sorted({record["settings"]["threads"] for record in records}, reverse=True):
        part = [record for record in records if record["settings"]["threads"] == threads]
        blocks.append(f"{provenance(part)}:")
        for header, rows in _tables(part, age_of):
            lines = [_row(header), _row(["---"] + ["--:"] * (len(header) - 1))]
            blocks.append("\n".join([*lines, *(_row(row) for row in rows)]))
    blocks += notes(records, age_of)
    blocks.append(f"Data: [{source}]({source}).")
    return "\n\n".join(blocks)


def markers(suite: str) -> tuple[str, str]:
    """The two lines of a document between which the table of a suite stands."""
    return f"<!-- bench {suite}: made by introkernels bench --table -->", f"<!-- /bench {suite} -->"


def check_markers(document: str, suite: str) -> None:
    """Raise TableError unless ``document`` has one place for the table of ``suite``."""
    begin, end = markers(suite)
    once = document.count(begin) == 1 and document.count(end) == 1
    if not once or document.index(begin) > document.index(end):
        raise TableError(f"needs these two lines once, around the table's place:\n{begin}\n{end}")


def put_into(document: str, records: Sequence[Record], source: str, age_of: AgeOf = fresh) -> str:
    """``document`` with the tables of the records' suites brought up to date.

    Args:
        source: link to the file of the records, relative to the document.
        age_of: which cases get a mark.

    Raises:
        TableError: the document lacks the markers of a suite.
    """
    for suite in dict.fromkeys(record["suite"] for record in records):
        check_markers(document, suite)
        begin, end = markers(suite)
        head, _, rest = document.partition(begin)
        tail = rest.partition(end)[2]
        part = [record for record in records if record["suite"] == suite]
        document = f"{head}{begin}\n\n{markdown(part, source, age_of)}\n\n{end}{tail}"
    return document


def source_of(document: str, suite: str) -> str | None:
    """The link to the data that the table of a suite in ``document`` was made from."""
    begin, end = markers(suite)
    block = document.partition(begin)[2].partition(end)[0]
    found = re.search(r"^Data: \[([^\]]+)\]", block, re.MULTILINE)
    return found[1] if found else None


def relative_link(data: Path, document: Path) -> str:
    return Path(os.path.relpath(data.resolve(), document.resolve().parent)).as_posix()


def provenance(records: Sequence[Record]) -> str:
    first = records[0]
    machine, versions = first["machine"], first["versions"]
    threads = first["settings"]["threads"]
    revisions = dict.fromkeys(_revision(record["commit"]) for record in records)
    plain = yardstick(records)
    rates = [record["gigabytes_per_second"] for record in records if record["contender"] == plain]
    rate = f", plain {plain} up to {max(rates):.0f} GB/s" if rates else ""
    loads = [record["machine"]["load"] for record in records if is_busy(record["machine"])]
    warning = f", on a machine busy with other work (load up to {max(loads):.1f})" if loads else ""
    cpu = (
        f"{machine['cpu']}, {threads} {'thread' if threads == 1 else 'threads'} on "
        f"{machine['cores']} {'core' if machine['cores'] == 1 else 'cores'}"
    )
    processor = machine["gpu"]["name"] if "gpu" in machine else cpu
    triton = f"triton {versions['triton']}, " if versions.get("triton") else ""
    return (
        f"{processor}{rate}, "
        f"torch {versions['torch']}, {triton}introkernels {versions['introkernels']}, "
        f"{' and '.join(revisions)}{warning}"
    )


def _revision(commit: dict[str, Any] | None) -> str:
    if commit is None:
        return "installed"
    return f"commit {commit['revision'][:10]}" + (" with changes" if commit["changed"] else "")


def _beside(case: Sequence[Record], general: Sequence[str], ours: Sequence[str]) -> str:
    """The contenders that only this operator has, and how long ours takes of a floor."""
    texts = []
    for record in case:
        name = record["contender"]
        if name in general or record["role"] == "read":
            continue
        text = f"{TITLES.get(name, name)} {time_cell(record)}"
        if record["role"] == "floor":
            for own in ours:
                share = speedup(case, name, own)
                text += f" ({TITLES.get(own, own)} takes {factor(share)})" if share else ""
        texts.append(text)
    return ", ".join(texts)


def _names_of_all_operators(records: Sequence[Record]) -> list[str]:
    """Contenders that meet in every case; the others belong to an operator, as floors do."""
    names = [record["contender"] for record in records if record["role"] in ("ours", "other")]
    number = len(cases(records))
    return [name for name in dict.fromkeys(names) if names.count(name) == number]


def _names(records: Sequence[Record], role: str) -> list[str]:
    return list(dict.fromkeys(r["contender"] for r in records if r["role"] == role))


def _find(records: Sequence[Record], name: str) -> Record | None:
    return next((record for record in records if record["contender"] == name), None)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _three_digits(value: float) -> str:
    for digits, limit in ((2, 9.995), (1, 99.95)):
        if value < limit:
            return f"{value:.{digits}f}"
    return f"{value:,.0f}"
