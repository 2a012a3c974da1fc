"""Plots made from records, and from nothing else: bandwidth, time and memory, as SVG.

There is a set of plots for each suite, machine and number of threads, since only times of one
machine can stand beside each other.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from introkernels.bench import tables
from introkernels.bench.environment import slug
from introkernels.bench.records import Record, key
from introkernels.bench.stale import AgeOf, notes
from introkernels.bench.tables import COMPILE, EAGER, TITLES
from introkernels.plotting import COLOURS, styled, svg

# So many points make a curve.
FEWEST_POINTS = 3
MEGABYTE = 1e6


@dataclass(frozen=True)
class Swept:
    """A size that cases of a sweep differ in, and what it is."""

    size: str
    words: str


CLASSES = Swept("C", "classes C")
DIMENSIONS = Swept("D", "dimensions D")

_GREY, _ORANGE, _GREEN, _SKY, _BLUE, _PINK, _RED = COLOURS
_OWN_COLOURS = {
    EAGER: _GREY,
    COMPILE: _ORANGE,
    "cpp": _BLUE,
    "cuda": _GREEN,
    "triton": _RED,
    "reference": _PINK,
}
# Those of contenders that are not there are free for others.
_OTHER_COLOURS = (_SKY, _PINK, _GREEN, _RED, _BLUE, _ORANGE, _GREY)
_OTHER_MARKERS = "sD^vP*X"
_PANELS_IN_A_ROW = 2
# In the title, so that its lines end before the figure does.
_LETTERS_OF_AN_INCH = 13


class PlotError(ValueError):
    """Records that can't be plotted together; says which."""


@dataclass
class Plots:
    """SVG texts by the name of their file, and what the records don't suffice for."""

    made: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


def plots(records: Sequence[Record], age_of: AgeOf) -> Plots:
    """All plots that these records suffice for.

    Raises:
        PlotError: two runs measured the same case at the same place.
    """
    found = Plots()
    for place, part in _places(records).items():
        with styled():
            for kind, (make, lacking) in _KINDS.items():
                figure = make(part, age_of)
                if figure is None:
                    found.skipped.append(f"{place}-{kind}: {lacking}")
                else:
                    found.made[f"{place}-{kind}.svg"] = svg(figure)
    return found


