"""From the runs of a finished study to its tables: in each cell and over all of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from introkernels.train.findings import MISSING, number
from introkernels.train.metrics import MEASURED
from introkernels.train.summary import REFERENCES, half_width_95, plain

GROUPS = (
    "standard",
    "regularisation",
    "self-teaching",
    "teacher",
    "peers",
    "component",
    "introspective",
    "control",
)
"""In which order the tables show groups of methods."""
ALL_CELLS = "all cells"
COLUMNS = ("accuracy", "best_accuracy", "nll", "ece", "confidence")
"""What a row of a table shows; all but `best_accuracy` are of the last epoch."""


@dataclass(frozen=True)
class Difference:
    """A method's test accuracy minus another's, paired by seed; fractions.

    Attributes:
        cell: index of the cell; None: accuracies averaged over all cells, seed by seed.
        by_seed: the differences, by seed, of the seeds that both methods finished.
        mean: their mean; None without a seed.
        low, high: its 95 % confidence interval, by Student's t; None of fewer than two seeds.
        unfinished: how many seeds of `method` did not finish (in some cell, over all cells).
        left_out: how many seeds of the study have no difference.
    """

    method: str
    reference: str
    cell: int | None
    by_seed: dict[int, float]
    mean: float | None
    low: float | None
    high: float | None
    unfinished: int
    left_out: int

    @property
    def outcome(self) -> str:
        """What the interval says of the method: `better`, `worse` or that it can't be told."""
        if self.low is None or self.high is None:
            return "can't be told from " + _count(len(self.by_seed), "seed")
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "no clear difference"

    @property
    def points(self) -> str:
        """Mean and interval in percentage points, as text."""
        if self.mean is None:
            return MISSING
        mean = number(100 * self.mean, 2, sign=True)
        if self.low is None or self.high is None:
            return mean
        low, high = (number(100 * bound, 2, sign=True) for bound in (self.low, self.high))
        return f"{mean} [{low}, {high}]"


@dataclass(frozen=True)
class Row:
    """A method in a cell, or over all cells.

    Attributes:
        cell: index of the cell; None: each seed's figures are averaged over the cells.
        mean, std: of every one of `COLUMNS`, over finished seeds (n − 1); None where too few.
        versus: paired difference to every reference that is part of the study.
        planned, finished, diverged: numbers of runs; over all cells, of the runs in any of them.
        settings, hash: the chosen settings and the hash of the whole configuration; None over all
            cells, and where every trial of the method diverged.
    """

    method: str
    group: str
    cell: int | None
    mean: dict[str, float | None]
    std: dict[str, float | None]
    versus: dict[str, Difference]
    planned: int
    finished: int
    diverged: int
    settings: dict[str, Any] | None
    hash: str | None

    @property
    def runs(self) -> str:
        """How many runs the row rests on, as text that hides no failure."""
        missing = self.planned - self.finished - self.diverged
        lost = [f"{self.diverged} diverged"] * bool(self.diverged)
        lost += [f"{missing} not run"] * bool(missing)
        return (
            f"{self.finished} of {self.planned} ({', '.join(lost)})" if lost else f"{self.finished}"
        )


