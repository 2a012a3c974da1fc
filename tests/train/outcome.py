"""What two experiments must have in common to count as equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

TIMES = {"wall_seconds", "step_milliseconds", "step_seconds"}


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def assert_same_tree(left: Any, right: Any) -> None:
    """Equal to the bit, tensors included."""
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same_tree(left[key], right[key])
    elif isinstance(left, list):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same_tree(one, other)
    elif isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    else:
        assert left == right


def assert_same_outcome(left: Path, right: Path) -> None:
    """Weights, optimiser, generators, metrics and tables agree to the bit; times may differ."""
    runs = sorted(p.parent.relative_to(left) for p in left.rglob("checkpoint.pt"))
    assert runs
    assert runs == sorted(p.parent.relative_to(right) for p in right.rglob("checkpoint.pt"))
    for run in runs:
        states = [
            torch.load(out / run / "checkpoint.pt", weights_only=True) for out in (left, right)
        ]
        assert_same_tree(*(without_times(state) for state in states))
        assert (left / run / "metrics.csv").read_text() == (right / run / "metrics.csv").read_text()
        assert_same_json(left / run / "metrics.json", right / run / "metrics.json")
    assert_same_json(left / "config.json", right / "config.json")
    assert_same_json(left / "summary.json", right / "summary.json")


def assert_same_json(left: Path, right: Path) -> None:
    assert without_times(json.loads(left.read_text())) == without_times(
        json.loads(right.read_text())
    )