def bandwidth_bars(records: Sequence[Record], age_of: AgeOf) -> Figure | None:
    """Of each case that memory limits: ours, eager and compiled code in percent of a plain read.

    On a GPU it is a plain copy. Cases with products of matrices have other limits.
    """
    plain = tables.yardstick(records)
    kept = [
        (case, bars)
        for case in tables.cases(records)
        if not tables.is_steps(case)
        and (bars := [record for record in case if _is_bar(record, plain)])
    ]
    if not kept:
        return None
    names = _in_order(record for _, bars in kept for record in bars)
    looks = _looks(names)
    count = sum(len(bars) for _, bars in kept)
    figure = Figure(figsize=(9, 1.5 + 0.2 * count + 0.16 * len(kept)), layout="constrained")
    axis = figure.subplots()
    row = 0.0
    ticks = []
    for case, bars in kept:
        top = row
        for record in sorted(bars, key=lambda record: names.index(record["contender"])):
            name, value = record["contender"], record[f"percent_of_{plain}"]
            axis.barh(row, value, height=0.86, color=looks[name]["color"])
            shown = f"{tables.percent(value)}, {tables.time_cell(record)}"
            axis.annotate(
                shown,
                (value, row),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
                color="#3b424c",
            )
            row += 1
        words = f"{tables.computation(case[0])}{tables.mark(case[0], age_of)}\n{tables.at(case[0])}"
        ticks.append(((top + row - 1) / 2, words))
        row += 0.8
    axis.axvline(100, color="#1c2027", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    axis.set_yticks([place for place, _ in ticks], [words for _, words in ticks], fontsize=8.5)
    axis.set_ylim(row - 0.9, -0.9)
    axis.margins(x=0.16)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axis.set_xlabel(f"bandwidth; 100 % is a plain {plain} in the same run")
    axis.grid(visible=True, axis="x")
    axis.set_axisbelow(True)
    handles = [Patch(color=looks[name]["color"], label=TITLES.get(name, name)) for name in names]
    drawn = [record for case, _ in kept for record in case]
    _finish(figure, handles, f"Bandwidth, in percent of a plain {plain}", drawn, age_of)
    return figure


def time_by_classes(records: Sequence[Record], age_of: AgeOf) -> Figure | None:
    """Median time against C, a panel for each operator, dtype and set of other sizes."""
    return _swept(records, age_of, CLASSES, _milliseconds, "Time of a call", "ms", lowest=0.0)


def time_by_dimensions(records: Sequence[Record], age_of: AgeOf) -> Figure | None:
    """Median time against D, a panel for each operator, dtype and set of other sizes."""
    return _swept(records, age_of, DIMENSIONS, _milliseconds, "Time of a call", "ms", lowest=0.0)


def _milliseconds(record: Record) -> float | None:
    return record["seconds"]["median"] * 1e3 if record["seconds"] else None


def memory_by_classes(records: Sequence[Record], age_of: AgeOf) -> Figure | None:
    """Memory that a call adds against C, panels as those of the time.

    It is known to about a megabyte, so what is less is drawn as one.
    """

    def megabytes(record: Record) -> float | None:
        added = record["memory"]["added"] if record["memory"] else None
        return None if added is None else added / MEGABYTE

    title = "Memory that a call adds (1 MB or less is drawn as 1)"
    return _swept(records, age_of, CLASSES, megabytes, title, "MB", lowest=1.0)


_Make = Callable[[Sequence[Record], AgeOf], Figure | None]
_CURVE = f"needs an operator at {FEWEST_POINTS} or more {{}}, its other sizes and dtype the same"
_OVER_CLASSES = _CURVE.format(CLASSES.size)
_KINDS: dict[str, tuple[_Make, str]] = {
    "bandwidth": (bandwidth_bars, "needs a case that memory limits, timed in its run"),
    "time": (time_by_classes, _OVER_CLASSES),
    "time-of-dimensions": (time_by_dimensions, _CURVE.format(DIMENSIONS.size)),
    "memory": (memory_by_classes, f"{_OVER_CLASSES}, and its memory measured"),
}


def _places(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each suite, machine and number of threads, by a name for files."""
    places: dict[str, list[Record]] = {}
    runs: dict[tuple[str, tuple[str, int]], str] = {}
    for record in records:
        threads = record["settings"]["threads"]
        unit = "thread" if threads == 1 else "threads"
        place = f"{record['suite']}-{slug(record['machine'])}-{threads}-{unit}"
        if runs.setdefault((place, key(record)), record["run"]) != record["run"]:
            raise PlotError(f"{record['case']} of {place} comes from two runs: give one file only")
        places.setdefault(place, []).append(record)
    return places


def _is_bar(record: Record, plain: str) -> bool:
    compared = record["role"] == "ours" or record["contender"] in (EAGER, COMPILE)
    known = record["flops"] is None and record[f"percent_of_{plain}"] is not None
    return bool(compared and known)


def _swept(
    records: Sequence[Record],
    age_of: AgeOf,
    swept: Swept,
    value: Callable[[Record], float | None],
    title: str,
    unit: str,
    lowest: float,
) -> Figure | None:
    groups = _sweeps(records, swept.size)
    panels = [panel for group in groups if (panel := _curves(group, swept.size, value))]
    if not panels:
        return None
    names = _in_order(record for panel in panels for curve in panel.values() for record in curve)
    looks = _looks(names)
    columns = min(_PANELS_IN_A_ROW, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(1.2 + 4.4 * columns, 1.3 + 3.1 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, panel in zip(axes, panels, strict=False):
        _draw_curves(axis, panel, swept, value, looks, age_of, lowest)
        axis.set_ylabel(unit)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    handles = [Line2D([], [], label=TITLES.get(name, name), **looks[name]) for name in names]
    drawn = [record for panel in panels for curve in panel.values() for record in curve]
    _finish(figure, handles, title, drawn, age_of)
    return figure


def _draw_curves(
    axis: Axes,
    panel: dict[str, list[Record]],
    swept: Swept,
    value: Callable[[Record], float | None],
    looks: dict[str, dict[str, Any]],
    age_of: AgeOf,
    lowest: float,
) -> None:
    for name, curve in panel.items():
        places = [record["sizes"][swept.size] for record in curve]
        axis.plot(places, [max(value(record) or 0.0, lowest) for record in curve], **looks[name])
    of_all = [record for curve in panel.values() for record in curve]
    ticks = sorted({record["sizes"][swept.size] for record in of_all})
    first = of_all[0]
    sizes = "×".join(
        name if name == swept.size else str(size) for name, size in first["sizes"].items()
    )
    marks = dict.fromkeys(tables.mark(record, age_of) for record in of_all)
    axis.set_title(f"{tables.computation(first)}, {sizes}, {first['dtype']}{''.join(marks)}")
    axis.set_xscale("log")
    axis.set_yscale("log")
    # Small enough for half a decade between two of them.
    axis.set_xticks(ticks, [f"{number:,}" for number in ticks], fontsize=8)
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel(swept.words)
    axis.grid(visible=True, axis="both")
    axis.set_axisbelow(True)


def _sweeps(records: Sequence[Record], swept: str) -> list[list[Record]]:
    """Records of each operator that differ in one size alone."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if record["role"] != "read" and swept in record["sizes"]:
            others = tuple((name, size) for name, size in record["sizes"].items() if name != swept)
            kind = record["operator"], record["dtype"], others
            groups.setdefault(kind, []).append(record)
    return list(groups.values())


def _curves(
    group: Sequence[Record], swept: str, value: Callable[[Record], float | None]
) -> dict[str, list[Record]]:
    """The contenders of a group with a value at enough sizes, and their records by rising size.

    Of cases that differ in their names alone the first counts.
    """
    curves: dict[str, dict[int, Record]] = {}
    for record in group:
        if value(record) is not None:
            points = curves.setdefault(record["contender"], {})
            points.setdefault(record["sizes"][swept], record)
    return {
        name: [points[size] for size in sorted(points)]
        for name, points in curves.items()
        if len(points) >= FEWEST_POINTS
    }


def _in_order(records: Any) -> list[str]:
    """The contenders by name: ours, then eager and compiled code, then the others."""
    roles = {record["contender"]: record["role"] for record in records}

    def order(name: str) -> int:
        usual = (EAGER, COMPILE)
        return 0 if roles[name] == "ours" else 1 + usual.index(name) if name in usual else 3

    return sorted(roles, key=order)


def _looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, line and marker of each contender; where colours come twice, markers differ."""
    looks: dict[str, dict[str, Any]] = {}
    others = [name for name in names if name not in _OWN_COLOURS]
    taken = {_OWN_COLOURS[name] for name in names if name in _OWN_COLOURS}
    free = [colour for colour in _OTHER_COLOURS if colour not in taken]
    for name in names:
        own = name in _OWN_COLOURS
        number = 0 if own else others.index(name)
        looks[name] = {
            "color": _OWN_COLOURS.get(name) or free[number % len(free)],
            "linestyle": "-" if own else "--",
            "marker": "o" if own else _OTHER_MARKERS[number % len(_OTHER_MARKERS)],
            "linewidth": 1.8,
            "markersize": 4.5,
        }
    return looks


def _finish(
    figure: Figure, handles: Sequence[Any], title: str, records: Sequence[Record], age_of: AgeOf
) -> None:
    """Title with where it was measured and what the marks mean, and legend."""
    width = int(_LETTERS_OF_AN_INCH * figure.get_figwidth())
    lines = textwrap.wrap(tables.provenance(records), width)
    for note in notes(records, age_of):
        lines += textwrap.wrap(note, width)
    figure.suptitle("\n".join([title, *lines]), x=0.01, ha="left", fontsize=9)
    figure.legend(
        handles=list(handles), loc="outside lower center", ncols=min(5, len(handles)), frameon=False
    )