class Results:
    """A finished study, and what is computed from its runs.

    A run that diverged has no figures: it is counted, and its seed is left out of the means of its
    cell, of those over all cells, and of the differences it would be part of.

    Attributes:
        study: the study, plain values.
        methods: names in the order of the tables.
        group: of each method.
        cells: names of the cells.
    """

    def __init__(self, study: dict[str, Any]) -> None:
        self.study = study
        self.group: dict[str, str] = {m["name"]: m["group"] for m in study["methods"]}
        self.methods = sorted(self.group, key=lambda name: GROUPS.index(self.group[name]))
        self.cells: list[str] = [cell["name"] for cell in study["cells"]]

    @property
    def places(self) -> list[int | None]:
        """What there are tables of: all cells together (None) if there are several, each cell."""
        together: list[int | None] = [None] if len(self.cells) > 1 else []
        return together + list(range(len(self.cells)))

    def place_name(self, cell: int | None) -> str:
        """Name of a cell, or of all together."""
        return ALL_CELLS if cell is None else self.cells[cell]

    def of_group(self, group: str) -> list[str]:
        """The methods of a group."""
        return [name for name in self.methods if self.group[name] == group]

    @cached_property
    def runs(self) -> pd.DataFrame:
        """A row for each run: where, which method and seed, and its figures.

        Figures (fractions; NLL in nats) of a diverged run are NaN. No times, which differ from
        one machine to the next.
        """
        rows = []
        for run in self.study["runs"]:
            cell = self.study["cells"][run["cell"]]
            measured = run["test"] or {}
            best = (run.get("best") or {}) if run["test"] else {}
            validation = (run.get("validation") or {}) if run["test"] else {}
            rows.append(
                {
                    "cell": cell["name"],
                    "cell_index": run["cell"],
                    "dataset": cell["dataset"],
                    "synthetic": self.study["synthetic"],
                    "model": cell["model"],
                    "train_size": cell["train_size"],
                    "label_noise": cell["label_noise"],
                    "method": run["method"],
                    "group": self.group[run["method"]],
                    "seed": run["seed"],
                    "hash": run["hash"],
                    "outcome": "finished" if run["test"] else "diverged",
                    "failure": run.get("failure"),
                }
                | {name: measured.get(name) for name in MEASURED}
                | {"best_epoch": best.get("epoch")}
                | {f"best_{name}": best.get(name) for name in MEASURED}
                | {f"validation_{name}": validation.get(name) for name in MEASURED}
            )
        frame = pd.DataFrame(rows).astype({"best_epoch": "Int64"})
        figures = [f"{part}{name}" for part in ("", "best_", "validation_") for name in MEASURED]
        frame[figures] = frame[figures].astype(float)
        frame["method"] = pd.Categorical(frame["method"], self.methods)
        return frame.sort_values(["cell_index", "method", "seed"], ignore_index=True)

    def values(self, method: str, column: str, cell: int | None) -> pd.Series[float]:
        """One figure of a method for every seed of the study, NaN where there is none.

        Over all cells (None) it is the mean over them, of the seeds that finished in every one.
        """
        table = self._by_seed[column].loc[method]
        return table[ALL_CELLS if cell is None else cell]

    @cached_property
    def _by_seed(self) -> dict[str, pd.DataFrame]:
        """For each of `COLUMNS` its values by method and seed, in every cell and over all."""
        every = pd.MultiIndex.from_product([self.methods, self.study["seeds"]])
        runs = self.runs.astype({"method": object})
        tables = {}
        for column in COLUMNS:
            table = runs.pivot(index=["method", "seed"], columns="cell_index", values=column)
            table = table.reindex(index=every, columns=range(len(self.cells)))
            tables[column] = table.assign(**{ALL_CELLS: table.mean(axis=1, skipna=False)})
        return tables

    def difference(self, method: str, reference: str, cell: int | None) -> Difference:
        """Paired difference of test accuracy (last epoch), by seed.

        Raises:
            KeyError: a method is not part of the study.
        """
        for name in (method, reference):
            if name not in self.group:
                raise KeyError(f"method: got {name!r}, the study has {', '.join(self.methods)}")
        own = self.values(method, "accuracy", cell)
        every = own - self.values(reference, "accuracy", cell)
        paired = every.dropna()
        mean, half = plain(paired.mean()), half_width_95(paired)
        interval = len(paired) > 1
        return Difference(
            method,
            reference,
            cell,
            {int(str(seed)): float(value) for seed, value in paired.items()},
            mean,
            mean - half if interval else None,
            mean + half if interval else None,
            int(own.isna().sum()),
            len(every) - len(paired),
        )

    def row(self, method: str, cell: int | None) -> Row:
        """A method's row in the table of a cell, or over all cells (None)."""
        columns = {name: self.values(method, name, cell) for name in COLUMNS}
        runs = self.runs[self.runs["method"] == method]
        runs = runs if cell is None else runs[runs["cell_index"] == cell]
        chosen = self.chosen(method, cell) if cell is not None else None
        return Row(
            method,
            self.group[method],
            cell,
            {name: plain(values.mean()) for name, values in columns.items()},
            {name: plain(values.std(ddof=1)) for name, values in columns.items()},
            {
                reference: self.difference(method, reference, cell)
                for reference in REFERENCES
                if reference in self.group and reference != method
            },
            len(self.study["seeds"]) * (len(self.cells) if cell is None else 1),
            int((runs["outcome"] == "finished").sum()),
            int((runs["outcome"] == "diverged").sum()),
            chosen["settings"] if chosen else None,
            chosen["hash"] if chosen else None,
        )

    def table(self, cell: int | None) -> list[Row]:
        """A row for each method, in the order of the groups."""
        return [self.row(method, cell) for method in self.methods]

    def chosen(self, method: str, cell: int) -> dict[str, Any] | None:
        """What tuning chose: `settings` and `hash`; None if it chose nothing."""
        return next(
            (c for c in self.study["chosen"] if c["method"] == method and c["cell"] == cell), None
        )


def _count(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
