"""The figures of a study's report, each a function from results to a matplotlib figure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from introkernels.plotting import COLOURS
from introkernels.train.findings import number, readable
from introkernels.train.study.analysis import GROUPS, Difference, Results
from introkernels.train.study.costs import costs
from introkernels.train.summary import half_width_95

INK, SOFT = "#1c2027", "#9aa1ab"
GROUP_COLOURS = dict(
    zip(
        GROUPS,
        ("#6b7280", "#e69f00", "#009e73", "#0072b2", "#cc79a7", "#56b4e9", "#d55e00", INK),
        strict=True,
    )
)
MAIN_COLOURS = dict(
    zip(
        ("standard", "label_smoothing", "mixup", "kd", "deep_mutual_learning"),
        ("#6b7280", "#e69f00", "#56b4e9", "#0072b2", "#cc79a7"),
        strict=True,
    )
)
"""The methods, beside the representative, that are followed from size to size."""


def paired_differences(results: Results, reference: str, places: Sequence[int | None]) -> Figure:
    """Each method's accuracy minus the reference's, a panel for each place: seeds and intervals."""
    methods = [name for name in results.methods if name != reference]
    columns = min(3, len(places))
    rows = math.ceil(len(places) / columns)
    height = 0.25 * len(methods) + 0.9
    figure = Figure(figsize=(10, rows * height + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    found = {
        place: [results.difference(name, reference, place) for name in methods] for place in places
    }
    seeds = len(places) == 1
    limits = _fences([0.0, *(end for group in found.values() for end in _ends(group, seeds=seeds))])
    colours = [GROUP_COLOURS[results.group[name]] for name in methods]
    for axis, place in zip(axes.flat, places, strict=False):
        _intervals(axis, found[place], colours, limits, seeds=seeds)
        _between_groups(axis, [results.group[name] for name in methods])
        axis.set_title(_wrapped(results.place_name(place)), fontsize=9.5)
        axis.set_yticks(range(len(methods)), [readable(name) for name in methods], fontsize=9)
        axis.set_ylim(len(methods) - 0.4, -0.6)
        axis.set_xlabel(f"minus {readable(reference)} (points)", fontsize=9)
    for axis in list(axes.flat)[len(places) :]:
        axis.set_visible(False)
    if seeds:
        axes[0, 0].set_xlabel(f"accuracy minus that of {readable(reference)}, percentage points")
    _group_legend(figure, results, methods)
    _mark_synthetic(figure, results)
    return figure


def effects(results: Results, pairs: Sequence[tuple[str, str, str]]) -> Figure:
    """Differences between pairs of methods (label, method, reference): all cells, and each."""
    figure = Figure(figsize=(10, 1.1 + 0.62 * len(pairs)), layout="constrained")
    axis = figure.subplots()
    whole, *cells = results.places
    found = {
        place: [results.difference(method, reference, place) for _, method, reference in pairs]
        for place in results.places
    }
    values = [0.0, *_ends(found[whole], seeds=not cells)]
    values += [100 * one.mean for cell in cells for one in found[cell] if one.mean is not None]
    limits = (min(values), max(values))
    _intervals(axis, found[whole], [INK] * len(pairs), limits, seeds=not cells)
    handles = [
        Line2D([], [], color=INK, marker="D", markersize=5.5, label=results.place_name(whole))
    ]
    for index, (cell, offset) in enumerate(
        zip(cells, np.linspace(0.2, 0.38, len(cells)), strict=True)
    ):
        colour = COLOURS[1 + index % (len(COLOURS) - 1)]
        marker = "os^vP"[index // (len(COLOURS) - 1) % 5]
        for row, one in enumerate(found[cell]):
            if one.mean is not None:
                axis.scatter(
                    100 * one.mean,
                    row + offset,
                    s=24,
                    color=colour,
                    marker=marker,
                    linewidth=0,
                    zorder=3,
                )
        name = results.place_name(cell)
        handles.append(Line2D([], [], color=colour, marker=marker, linewidth=0, label=name))
    axis.set_yticks(range(len(pairs)), [label for label, _, _ in pairs], fontsize=9)
    axis.set_ylim(len(pairs) - 0.4, -0.6)
    axis.set_xlabel("difference of accuracy, percentage points")
    if cells:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8.5
        )
    _mark_synthetic(figure, results)
    return figure


def accuracy_by_size(results: Results) -> Figure | None:
    """Accuracy against the number of training images, a panel for each data set, model and noise.

    None unless the study has several sizes of some training set.
    """
    panels: dict[tuple[str, str, float], dict[float, int]] = {}
    for index, cell in enumerate(results.study["cells"]):
        if cell["train_size"] is not None:
            key = (cell["dataset"], cell["model"], cell["label_noise"])
            panels.setdefault(key, {})[cell["train_size"]] = index
    panels = {key: sizes for key, sizes in panels.items() if len(sizes) > 1}
    if not panels:
        return None
    names = [
        name for name in (*MAIN_COLOURS, results.study["representative"]) if name in results.group
    ]
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(10, 3.4 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, ((dataset, model, noise), sizes) in zip(axes.flat, panels.items(), strict=False):
        for place, name in enumerate(names):
            _by_size(axis, results, name, sizes, 1 + 0.022 * (place - (len(names) - 1) / 2))
        axis.set_xscale("log")
        axis.set_xticks(sorted(sizes), [str(size) for size in sorted(sizes)])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.minorticks_off()
        labels = f"{100 * noise:g} % label noise" if noise else "clean labels"
        axis.set_title(f"{dataset}, {model}, {labels}", fontsize=9.5)
        axis.set_xlabel("training images")
        axis.grid(visible=True)
        axis.set_axisbelow(True)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    axes[0, 0].set_ylabel("accuracy (%)")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(names),
        frameon=False,
        fontsize=9,
    )
    _mark_synthetic(figure, results)
    return figure


def cost_against_accuracy(results: Results) -> Figure | None:
    """Accuracy against cost as a multiple of standard training, each method named.

    None where no run of standard training finished.
    """
    place = results.places[0]
    points = []
    for cost in costs(results, place):
        accuracy = results.row(cost.method, place).mean["accuracy"]
        if cost.multiple is not None and accuracy is not None:
            points.append((cost.method, cost.multiple, 100 * accuracy))
    if not points:
        return None
    points.sort(key=lambda point: point[2])
    figure = Figure(figsize=(10, max(4.0, 0.25 * len(points) + 1.2)), layout="constrained")
    axis, names = figure.subplots(1, 2, width_ratios=(4, 1), sharey=True)
    low, high = _fences([y for _, _, y in points])
    span = high - low or 1.0
    bottom, top = low - 0.06 * span, high + 0.06 * span
    axis.set_ylim(bottom, top)
    shown = [y if low <= y <= high else bottom if y < low else top for _, _, y in points]
    heights = _apart(shown, min((top - bottom) / len(points), 0.08 * span), bottom, top)
    for (name, multiple, y), height, label in zip(points, shown, heights, strict=True):
        colour = GROUP_COLOURS[results.group[name]]
        marker = "o" if y == height else "v" if y < height else "^"
        axis.scatter(
            multiple,
            height,
            s=42,
            color=colour,
            marker=marker,
            linewidth=0,
            zorder=3,
            clip_on=False,
        )
        line = names.annotate(
            readable(name) + ("" if y == height else f" ({number(y, 1)})"),
            xy=(multiple, height),
            xycoords=axis.transData,
            xytext=(0.0, label),
            textcoords=names.get_yaxis_transform(),
            fontsize=8.5,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "relpos": (0, 0.5),
                "color": colour,
                "linewidth": 0.6,
                "alpha": 0.55,
                "shrinkA": 2,
                "shrinkB": 3,
            },
        )
        # It spans both axes: neither has to make room for it.
        line.set_in_layout(False)
    names.axis("off")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"× {value:g}"))
    axis.set_xlabel("training time with that of teachers, as a multiple of standard training")
    axis.set_ylabel("accuracy (%)")
    axis.set_title(results.place_name(place), fontsize=9.5)
    axis.grid(visible=True, axis="both")
    axis.set_axisbelow(True)
    _group_legend(figure, results, [name for name, _, _ in points])
    _mark_synthetic(figure, results)
    return figure


def _intervals(
    axis: Axes,
    found: Sequence[Difference],
    colours: Sequence[str],
    limits: tuple[float, float],
    *,
    seeds: bool,
) -> None:
    """A row for each difference: mean, 95 % interval and, if wanted, a dot for each seed.

    What lies outside the limits is an arrow at the edge with its value: it would squeeze all else.
    """
    low, high = limits
    span = high - low or 1.0
    axis.set_xlim(low - 0.06 * span, high + 0.06 * span)
    axis.axvline(0, color=SOFT, linewidth=1)
    for row, (one, colour) in enumerate(zip(found, colours, strict=True)):
        if one.mean is None:
            axis.annotate(
                "no pair of finished runs",
                (0.02, row),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=7.5,
                color=SOFT,
            )
            continue
        mean = 100 * one.mean
        if not low <= mean <= high:
            side = low if mean < low else high
            axis.scatter(side, row, marker="<" if mean < low else ">", color=colour, s=34, zorder=3)
            axis.annotate(
                number(mean, 1, sign=True),
                (side, row),
                xytext=(7 if mean < low else -7, 0),
                textcoords="offset points",
                ha="left" if mean < low else "right",
                va="center",
                fontsize=8,
                color=INK,
            )
            continue
        if seeds:
            dots = 100 * np.sort(np.array(list(one.by_seed.values())))
            spread = 0.16 * np.cos(np.pi * np.arange(len(dots)))
            axis.scatter(dots, row + spread, s=13, color=colour, alpha=0.35, linewidth=0, zorder=2)
        half = 0.0 if one.high is None else 100 * one.high - mean
        axis.errorbar(
            mean,
            row,
            xerr=half,
            fmt="D",
            color=colour,
            markersize=4.5,
            capsize=2.5,
            linewidth=1.5,
            zorder=3,
        )
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.grid(visible=True, axis="x")
    axis.set_axisbelow(True)


def _by_size(
    axis: Axes, results: Results, name: str, sizes: dict[float, int], shift: float
) -> None:
    """Mean and 95 % interval at each size, moved a little aside so that none hides another."""
    drawn = []
    for size, cell in sorted(sizes.items()):
        values = 100 * results.values(name, "accuracy", cell).dropna()
        if len(values):
            half = half_width_95(values) if len(values) > 1 else 0.0
            drawn.append((size * shift, float(values.mean()), half))
    if drawn:
        x, y, error = zip(*drawn, strict=True)
        own = name == results.study["representative"]
        axis.errorbar(
            x,
            y,
            yerr=error,
            color=MAIN_COLOURS.get(name, GROUP_COLOURS["introspective"]),
            label=readable(name),
            linewidth=2.4 if own else 1.4,
            marker="o",
            markersize=4,
            capsize=2,
            zorder=4 if own else 3,
        )


def _ends(found: Sequence[Difference], *, seeds: bool) -> list[float]:
    """Percentage points at which something of these differences is drawn."""
    ends = [
        (one.mean, one.low, one.high, *(one.by_seed.values() if seeds else ())) for one in found
    ]
    return [100 * end for group in ends for end in group if end is not None]


def _fences(values: Sequence[float]) -> tuple[float, float]:
    """Least and greatest value that is not far out by Tukey's rule (3 interquartile ranges)."""
    first, third = np.percentile(values, [25, 75])
    far = 3 * (third - first)
    inside = [value for value in values if first - far <= value <= third + far]
    return min(inside), max(inside)


