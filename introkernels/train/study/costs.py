"""What a method costs to train: seconds, and as a multiple of standard training."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from introkernels.train.study.analysis import Results
from introkernels.train.summary import plain

TIMES = ("own_seconds", "teacher_seconds", "total_seconds", "step_milliseconds")


@dataclass(frozen=True)
class Cost:
    """Mean over the finished runs of a method in a cell, or the mean of that over all cells.

    Attributes:
        own_seconds: training and validating the method's own network or networks.
        teacher_seconds: training its teachers first; 0 without any.
        total_seconds: both.
        step_milliseconds: one training step.
        multiple: `total_seconds` of standard training in the same place; None where either has no
            finished run, and over all cells where that is so in one of them.
    """

    method: str
    cell: int | None
    own_seconds: float | None
    teacher_seconds: float | None
    total_seconds: float | None
    step_milliseconds: float | None
    multiple: float | None


def costs(results: Results, cell: int | None) -> list[Cost]:
    """The cost of every method in a cell, or on the average over all cells (None)."""
    table = _times(results)
    cells = range(len(results.cells))
    mean = {
        method: (
            table.loc[method].reindex(cells).mean(skipna=False)
            if cell is None
            else table.loc[method].reindex(cells).loc[cell]
        )
        for method in results.methods
    }
    standard = mean["standard"]["total_seconds"] if "standard" in mean else float("nan")
    return [
        Cost(
            method,
            cell,
            plain(times["own_seconds"]),
            plain(times["teacher_seconds"]),
            plain(times["total_seconds"]),
            plain(times["step_milliseconds"]),
            plain(times["total_seconds"] / standard),
        )
        for method, times in mean.items()
    ]


def costs_csv(results: Results) -> str:
    """A row for each cell and method. Differs from run to run, as times do."""
    rows = [
        {
            "cell": results.cells[cell],
            "synthetic": results.study["synthetic"],
            "method": cost.method,
            "group": results.group[cost.method],
            **{name: getattr(cost, name) for name in TIMES},
            "multiple_of_standard": cost.multiple,
        }
        for cell in range(len(results.cells))
        for cost in costs(results, cell)
    ]
    csv: str = pd.DataFrame(rows).to_csv(index=False)
    return csv


def _times(results: Results) -> pd.DataFrame:
    """Mean times by method and cell, NaN without a finished run."""
    runs = pd.DataFrame(
        [
            {
                "method": run["method"],
                "cell": run["cell"],
                "own_seconds": run["wall_seconds"],
                "teacher_seconds": run["teacher_seconds"],
                "total_seconds": run["wall_seconds"] + run["teacher_seconds"],
                "step_milliseconds": run["step_milliseconds"],
            }
            for run in results.study["runs"]
            if run["test"]
        ],
        columns=["method", "cell", *TIMES],
    )
    every = pd.MultiIndex.from_product(
        [results.methods, range(len(results.cells))], names=["method", "cell"]
    )
    return runs.groupby(["method", "cell"])[list(TIMES)].mean().reindex(every)
