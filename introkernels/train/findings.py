"""What the numbers say, in words made from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from introkernels.train.metrics import METRICS

MISSING = "–"
"""Stands for a number that there is not."""
NAMES = {"accuracy": "accuracy", "nll": "NLL", "ece": "calibration error"}
_FORMATS = {"accuracy": (100.0, 2), "nll": (1.0, 3), "ece": (100.0, 2)}
_UNCLEAR, _UNTOLD = "no clear difference", "can't tell from one seed"
_VERDICTS = ("better", "perhaps better", _UNCLEAR, "perhaps worse", "worse", _UNTOLD)


@dataclass(frozen=True)
class Finding:
    """A method against a reference in one metric, paired by seed.

    Attributes:
        difference: mean difference ± its standard error, as text; percentage points but for NLL.
        seeds: on how many seeds the method was better, as text.
        verdict: `better` or `worse` if the 95 % confidence interval (Student's t) leaves out 0;
            `perhaps better` or `perhaps worse` if only the mean ± its standard error does;
            `no clear difference` otherwise, and `can't tell from one seed`.
    """

    difference: str
    seeds: str
    verdict: str


def readable(method: str) -> str:
    return method.replace("_", " ")


def number(value: float, digits: int, *, sign: bool = False) -> str:
    """A number with a real minus, and without one before zero."""
    rounded = round(value, digits) + 0.0
    return f"{rounded:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def finding(metric: str, paired: dict[str, Any]) -> Finding:
    scale, digits = _FORMATS[metric]
    error = paired["standard_error"]
    shown_error = "" if error is None else f" ± {number(error * scale, digits)}"
    count = paired["won"] + paired["tied"] + paired["lost"]
    ties = f", {paired['tied']} equal" if paired["tied"] else ""
    return Finding(
        number(paired["mean"] * scale, digits, sign=True) + shown_error,
        f"won {paired['won']} of {count}{ties}",
        _verdict(metric, paired),
    )


def compare(summary: dict[str, Any], reference: str, method: str) -> dict[str, Finding]:
    """A method against a reference in every metric."""
    return {
        metric: finding(metric, summary["paired"][reference][method][metric]) for metric in METRICS
    }


def sentence(summary: dict[str, Any], reference: str, method: str) -> str:
    """A method against a reference in all metrics, as one sentence."""
    parts = []
    for metric, found in compare(summary, reference, method).items():
        scale, digits = _FORMATS[metric]
        mean = number(
            summary["paired"][reference][method][metric]["mean"] * scale, digits, sign=True
        )
        unit = "" if metric == "nll" else " points"
        parts.append(f"{found.verdict} in {NAMES[metric]} ({mean}{unit})")
    return f"{readable(method)} against {readable(reference)}: {', '.join(parts)}."


def headline(summary: dict[str, Any]) -> str:
    """What came out in accuracy, as one sentence: every method against the first reference."""
    reference, others = next(iter(summary["paired"].items()), ("", {}))
    if not others:
        reached = [
            f"{readable(method)} {number(row['accuracy']['mean'] * 100, 1)} %"
            for method, row in summary["methods"].items()
        ]
        return f"Accuracy on the test images: {_listed(reached)}."
    by_verdict: dict[str, list[str]] = {verdict: [] for verdict in _VERDICTS}
    for method in others:
        found = finding("accuracy", others[method]["accuracy"])
        mean = number(others[method]["accuracy"]["mean"] * 100, 1, sign=True)
        by_verdict[found.verdict].append(f"{readable(method)} ({mean} points)")
    clauses = [_clause(verdict, names) for verdict, names in by_verdict.items() if names]
    return f"In accuracy against {readable(reference)}, {'; '.join(clauses)}."


def calibration(summary: dict[str, Any]) -> str:
    """Which methods are too sure of themselves and which not sure enough, in sentences."""
    groups: dict[str, list[str]] = {"Too sure of themselves": [], "Not sure enough": []}
    for method, row in summary["methods"].items():
        confidence, accuracy = row["confidence"]["mean"], row["accuracy"]["mean"]
        key = "Too sure of themselves" if confidence > accuracy else "Not sure enough"
        groups[key].append(f"{readable(method)} ({confidence:.0%} sure, {accuracy:.0%} right)")
    return " ".join(f"{key}: {', '.join(names)}." for key, names in groups.items() if names)


def _clause(verdict: str, names: list[str]) -> str:
    listed = _listed(names)
    if verdict == _UNCLEAR:
        return f"there is no clear difference for {listed}"
    if verdict == _UNTOLD:
        return f"one seed can't tell what is better: {listed}"
    return f"{listed} {'are' if len(names) > 1 else 'is'} {verdict}"


def _listed(items: list[str]) -> str:
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last


def _verdict(metric: str, paired: dict[str, Any]) -> str:
    mean, error, bound = paired["mean"], paired["standard_error"], paired["confidence_95"]
    if error is None:
        return _UNTOLD
    if abs(mean) <= error:
        return _UNCLEAR
    direction = "better" if (mean > 0) == (metric == "accuracy") else "worse"
    return direction if abs(mean) > bound else f"perhaps {direction}"
