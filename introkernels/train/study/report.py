"""The report of a study: a page that needs no other file, Markdown, CSV and figures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from introkernels.plotting import styled
from introkernels.train import files, pages
from introkernels.train.findings import number, readable
from introkernels.train.study import figures, tables
from introkernels.train.study.analysis import Results
from introkernels.train.study.claims import Claim, judge
from introkernels.train.study.costs import costs_csv
from introkernels.train.study.csv_tables import results_csv, runs_csv
from introkernels.train.study.tuning import same_number_of_trials
from introkernels.train.summary import REFERENCES

EFFECTS = (
    ("does distillation work?", "kd", "standard"),
    ("responses in the other classes", "kd_permuted", "kd_ground_truth_only"),
    ("class similarity, added", "kd_class_average", "kd_ground_truth_only"),
    ("class similarity, destroyed", "kd", "kd_permuted"),
)
"""What the component study of a teacher asks: label, method, reference."""


def write(study: dict[str, Any], out: Path) -> dict[str, Path]:
    """Write the report of a finished study into a directory.

    Args:
        study: the content of `study.json`, plain values.
        out: where to.

    Returns:
        What was written: `html`, a page that holds its pictures itself; `markdown`, which refers to
        the PNG files beside it; tables as CSV, `overall` (a row for each method), `results` (for
        each cell and method), `runs` (for each run) and `costs`; and the figures by their names.
        All but the table, the CSV and the figure of costs are the same for the same results.
    """
    results = Results(study)
    claims = judge(results)
    images = {}
    with styled():
        for name, figure in _figures(results):
            images[name] = pages.save_figure(figure, out / f"{name}.png")
    content = _content(results, claims, images)
    written = {name: out / f"{name}.png" for name in images}
    for name, file, text in (
        ("html", "report.html", pages.template("study.html.j2").render(content)),
        ("markdown", "report.md", pages.template("study.md.j2").render(content)),
        ("overall", "overall.csv", results_csv(results, [None])),
        ("results", "results.csv", results_csv(results, list(range(len(results.cells))))),
        ("runs", "runs.csv", runs_csv(results)),
        ("costs", "costs.csv", costs_csv(results)),
    ):
        files.write_text(out / file, text)
        written[name] = out / file
    return written


def verdicts(study: dict[str, Any]) -> str:
    """The verdicts of a finished study, a line for each claim."""
    claims = judge(Results(study))
    lines = [f"({claim.key}) {claim.statement.rstrip('.')}: {claim.verdict}." for claim in claims]
    return "\n".join([*["Synthetic data."] * bool(study["synthetic"]), *lines])


def component_pairs(results: Results) -> list[tuple[str, str, str]]:
    """The effects that the study's component methods can show: label, method, reference."""
    if not results.of_group("component"):
        return []
    return [
        (f"{label}\n{readable(method)} − {readable(reference)}", method, reference)
        for label, method, reference in EFFECTS
        if method in results.group and reference in results.group
    ]


def control_pairs(results: Results) -> list[tuple[str, str, str]]:
    """The representative against each control of introspective soft labels."""
    own = results.study["representative"]
    if own not in results.group:
        return []
    return [
        (f"{readable(own)} −\n{readable(control)}", own, control)
        for control in results.of_group("control")
    ]


def intervals_shown(results: Results, claims: list[Claim]) -> int:
    """How many different 95 % intervals the report shows."""
    shown = {
        (method, reference, place)
        for place in results.places
        for method in results.methods
        for reference in REFERENCES
        if reference in results.group and reference != method
    }
    shown |= {
        (method, reference, place)
        for place in results.places
        for _, method, reference in (*component_pairs(results), *control_pairs(results))
    }
    shown |= {
        (method, reference, results.places[0])
        for method in _taught(results)
        for reference in _component_references(results)
        if method != reference
    }
    shown |= {
        (one.difference.method, one.difference.reference, place)
        for claim in claims
        for one in claim.evidence
        for place in results.places
    }
    return sum(results.difference(*one).low is not None for one in shown)


def _figures(results: Results) -> Iterator[tuple[str, Figure]]:
    if "standard" in results.group and len(results.methods) > 1:
        whole, *cells = results.places
        yield "paired_differences", figures.paired_differences(results, "standard", [whole])
        if cells:
            yield (
                "paired_differences_by_cell",
                figures.paired_differences(results, "standard", cells),
            )
    for name, figure in (
        ("cost_against_accuracy", figures.cost_against_accuracy(results)),
        ("accuracy_by_size", figures.accuracy_by_size(results)),
    ):
        if figure is not None:
            yield name, figure
    for name, pairs in (
        ("component_study", component_pairs(results)),
        ("controls", control_pairs(results)),
    ):
        if pairs:
            yield name, figures.effects(results, pairs)


def _content(results: Results, claims: list[Claim], images: dict[str, str]) -> dict[str, Any]:
    study = results.study
    whole, cells = results.places[0], range(len(results.cells))
    shown = intervals_shown(results, claims)
    deciding = sum(
        one.counts and one.difference.low is not None for claim in claims for one in claim.evidence
    )
    controls = [(method, reference) for _, method, reference in control_pairs(results)]
    taught = _taught(results)
    return {
        "study": study,
        "results": results,
        "images": images,
        "claims": claims,
        "several": len(results.cells) > 1,
        "whole": results.place_name(whole),
        "same_number_of_trials": same_number_of_trials(results),
        "fresh": not set(study["seeds"]) & set(study["tuning_seeds"]),
        "diverged": int((results.runs["outcome"] == "diverged").sum()),
        "intervals": {
            "shown": shown,
            "deciding": deciding,
            "off": _about(shown / 20),
            "deciding_off": _about(deciding / 20),
        },
        "overall": tables.accuracy_table(results, None) if len(results.cells) > 1 else None,
        "by_cell": {results.cells[cell]: tables.accuracy_table(results, cell) for cell in cells},
        "components": tables.comparison_table(
            results,
            "Parts of a teacher’s outputs, each as the only teaching",
            taught,
            _component_references(results),
        )
        if results.of_group("component")
        else None,
        "controls": tables.difference_table(
            results, "Introspective soft labels against their controls", controls
        )
        if controls
        else None,
        "cost": tables.cost_table(results),
        "tuning": {results.cells[cell]: tables.tuning_table(results, cell) for cell in cells},
        "methods": tables.method_table(results),
        "evidence": [tables.evidence_table(results, claim) for claim in claims if claim.evidence],
        "environment": {
            name: json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value
            for name, value in study["environment"].items()
        },
        "plan": json.dumps(study["plan"], indent=1, ensure_ascii=False),
    }


def _taught(results: Results) -> list[str]:
    """What the component study compares."""
    return [
        name for name in ("standard", "kd", *results.of_group("component")) if name in results.group
    ]


def _component_references(results: Results) -> list[str]:
    return [name for name in ("standard", "kd_ground_truth_only", "kd") if name in results.group]


def _about(value: float) -> str:
    return number(value, 0 if value >= 2 else 1)
