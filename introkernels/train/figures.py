"""The report's figures, each a function from data to a matplotlib figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from introkernels.plotting import COLOURS
from introkernels.train.explanations import Explained
from introkernels.train.findings import number, readable

_MOST_NUMBERED = 12
"""Classes up to which a heatmap has room for its numbers."""
FOR_AND_AGAINST = colormaps["RdBu_r"].with_extremes(bad="#e6e8ec")


def training_curves(histories: dict[str, Sequence[pd.DataFrame]]) -> Figure:
    """Validation metrics by epoch: mean over seeds and ± one standard deviation."""
    panels = [
        ("validation_accuracy", "Accuracy (%)", 100.0),
        ("validation_nll", "NLL (nats)", 1.0),
        ("validation_ece", "Calibration error (%)", 100.0),
    ]
    figure = Figure(figsize=(10, 3.7), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, (column, title, scale) in zip(axes, panels, strict=True):
        settled = []
        for colour, (method, runs) in zip(_colours(len(histories)), histories.items(), strict=True):
            values = pd.concat([run.set_index("epoch")[column] for run in runs], axis=1) * scale
            mean, deviation = values.mean(axis=1), values.std(axis=1).fillna(0)
            axis.plot(mean.index, mean, color=colour, linewidth=1.8, label=readable(method))
            axis.fill_between(
                mean.index,
                mean - deviation,
                mean + deviation,
                color=colour,
                alpha=0.12,
                linewidth=0,
            )
            late = mean.index > 0.2 * mean.index.max()
            settled += [*(mean - deviation)[late], *(mean + deviation)[late]]
        _zoom(axis, settled)
        axis.set_title(title)
        axis.set_xlabel("epoch")
        axis.grid(visible=True)
        axis.set_axisbelow(True)
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(5, len(histories)),
        frameon=False,
    )
    return figure


def paired_differences(summary: dict[str, Any], reference: str) -> Figure:
    """Each method's test accuracy minus the reference's: every seed, mean and 95 % interval."""
    runs, paired = summary["runs"], summary["paired"][reference]
    accuracy = pd.DataFrame(runs).pivot(index="seed", columns="method", values="accuracy") * 100
    names = list(dict.fromkeys(run["method"] for run in runs))
    colours = dict(zip(names, _colours(len(names)), strict=True))
    others = [name for name in names if name != reference]
    figure = Figure(figsize=(10, 0.9 + 0.55 * len(others)), layout="constrained")
    axis = figure.subplots()
    axis.axvline(0, color="#9aa1ab", linewidth=1)
    for row, name in enumerate(reversed(others)):
        bound = paired[name]["accuracy"]["confidence_95"] or 0.0
        difference = (accuracy[name] - accuracy[reference]).dropna().sort_values()
        spread = 0.18 * np.cos(np.pi * np.arange(len(difference)))
        axis.scatter(
            difference, row + spread, s=26, color=colours[name], alpha=0.5, linewidth=0, zorder=2
        )
        axis.errorbar(
            difference.mean(),
            row,
            xerr=100 * bound,
            fmt="D",
            color="#1c2027",
            markersize=5.5,
            capsize=4,
            linewidth=1.6,
            zorder=3,
        )
    axis.set_yticks(range(len(others)), [readable(name) for name in reversed(others)])
    axis.set_ylim(-0.6, len(others) - 0.4)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.grid(visible=True, axis="x")
    axis.set_axisbelow(True)
    axis.set_xlabel(f"accuracy minus that of {readable(reference)}, percentage points")
    return figure


def class_similarity(matrices: dict[str, Tensor], class_names: Sequence[str]) -> Figure:
    """Heatmaps of mean explanation similarity, one for each method, on one scale.

    Args:
        matrices: ``[K, K]`` for each method; NaN where there is nothing to show.
        class_names: those of the K classes.
    """
    count = len(class_names)
    others = ~np.eye(count, dtype=bool)
    limit = max(float(np.nanmax(np.abs(m.numpy()[others]))) for m in matrices.values())
    figure = Figure(figsize=(5.0 * len(matrices) + 0.6, 5.0), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(matrices)))
    for axis, (method, matrix) in zip(axes, matrices.items(), strict=True):
        values = matrix.numpy()
        # The diagonal is 1 by definition: left grey, it can't drown the differences beside it.
        shown = np.where(others, values, np.nan)
        image = axis.imshow(shown, cmap=FOR_AND_AGAINST, vmin=-limit or -1.0, vmax=limit or 1.0)
        for (row, column), value in np.ndenumerate(shown):
            if count <= _MOST_NUMBERED and not np.isnan(value):
                strong = abs(value) > 0.6 * limit
                axis.text(
                    column,
                    row,
                    number(value, 2),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if strong else "#1c2027",
                )
        names = [_shortened(name, 20) for name in class_names]
        rotation = 90 if len("".join(names)) > 40 else 0
        axis.set_xticks(range(count), names, rotation=rotation, parse_math=False)
        axis.set_yticks(range(count), names, parse_math=False)
        axis.set_xlabel("compared with class")
        axis.set_ylabel("true class")
        axis.set_title(readable(method))
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
    bar = figure.colorbar(image, ax=list(axes), shrink=0.85, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("mean cosine of explanations")
    return figure


def from_explanation_to_label(
    explained: Explained, which: int, class_names: Sequence[str]
) -> Figure:
    """One image, its explanations, their similarities to the true class's and the soft label."""
    classes = explained.classes[which].tolist()
    count = len(classes)
    maps = explained.maps[which].sum(dim=1).numpy()
    side = min(1.6, 10 / (count + 1) + 0.2)
    figure = Figure(figsize=(10, side + 2), layout="constrained")
    grid = figure.add_gridspec(3, count + 1, height_ratios=(side, 1, 1))
    axis = figure.add_subplot(grid[0, 0])
    _picture(axis, explained.pictures[which])
    axis.set_title("image", loc="center", fontsize=9.5)
    limit = float(np.abs(maps).max())
    for column, c in enumerate(classes):
        axis = figure.add_subplot(grid[0, column + 1])
        _map(axis, maps[column], limit)
        _name(axis, class_names[c], count + 1, fontweight="normal" if column else "bold")
    rows = [
        ("similarity\nto the true\nclass", explained.similarity[which].numpy(), 2),
        ("soft label\n(%)", explained.soft_labels[which].numpy() * 100, 1),
    ]
    for row, (label, values, digits) in enumerate(rows, start=1):
        axis = figure.add_subplot(grid[row, 0])
        axis.axis("off")
        axis.text(
            1.0,
            0.4,
            label,
            ha="right",
            va="center",
            fontsize=9.5,
            color="#3b424c",
            transform=axis.transAxes,
        )
        axis = figure.add_subplot(grid[row, 1:])
        colours = ["#0072b2", *["#a9b4c2"] * (count - 1)]
        bars = axis.bar(range(count), values, color=colours, width=0.62)
        labels = [number(float(value), digits) for value in values]
        axis.bar_label(bars, labels, fontsize=8.5, padding=2, color="#3b424c")
        axis.axhline(0, color="#9aa1ab", linewidth=0.8)
        axis.set_xlim(-0.5, count - 0.5)
        axis.margins(y=0.32)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    return figure


