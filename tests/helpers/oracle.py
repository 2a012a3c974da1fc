"""Running a case on a backend and on the oracle, and holding the two side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import introkernels as ik
from helpers import exact
from helpers.bounds import Bounds, bounds_of
from helpers.cases import Case, call_arguments
from helpers.tolerance import assert_within


@dataclass(frozen=True)
class Outcome:
    """What a call gives: its loss, the two terms, and the gradients by argument name."""

    loss: Tensor
    ce: Tensor
    kl: Tensor
    grads: dict[str, Tensor]


def evaluate(case: Case, functions: Any = ik, grad_loss: Tensor | None = None) -> Outcome:
    """Call ``functions.<case.function>`` and differentiate the loss.

    ``grad_loss`` is the incoming gradient; a scalar loss has 1 without it, and ``"none"`` 1 in each
    row. Tensors keep their strides.
    """
    leaves = {
        name: tensor.detach().requires_grad_(name in case.differentiable)
        if isinstance(tensor, Tensor)
        else None
        for name, tensor in case.tensors.items()
    }
    function = getattr(functions, case.function)
    loss, ce, kl = function(*call_arguments(leaves), **case.keywords, return_parts=True)
    if grad_loss is None:
        grad_loss = torch.ones_like(loss)
    grads = torch.autograd.grad(
        loss, [leaves[name] for name in case.differentiable], grad_loss.to(loss.dtype)
    )
    return Outcome(loss.detach(), ce, kl, dict(zip(case.differentiable, grads, strict=True)))


def defined(case: Case, grad_loss: Tensor | None = None) -> Outcome:
    """What the definition gives for the case's numbers in float64, differentiated by autograd."""
    return evaluate(case.upcast(), ik.reference, grad_loss)


def exact_distillation(case: Case) -> tuple[Tensor, Tensor]:
    """Losses ``[B]`` and gradients ``[B, C]`` of a distillation case, unreduced, from 50 digits."""
    rows = []
    for z, t, y in zip(
        case["logits"].tolist(),
        case["teacher_logits"].tolist(),
        case["target"].tolist(),
        strict=True,
    ):
        keywords = {name: case.keywords[name] for name in ("temperature", "ce_weight", "kl_weight")}
        q = exact.teacher_labels(t, keywords["temperature"], [True] * len(z))
        rows.append(exact.row(z, q, y, **keywords))
    losses = torch.tensor([row.loss for row in rows], dtype=torch.float64)
    return losses, torch.tensor([row.grad for row in rows], dtype=torch.float64)


def assert_outcomes_agree(actual: Outcome, reference: Outcome, bounds: Bounds) -> None:
    """Hold loss, terms and gradients against those of the oracle, number by number."""
    assert_within(actual.loss, reference.loss, bounds.loss, "loss")
    assert_within(actual.ce, reference.ce, bounds.ce, "ce")
    assert_within(actual.kl, reference.kl, bounds.kl, "kl")
    assert actual.grads.keys() == reference.grads.keys()
    for name, grad in actual.grads.items():
        what = f"gradient of {name}"
        assert_within(grad, reference.grads[name], bounds.grads[name], what)


def assert_follows_definition(case: Case) -> Outcome:
    """Evaluate the case and fail unless it agrees with the definition in value and dtype.

    With ``reduction="none"`` the incoming gradient is random, so that a gradient which mixes up the
    rows or their factors shows. Returns what the backend gave.
    """
    grad_loss = None
    if case.keywords.get("reduction") == "none":
        grad_loss = torch.randn(case.shape, dtype=torch.float64)
    actual = evaluate(case, ik, grad_loss)
    wide = torch.float64 if case[case.differentiable[0]].dtype == torch.float64 else torch.float32
    assert actual.loss.dtype == actual.ce.dtype == actual.kl.dtype == wide
    for name, grad in actual.grads.items():
        assert grad.dtype == case[name].dtype
    # The oracle has to see the very incoming gradient that the backend saw.
    seen = None if grad_loss is None else grad_loss.to(wide).double()
    assert_outcomes_agree(actual, defined(case, seen), bounds_of(case, seen))
    return actual
