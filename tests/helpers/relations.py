"""What tests of relations between calls share: sharp cases in float64 and their comparison."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.cases import BUILDERS, Case
from helpers.oracle import Outcome
from helpers.tolerance import assert_accurate


def build(loss: str, rows: int = 6, classes: int = 9, **keywords: Any) -> Case:
    """A case in float64 with a sharper temperature than the default's."""
    return BUILDERS[loss](rows, classes, torch.float64, temperature=1.5, **keywords)


def assert_same(actual: Outcome, expected: Outcome, **other_grads: Tensor) -> None:
    """Equal losses, terms and gradients; ``other_grads`` replace expected gradients."""
    assert_accurate(actual.loss, expected.loss, "loss")
    assert_accurate(actual.ce, expected.ce, "ce")
    assert_accurate(actual.kl, expected.kl, "kl")
    for name, grad in {**expected.grads, **other_grads}.items():
        assert_accurate(actual.grads[name], grad, f"gradient of {name}")


def logits_of(case: Case) -> Tensor:
    """The logits of a case, which a head computes."""
    if case.function == "linear_introspective_loss":
        return F.linear(case["features"], case["weight"], case["bias"])
    return case["logits"]
