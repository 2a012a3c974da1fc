"""What `introkernels bench` shows in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from introkernels.bench import stale, tables
from introkernels.bench.against import SMALLEST_DIFFERENCE, Comparison
from introkernels.bench.records import Record
from introkernels.bench.stale import AgeOf


def show_case(records: Sequence[Record], console: Console, age_of: AgeOf = stale.fresh) -> None:
    """All contenders of a case, the fastest first.

    Args:
        age_of: of measurements that were read from a file.
    """
    title = tables.label(records[0], age_of)
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    plain = tables.yardstick(records)
    steps = tables.is_steps(records)
    beside = ("times\nplain",) if steps else ("over\neager", "over\ncompile")
    for name in ("median", "±", *beside, "of\nsum", f"of\n{plain}"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("memory\nadded", justify="right", no_wrap=True)
    table.add_column("error", justify="right", no_wrap=True)
    for record in tables.ranking(records):
        name = record["contender"]
        table.add_row(
            f"{name}, floor" if record["role"] == "floor" else name,
            tables.time_cell(record),
            _spread(record),
            *_beside(records, name, steps),
            tables.bandwidth(record, "percent_of_sum"),
            tables.bandwidth(record, f"percent_of_{plain}"),
            tables.added_memory(record),
            _worst_error(record),
        )
    reads = {
        record["contender"]: tables.bandwidth_cell(record)
        for record in records
        if record["role"] == "read"
    }
    table.caption = ", ".join(f"{name} {rate}" for name, rate in reads.items())
    table.caption_justify = "left"
    console.print(table)
    for record in records:
        if record["reason"]:
            console.print(f"{record['contender']}: {record['reason']}")
        if record["made_equal"]:
            console.print(f"{record['contender']}, made equal: {record['made_equal']}")
    _show_first_calls(records, console)
    console.print()


def _show_first_calls(records: Sequence[Record], console: Console) -> None:
    """What a fresh process needed, where that was measured."""
    header, rows = tables.first_calls(records)
    if not rows:
        return
    # The case stands above.
    table = Table(title="First call in a fresh process", title_justify="left", box=None)
    for name in header[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row[1:])
    console.print(table)


def show_notes(records: Sequence[Record], console: Console, age_of: AgeOf) -> None:
    """What the marks in the titles of these cases mean."""
    for note in stale.notes(records, age_of):
        console.print(note)


def show_comparisons(
    found: Sequence[Comparison], revision: str, commit: str, console: Console
) -> None:
    """Our contenders before and after, case by case, and what the verdict means."""
    title = f"Before: {revision} ({commit[:10]}); after: the tree as it is here"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("case", overflow="fold")
    table.add_column("", no_wrap=True)
    for name in ("before", "after", "after /\nbefore", "95 % interval", "pairs"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for comparison in found:
        table.add_row(comparison.case, comparison.contender, *_cells(comparison))
    least = tables.percent(100 * SMALLEST_DIFFERENCE)
    table.caption = (
        f"Faster or slower: the whole interval is more than {least} away from 1, as two processes "
        "of the same code can differ by so much. Each interval stands for itself: of twenty, one "
        "misses its ratio."
    )
    table.caption_justify = "left"
    console.print(table)


def _cells(comparison: Comparison) -> tuple[str, ...]:
    ratio = comparison.ratio
    if comparison.before is None or comparison.after is None or ratio is None:
        return "", "", "", "", "", comparison.reason or ""
    return (
        tables.seconds(comparison.before),
        tables.seconds(comparison.after),
        f"{ratio.median:.3f}",
        f"{ratio.low:.3f}–{ratio.high:.3f}",
        str(ratio.pairs),
        ratio.verdict,
    )


def _beside(records: Sequence[Record], name: str, steps: bool) -> tuple[str, ...]:
    """How a contender stands to those that others are compared with."""
    if steps:
        return (tables.factor(tables.speedup(records, tables.PLAIN, name)),)
    return tuple(
        tables.factor(tables.speedup(records, name, base))
        for base in (tables.EAGER, tables.COMPILE)
    )


def _spread(record: Record) -> str:
    """Half of the distance between the quartiles, as a share of the median."""
    times = record["seconds"]
    if times is None:
        return ""
    half = (times["upper_quartile"] - times["lower_quartile"]) / 2
    return tables.percent(100 * half / times["median"])


def _worst_error(record: Record) -> str:
    if record["error"] is None:
        return ""
    known = [value for value in record["error"].values() if value is not None]
    return f"{max(known):.0e}" if len(known) == len(record["error"]) else "not finite"
