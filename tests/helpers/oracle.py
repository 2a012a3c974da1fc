"""Running a case on a backend and on the oracle, and holding the two side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import introkernels as ik
from helpers.cases import Case, call_arguments
from helpers.tolerance import assert_accurate, computed_precision


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


def assert_outcomes_agree(
    actual: Outcome, reference: Outcome, *, factor: float = 1.0, kl_slack: float = 0.0
) -> None:
    """Hold loss, terms and gradients against those of the oracle.

    ``kl_slack`` is an absolute error granted to the divergence alone.
    """
    assert_accurate(actual.loss, reference.loss, "loss", factor=factor)
    assert_accurate(actual.ce, reference.ce, "ce", factor=factor)
    assert_accurate(actual.kl, reference.kl, "kl", factor=factor, slack=kl_slack)
    assert actual.grads.keys() == reference.grads.keys()
    for name, grad in actual.grads.items():
        assert_accurate(grad, reference.grads[name], f"gradient of {name}", factor=factor)


def slack_of_kl(case: Case, kl: Tensor) -> float:
    """What the divergence may be off by where logits or similarities are computed inside.

    Computing them in float32 leaves an absolute error ``e`` in ``log p`` and ``log q``, and hence
    ``e * |p - q|_1 <= e * sqrt(2 * KL)`` (Pinsker) in the divergence: more than a fixed part of it
    where p happens to be close to q.
    """
    if case.function in ("distillation_loss", "similarity_loss"):
        return 0.0
    rows = case.rows if case.keywords.get("reduction", "mean") == "sum" else 1
    spread = (2 * rows * torch.where(kl.isfinite(), kl, 0)).sqrt()
    dtype = case[case.differentiable[0]].dtype
    return computed_precision(dtype) * float(spread.norm())


def assert_follows_definition(case: Case, *, factor: float = 1.0) -> Outcome:
    """Evaluate the case and fail unless it agrees with the definition in value and dtype.

    With ``reduction="none"`` the incoming gradient is random, so that a gradient which mixes up the
    rows or their factors shows. Returns what the backend gave.
    """
    grad_loss = None
    if case.keywords.get("reduction") == "none":
        grad_loss = torch.randn(case["target"].shape, dtype=torch.float64)
    actual = evaluate(case, ik, grad_loss)
    wide = torch.float64 if case[case.differentiable[0]].dtype == torch.float64 else torch.float32
    assert actual.loss.dtype == actual.ce.dtype == actual.kl.dtype == wide
    for name, grad in actual.grads.items():
        assert grad.dtype == case[name].dtype
    # The oracle has to see the very incoming gradient that the backend saw.
    seen = None if grad_loss is None else grad_loss.to(wide).double()
    reference = defined(case, seen)
    assert_outcomes_agree(
        actual, reference, factor=factor, kl_slack=slack_of_kl(case, reference.kl)
    )
    return actual