def true_and_most_similar(explained: Explained, class_names: Sequence[str]) -> Figure:
    """Images above their explanations for the true class and for its most similar other class."""
    count = len(explained.classes)
    figure = Figure(figsize=(10, 3.75), layout="constrained")
    axes = figure.subplots(3, count, squeeze=False)
    for column, second in enumerate(explained.most_similar().tolist()):
        pair = explained.maps[column, [0, second]].sum(dim=1).numpy()
        limit = float(np.abs(pair).max())
        _picture(axes[0, column], explained.pictures[column])
        for row, which in enumerate((0, second)):
            axis = axes[row + 1, column]
            _map(axis, pair[row], limit)
            _name(axis, class_names[int(explained.classes[column, which])], count)
        axes[2, column].set_xlabel(number(float(explained.similarity[column, second]), 2))
    for axis, label in zip(
        axes[:, 0], ("image", "true class", "most similar\nother class"), strict=True
    ):
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9.5, labelpad=8)
    return figure


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _zoom(axis: Axes, values: Sequence[float]) -> None:
    """Limits that show the epochs after the first fifth, whose change dwarfs the rest."""
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 1.0
    axis.set_ylim(low - margin, high + margin)


def _picture(axis: Axes, image: Tensor) -> None:
    """Draw ``[channels, height, width]`` in [0, 1]: three channels are red, green and blue."""
    if len(image) == 3:
        axis.imshow(image.permute(1, 2, 0).numpy())
    else:
        axis.imshow(image.mean(dim=0).numpy(), cmap="gray_r", vmin=0.0, vmax=1.0)
    _bare(axis)


def _map(axis: Axes, values: Any, limit: float) -> None:
    axis.imshow(values, cmap=FOR_AND_AGAINST, vmin=-limit or -1.0, vmax=limit or 1.0)
    _bare(axis)


def _name(axis: Axes, name: str, columns: int, **style: Any) -> None:
    """A class's name above one of so many pictures that share the figure's width."""
    axis.set_title(
        _shortened(name, 100 // columns),
        loc="center",
        fontsize=9.5,
        pad=4,
        parse_math=False,
        **style,
    )


def _shortened(name: str, most: int) -> str:
    """A name of at most so many letters: names often differ at their ends, so the middle goes."""
    if len(name) <= most:
        return name
    return f"{name[: most // 2]}…{name[len(name) - (most - 1) // 2 :]}"


def _bare(axis: Axes) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(True)
    axis.spines[:].set_color("#d5d9df")
