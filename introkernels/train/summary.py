"""From single runs to the table: mean and deviation over seeds, and differences paired by seed."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from scipy.stats import t

from introkernels.train.metrics import MEASURED, METRICS

COSTS = ("wall_seconds", "step_milliseconds")
REFERENCES = ("standard", "label_smoothing")


def summarise(records: list[dict[str, Any]], methods: list[str]) -> dict[str, Any]:
    """Summary of finished runs.

    Keys: `methods` (for each: `runs`, and mean and standard deviation (n − 1) over seeds of every
    metric and cost), `paired` (for each reference method and each other method: mean difference
    over the seeds both have, its standard error, half the width of its 95 % confidence interval
    by Student's t, seeds won, tied and lost), `runs` (every run's values). What one run can't
    tell is None.
    """
    runs = pd.DataFrame(
        [
            {"method": record["run"]["method"], "seed": record["run"]["seed"]}
            | record["test"]
            | {cost: record[cost] for cost in COSTS}
            for record in records
        ]
    )
    runs["method"] = pd.Categorical(runs["method"], methods)
    runs = runs.sort_values(["method", "seed"])
    grouped = runs.groupby("method", observed=True)
    table = {
        method: {"runs": len(group)}
        | {name: _mean_and_deviation(group[name]) for name in (*MEASURED, *COSTS)}
        for method, group in grouped
    }
    return {
        "methods": table,
        "paired": {
            reference: {
                method: {name: _paired(runs, method, reference, name) for name in METRICS}
                for method in table
                if method != reference
            }
            for reference in REFERENCES
            if reference in table
        },
        "runs": [
            {name: plain(value) for name, value in run.items()} for run in runs.to_dict("records")
        ],
    }


def table_csv(summary: dict[str, Any]) -> str:
    """The table with a row for each method."""
    rows = [
        {"method": method, "runs": row["runs"]}
        | {
            f"{name}_{part}": row[name][part]
            for name in (*MEASURED, *COSTS)
            for part in ("mean", "std")
        }
        for method, row in summary["methods"].items()
    ]
    csv: str = pd.DataFrame(rows).to_csv(index=False)
    return csv


def half_width_95(values: pd.Series[float]) -> float:
    """Half the width of a mean's 95 % confidence interval, by Student's t; NaN of one value."""
    return float(values.sem(ddof=1) * t.ppf(0.975, len(values) - 1))


def _mean_and_deviation(values: pd.Series[float]) -> dict[str, float | None]:
    return {"mean": float(values.mean()), "std": plain(values.std(ddof=1))}


def _paired(runs: pd.DataFrame, method: str, reference: str, metric: str) -> dict[str, Any]:
    by_seed = runs.pivot(index="seed", columns="method", values=metric)
    difference = (by_seed[method] - by_seed[reference]).dropna()
    better = difference if metric == "accuracy" else -difference
    return {
        "mean": float(difference.mean()),
        "standard_error": plain(difference.sem(ddof=1)),
        "confidence_95": plain(half_width_95(difference)),
        "won": int((better > 0).sum()),
        "tied": int((better == 0).sum()),
        "lost": int((better < 0).sum()),
    }


def plain(value: Any) -> Any:
    """A JSON value; NaN, which JSON lacks, becomes None."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and math.isnan(value) else value
