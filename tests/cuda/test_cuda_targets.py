"""Index values that nobody checks, as on a GPU: the row is NaN, and no other row notices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.cases import BUILDERS, Case, introspective_case
from helpers.oracle import evaluate

import introkernels as ik

# The others look at the values of a CPU's tensors themselves; tests/gpu has their bad targets.
LOSSES = ("distillation_loss", "introspective_loss")
ROWS, CLASSES, SPOILT = 5, 7, 2
OTHERS = [row for row in range(ROWS) if row != SPOILT]


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTROKERNELS_CHECK", "0")


def spoilt(case: Case, name: str, value: int) -> Case:
    """The case with a wrong index in one row."""
    tensor = case[name].clone()
    tensor[SPOILT] = value
    return case.with_tensors(**{name: tensor})


def assert_one_row_is_nan(case: Case, wrong: Case) -> None:
    right, result = evaluate(case), evaluate(wrong)
    for part in ("loss", "ce", "kl"):
        of_part, expected = getattr(result, part), getattr(right, part)
        assert of_part[SPOILT].isnan()
        assert torch.equal(of_part[OTHERS], expected[OTHERS])
    grad, expected = result.grads["logits"], right.grads["logits"]
    assert grad[SPOILT].isnan().all()
    assert torch.equal(grad[OTHERS], expected[OTHERS])


@pytest.mark.parametrize("target", [-1, CLASSES, 2**40, -(2**40)])
@pytest.mark.parametrize("loss", LOSSES)
def test_unknown_target(backend: str, loss: str, target: int) -> None:
    case = BUILDERS[loss](ROWS, CLASSES, reduction="none")
    assert_one_row_is_nan(case, spoilt(case, "target", target))


@pytest.mark.parametrize("classes", ["no target", "a class too many"])
def test_class_index_that_does_not_fit(backend: str, classes: str) -> None:
    case = introspective_case(ROWS, CLASSES, explained=3, reduction="none")
    index = case.keywords["class_index"].clone()
    target = int(case["target"][SPOILT])
    if classes == "no target":
        index[SPOILT] = torch.tensor([c for c in range(CLASSES) if c != target][:3])
    else:
        others = index[SPOILT] != target
        index[SPOILT, others.nonzero()[0, 0]] = CLASSES
    assert_one_row_is_nan(case, case.with_keywords(class_index=index))


def test_statistics_of_an_unknown_target(backend: str) -> None:
    arguments: dict[str, Any] = {
        "gradients": torch.randn(ROWS, CLASSES, 33),
        "inputs": torch.randn(ROWS, 33),
    }
    target = torch.arange(ROWS)
    right = ik.explanation_stats(**arguments, target=target)
    target[SPOILT] = CLASSES
    result = ik.explanation_stats(**arguments, target=target)
    assert result.dots[SPOILT].isnan().all()
    assert torch.equal(result.dots[OTHERS], right.dots[OTHERS])
    assert torch.equal(result.sq_norms, right.sq_norms)
