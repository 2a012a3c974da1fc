"""The report's tables, as text that both the page and the Markdown show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from introkernels.train.findings import MISSING, number, readable
from introkernels.train.study.analysis import GROUPS, Difference, Results, Row
from introkernels.train.study.claims import Claim, Evidence
from introkernels.train.study.costs import Cost, costs
from introkernels.train.study.tuning import Tuning, tunings
from introkernels.train.summary import REFERENCES

_FORMATS = {
    "accuracy": (100.0, 2),
    "best_accuracy": (100.0, 2),
    "nll": (1.0, 3),
    "ece": (100.0, 2),
}


@dataclass(frozen=True)
class Table:
    """Text in rows.

    Attributes:
        caption: what is shown.
        header: a heading for each column.
        sections: rows by the name of their section; one section without a name has no heading.
        wrap: indices of columns of words or code, which are set to the left and may break.
    """

    caption: str
    header: tuple[str, ...]
    sections: dict[str, list[tuple[str, ...]]]
    wrap: tuple[int, ...] = ()


def accuracy_table(results: Results, cell: int | None) -> Table:
    """Every method in a cell, or over all cells (None), compared with the references."""
    rows = {row.method: row for row in results.table(cell)}
    references = [name for name in REFERENCES if name in results.group]

    def text(method: str) -> tuple[str, ...]:
        row = rows[method]
        return (
            readable(method),
            *(_spread(row, column) for column in _FORMATS),
            *(_points(row.versus.get(reference)) for reference in references),
            row.runs,
            *([row.hash or MISSING] if cell is not None else []),
        )

    return Table(
        _caption(results, f"Test images, {results.place_name(cell)}"),
        (
            "method",
            "accuracy (%) ↑",
            "accuracy at the best epoch (%) ↑",
            "NLL (nats) ↓",
            "calibration error (%) ↓",
            *(f"minus {readable(reference)} (points)" for reference in references),
            "runs",
            *(["configuration"] if cell is not None else []),
        ),
        _by_group(results, results.methods, text),
    )


def comparison_table(
    results: Results, caption: str, methods: Sequence[str], references: Sequence[str]
) -> Table:
    """Methods with their accuracy and paired differences to references, over all cells."""
    place = results.places[0]

    def text(method: str) -> tuple[str, ...]:
        return (
            readable(method),
            _spread(results.row(method, place), "accuracy"),
            *(
                MISSING
                if reference == method
                else _points(results.difference(method, reference, place))
                for reference in references
            ),
        )

    return Table(
        _caption(results, f"{caption}, {results.place_name(place)}"),
        (
            "method",
            "accuracy (%) ↑",
            *(f"minus {readable(reference)} (points)" for reference in references),
        ),
        {"": [text(method) for method in methods]},
    )


def difference_table(results: Results, caption: str, pairs: Iterable[tuple[str, str]]) -> Table:
    """Pairs of methods: the difference in every place."""
    return Table(
        _caption(results, caption),
        ("difference (points)", *(results.place_name(place) for place in results.places)),
        {
            "": [
                (
                    f"{readable(method)} − {readable(reference)}",
                    *(
                        _points(results.difference(method, reference, place))
                        for place in results.places
                    ),
                )
                for method, reference in pairs
            ]
        },
    )


def evidence_table(results: Results, claim: Claim) -> Table:
    """What a verdict rests on, over all cells and in each."""
    return Table(
        _caption(results, f"Comparisons for claim ({claim.key})"),
        ("comparison", "shows", "points", "lower bound must exceed", "seeds", "holds"),
        {
            f"all cells: {claim.verdict}" if claim.by_cell else claim.verdict: [
                _evidence(one) for one in claim.evidence
            ],
            **{
                f"{name}: {judgement.verdict}": [_evidence(one) for one in judgement.evidence]
                for name, judgement in claim.by_cell.items()
            },
        },
        wrap=(1,),
    )


def cost_table(results: Results) -> Table:
    """What training costs, on the average over all cells."""
    place = results.places[0]
    found = {cost.method: cost for cost in costs(results, place)}

    def text(method: str) -> tuple[str, ...]:
        cost: Cost = found[method]
        return (
            readable(method),
            _plain(cost.own_seconds, 2),
            _plain(cost.teacher_seconds, 2),
            _plain(cost.total_seconds, 2),
            MISSING if cost.multiple is None else f"× {number(cost.multiple, 2)}",
            _plain(cost.step_milliseconds, 2),
        )

    return Table(
        _caption(results, f"Cost of one run, {results.place_name(place)}"),
        (
            "method",
            "own training (s)",
            "its teachers (s)",
            "together (s)",
            "of standard training",
            "one step (ms)",
        ),
        _by_group(results, results.methods, text),
    )


def tuning_table(results: Results, cell: int) -> Table:
    """Trials and chosen settings of every method in a cell."""
    found = {tuning.method: tuning for tuning in tunings(results, cell)}

    def text(method: str) -> tuple[str, ...]:
        tuning: Tuning = found[method]
        lost = f" ({tuning.diverged} diverged)" if tuning.diverged else ""
        return (
            readable(method),
            f"{tuning.trials}{lost}",
            *(_percent(value) for value in (tuning.best, tuning.median, tuning.worst)),
            _settings(tuning.settings),
            ", ".join(f"{_setting(name)} ({edge})" for name, edge in tuning.on_edge.items())
            or MISSING,
            tuning.hash or MISSING,
        )

    return Table(
        _caption(results, f"Tuning on validation images, {results.cells[cell]}"),
        (
            "method",
            "trials",
            "best (%)",
            "median (%)",
            "worst (%)",
            "chosen settings",
            "on the edge of its range",
            "configuration",
        ),
        _by_group(results, results.methods, text),
        wrap=(5, 6),
    )


def method_table(results: Results) -> Table:
    """What every method minimises, where it is from and which values were tried."""
    about = {method["name"]: method for method in results.study["methods"]}

    def text(method: str) -> tuple[str, ...]:
        space = about[method]["space"]
        return (
            readable(method),
            about[method]["summary"],
            about[method]["source"] or MISSING,
            "; ".join(
                f"{_setting(name)}: {', '.join(map(_value, values))}"
                for name, values in space.items()
            )
            or MISSING,
        )

    return Table(
        _caption(results, "Methods, and the values that tuning chose from"),
        ("method", "what is minimised", "source", "values"),
        _by_group(results, results.methods, text),
        wrap=(1, 2, 3),
    )


def _caption(results: Results, text: str) -> str:
    return f"{text} (synthetic data)" if results.study["synthetic"] else text


def _by_group(
    results: Results, methods: Sequence[str], text: Callable[[str], tuple[str, ...]]
) -> dict[str, list[tuple[str, ...]]]:
    sections: dict[str, list[tuple[str, ...]]] = {}
    for group in GROUPS:
        rows = [text(method) for method in methods if results.group[method] == group]
        if rows:
            sections[group] = rows
    return sections


def _spread(row: Row, column: str) -> str:
    scale, digits = _FORMATS[column]
    mean, std = row.mean[column], row.std[column]
    if mean is None:
        return MISSING
    deviation = MISSING if std is None else number(std * scale, digits)
    return f"{number(mean * scale, digits)} ± {deviation}"


def _points(difference: Difference | None) -> str:
    return MISSING if difference is None else difference.points


def _evidence(evidence: Evidence) -> tuple[str, ...]:
    found = evidence.difference
    holds = "yes" if evidence.holds else "no"
    return (
        f"{readable(found.method)} − {readable(found.reference)}",
        evidence.question,
        found.points,
        number(100 * evidence.above, 2),
        str(len(found.by_seed)),
        holds if evidence.counts else f"{holds} (does not count)",
    )


def _percent(value: float | None) -> str:
    return _plain(None if value is None else 100 * value, 2)


def _plain(value: float | None, digits: int) -> str:
    return MISSING if value is None else number(value, digits)


def _settings(settings: dict[str, Any] | None) -> str:
    if not settings:
        return MISSING
    return ", ".join(f"{_setting(name)} = {_value(value)}" for name, value in settings.items())


def _setting(name: str) -> str:
    """A hyperparameter without the method's name before it, which the row says."""
    return name.rpartition(".")[2]


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
