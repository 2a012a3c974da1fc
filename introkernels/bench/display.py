"""What `introkernels bench` shows in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from introkernels.bench import tables
from introkernels.bench.records import Record


def show_case(records: Sequence[Record], console: Console) -> None:
    """All contenders of a case, the fastest first."""
    table = Table(title=tables.label(records[0]), title_justify="left", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    plain = tables.yardstick(records)
    for name in ("median", "±", "over\neager", "over\ncompile", "of\nsum", f"of\n{plain}"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("memory\nadded", justify="right", no_wrap=True)
    table.add_column("error", justify="right", no_wrap=True)
    for record in tables.ranking(records):
        name = record["contender"]
        table.add_row(
            f"{name}, floor" if record["role"] == "floor" else name,
            tables.time_cell(record),
            _spread(record),
            tables.factor(tables.speedup(records, name, tables.EAGER)),
            tables.factor(tables.speedup(records, name, tables.COMPILE)),
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
    console.print()


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