def _apart(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Rising heights moved as little as it takes for a gap between neighbours, within bounds.

    Groups that touch are put around the mean of where they would be: the least squares solution
    (pool adjacent violators).
    """
    blocks: list[tuple[float, int]] = []
    for index, height in enumerate(heights):
        centre, size = height - index * gap, 1
        while blocks and blocks[-1][0] > centre:
            before, count = blocks.pop()
            centre = (before * count + centre * size) / (count + size)
            size += count
        blocks.append((centre, size))
    flat = [centre for centre, size in blocks for _ in range(size)]
    last = high - (len(flat) - 1) * gap
    return [min(max(value, low), max(last, low)) + index * gap for index, value in enumerate(flat)]


def _between_groups(axis: Axes, groups: Sequence[str]) -> None:
    for row, (before, after) in enumerate(itertools.pairwise(groups)):
        if before != after:
            axis.axhline(row + 0.5, color="#e6e8ec", linewidth=0.8)


def _group_legend(figure: Figure, results: Results, methods: Sequence[str]) -> None:
    groups = [group for group in GROUPS if group in {results.group[name] for name in methods}]
    handles = [
        Line2D(
            [], [], color=GROUP_COLOURS[group], marker="D", markersize=5, linewidth=0, label=group
        )
        for group in groups
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(groups), frameon=False, fontsize=9
    )


def _mark_synthetic(figure: Figure, results: Results) -> None:
    """A picture that leaves its page must still say so."""
    if results.study["synthetic"]:
        figure.suptitle("Synthetic data", fontsize=9.5, color="#d55e00", x=0.01, ha="left")


def _wrapped(name: str) -> str:
    """A cell's name in two lines, which fits above a narrow panel."""
    first, comma, rest = name.partition(", ")
    return f"{first}{comma.strip()}\n{rest}" if comma else name
