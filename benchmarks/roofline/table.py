"""Predictions and their bars: benchmarks/predicted.toml, and its table in benchmarks/README.md."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from roofline.cases import CASES, Case
from roofline.machine import GPUS
from roofline.predict import Prediction

PATH = Path(__file__).resolve().parents[1] / "predicted.toml"
README = PATH.with_name("README.md")
BEGIN, END = "<!-- predicted: made by make kernels WRITE=--write -->", "<!-- /predicted -->"
# A bar stands so far below the figure that it is made of: compilers differ a little.
MARGIN = 0.02
# Where the goals hold; and where float64 is slow, so that no kernel may be bound by it.
GOAL, WITHOUT_FLOAT64 = "H200", "RTX 4090"
HEAD = f"""\
# What kernels are predicted to reach of a plain copy, from their machine code, and the bars that
# `make kernels` holds them to; see README.md here. `make kernels WRITE=--write` makes this file: it
# raises bars to {MARGIN} below the figure, or to the goal. To lower one is done by hand, as is to
# say why a goal is missed.
"""

# By backend and case.
Predictions = dict[tuple[str, Case], dict[str, Prediction]]
Entries = dict[tuple[str, Case], dict[str, Any]]


def read(path: Path = PATH) -> Entries:
    """The entries of the table: figures by GPU, and a reason where a goal is missed."""
    found: Entries = {}
    for entry in tomllib.loads(path.read_text()).get("kernels", ()) if path.exists() else ():
        case = Case(entry.pop("kernel"), tuple(entry.pop("shape")), entry.pop("dtype"))
        found[entry.pop("backend"), case] = entry
    return found


def updated(entries: Entries, predictions: Predictions) -> Entries:
    """The entries with these predictions, and bars for them."""
    result = dict(entries)
    for key, of_gpus in predictions.items():
        before = entries.get(key, {})
        entry = {gpu: before[gpu] for gpu in GPUS if gpu in before}
        for gpu, made in of_gpus.items():
            bar = math.floor(100 * min(made.share - MARGIN, key[1].goal)) / 100
            entry[gpu] = {
                "predicted": round(made.share, 2),
                "bar": max(bar, 0.0, before.get(gpu, {}).get("bar", 0.0)),
                "cap": round(made.cap, 2),
                "bound": made.bound,
                "instructions": round(made.instructions, 1),
            }
        if misses(key[1], of_gpus):
            entry["reason"] = before.get("reason", "")
        result[key] = entry
    return result


def text(entries: Entries) -> str:
    """The table as it is kept."""
    lines = [HEAD]
    for backend, case in sorted(entries, key=_order):
        lines += ["[[kernels]]", f'backend = "{backend}"', f'kernel = "{case.kernel}"']
        lines += [f"shape = {list(case.shape)}", f'dtype = "{case.dtype}"']
        entry = entries[backend, case]
        for gpu in GPUS:
            if gpu in entry:
                figures = ", ".join(f"{key} = {_shown(one)}" for key, one in entry[gpu].items())
                lines.append(f'"{gpu}" = {{ {figures} }}')
        if "reason" in entry:
            lines.append(f"reason = {_shown(entry['reason'])}")
        lines.append("")
    return "\n".join(lines)


def _order(key: tuple[str, Case]) -> tuple[str, int]:
    return key[0], CASES.index(key[1])


def _shown(value: float | str) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def misses(case: Case, of_gpus: dict[str, Prediction]) -> list[str]:
    """What these predictions lack of the goals."""
    found = []
    for gpu, made in of_gpus.items():
        if gpu == GOAL and made.share < case.goal:
            found.append(f"is predicted {made.share:.2f} on {gpu}, of {case.goal} that are meant")
        if gpu == WITHOUT_FLOAT64 and made.bound == "FP64" and made.cap < 1:
            found.append(f"is bound by float64 on {gpu}, to {made.cap:.2f}")
    return found


def title(backend: str, case: Case) -> str:
    """A launch in words."""
    return f"{backend} {case.kernel} {'x'.join(map(str, case.shape))} {case.dtype}"


def verdict(entries: Entries, predictions: Predictions) -> tuple[list[str], list[str]]:
    """What misses a goal, with the reason; and what is worse than a bar or has no bar or reason."""
    notes, complaints = [], []
    for key, of_gpus in predictions.items():
        name, entry = title(*key), entries.get(key, {})
        for gpu, made in of_gpus.items():
            bar = entry.get(gpu, {}).get("bar")
            if bar is None:
                complaints.append(f"{name} has no bar on {gpu}")
            elif made.share < bar:
                complaints.append(
                    f"{name} is predicted {made.share:.2f} on {gpu}, below its bar of {bar}"
                )
        for missed in misses(key[1], of_gpus):
            if reason := entry.get("reason"):
                notes.append(f"{name} {missed}: {reason}")
            else:
                complaints.append(f"{name} {missed}, and {PATH.name} has no reason for it")
    return notes, complaints


def lines(predictions: Predictions) -> Iterable[str]:
    """A line for each launch and GPU: instructions by unit, caps, and the predicted share."""
    yield f"{'GPU':<8}  {'issue':>5}  {'cap':>5}  predicted  for; instructions a class or number"
    for (backend, case), of_gpus in predictions.items():
        for gpu, made in of_gpus.items():
            units = " ".join(f"{unit} {count:.1f}" for unit, count in made.by_unit.items())
            yield (
                f"{gpu:<8}  {made.issue:>5.2f}  {made.cap:>5.2f}  {made.share:>9.2f}  "
                f"{title(backend, case)}; {made.instructions:.1f}: {units}; bound by {made.bound}"
            )


def document(entries: Entries) -> str:
    """The table for people: instructions on an H200, and the predicted share of each GPU."""
    rows = [
        "| kernel | shape | dtype | instructions | " + " | ".join(GPUS) + " |",
        "|---|---|---|" + "---:|" * (1 + len(GPUS)),
    ]
    for backend, case in sorted(entries, key=_order):
        entry = entries[backend, case]
        cells = [f"{entry[gpu]['predicted']:.2f}" if gpu in entry else "" for gpu in GPUS]
        rows.append(
            f"| {backend} `{case.kernel}` | {' × '.join(map(str, case.shape))} | {case.dtype} | "
            f"{entry[GOAL]['instructions'] if GOAL in entry else ''} | {' | '.join(cells)} |"
        )
    return "\n".join((BEGIN, *rows, END))


def report(predictions: Predictions, write: bool) -> list[str]:
    """Print predictions and what misses a goal; returns complaints. ``write``: keep the tables."""
    entries = read()
    if write:
        entries = updated(entries, predictions)
        PATH.write_text(text(entries))
        before, rest = README.read_text().split(BEGIN)
        README.write_text(before + document(entries) + rest.partition(END)[2])
    notes, complaints = verdict(entries, predictions)
    print(*lines(predictions), *notes, sep="\n")
    return complaints
