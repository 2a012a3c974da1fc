"""How a method's settings were chosen: its trials, and whether a wider search might find more."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from introkernels.train.study.analysis import Results


@dataclass(frozen=True)
class Tuning:
    """The trials of a method in a cell.

    Attributes:
        trials: how many there were.
        diverged: how many of them have no validation accuracy.
        best, median, worst: validation accuracy of the others, fractions; None without any.
        settings, hash: what was chosen; None if nothing was.
        on_edge: the hyperparameters whose chosen value is the lowest or highest that was allowed,
            each with which: better values may lie outside.
    """

    method: str
    cell: int
    trials: int
    diverged: int
    best: float | None
    median: float | None
    worst: float | None
    settings: dict[str, Any] | None
    hash: str | None
    on_edge: dict[str, str]


def tunings(results: Results, cell: int) -> list[Tuning]:
    """The trials of every method in a cell, in the order of the tables."""
    spaces = {method["name"]: method["space"] for method in results.study["methods"]}
    found = []
    for method in results.methods:
        trials = [
            trial
            for trial in results.study["trials"]
            if trial["method"] == method and trial["cell"] == cell
        ]
        accuracies = [t["validation"]["accuracy"] for t in trials if t["validation"]]
        chosen = results.chosen(method, cell)
        found.append(
            Tuning(
                method,
                cell,
                len(trials),
                len(trials) - len(accuracies),
                max(accuracies, default=None),
                statistics.median(accuracies) if accuracies else None,
                min(accuracies, default=None),
                chosen["settings"] if chosen else None,
                chosen["hash"] if chosen else None,
                on_edge(chosen["settings"], spaces[method]) if chosen else {},
            )
        )
    return found


def on_edge(settings: dict[str, Any], space: dict[str, list[Any]]) -> dict[str, str]:
    """Which settings are the `lowest` or `highest` of their range.

    Values that have no order (names, switches) have no edge, and nor has a single value.
    """
    edges = {}
    for name, values in space.items():
        numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
        if name in settings and numeric and len(set(values)) > 1:
            if settings[name] <= min(values):
                edges[name] = "lowest"
            elif settings[name] >= max(values):
                edges[name] = "highest"
    return edges


def same_number_of_trials(results: Results) -> bool:
    """Whether every method had as many trials in every cell as the plan says."""
    wanted = results.study["trials_per_method"]
    return all(
        tuning.trials == wanted
        for cell in range(len(results.cells))
        for tuning in tunings(results, cell)
    )
