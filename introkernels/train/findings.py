"""What the numbers say, in words made from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from introkernels.train.metrics import METRICS

MISSING = "–"
"""Stands for a number that there is not."""
NAMES = {"accuracy": "accuracy", "nll": "NLL", "ece": "calibration error"}
_FORMATS = {"accuracy": (100.0, 2), "nll": (1.0, 3), "ece": (100.0, 2)}


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


def calibration(summary: dict[str, Any]) -> str:
    """Which methods are too sure of themselves and which not sure enough, in sentences."""
    groups: dict[str, list[str]] = {"Too sure of themselves": [], "Not sure enough": []}
    for method, row in summary["methods"].items():
        confidence, accuracy = row["confidence"]["mean"], row["accuracy"]["mean"]
        key = "Too sure of themselves" if confidence > accuracy else "Not sure enough"
        groups[key].append(f"{readable(method)} ({confidence:.0%} sure, {accuracy:.0%} right)")
    return " ".join(f"{key}: {', '.join(names)}." for key, names in groups.items() if names)


def _verdict(metric: str, paired: dict[str, Any]) -> str:
    mean, error, bound = paired["mean"], paired["standard_error"], paired["confidence_95"]
    if error is None:
        return "can't tell from one seed"
    if abs(mean) <= error:
        return "no clear difference"
    direction = "better" if (mean > 0) == (metric == "accuracy") else "worse"
    return direction if abs(mean) > bound else f"perhaps {direction}"
