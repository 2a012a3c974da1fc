"""Running a case on a backend and on the oracle, and holding the two side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import introkernels as ik
from helpers import exact
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


def assert_outcomes_agree(
    actual: Outcome,
    reference: Outcome,
    *,
    factor: float = 1.0,
    kl_slack: float = 0.0,
    grad_slack: dict[str, float] | None = None,
) -> None:
    """Hold loss, terms and gradients against those of the oracle.

    ``kl_slack`` is an absolute error granted to the divergence alone, ``grad_slack`` one granted to
    the gradients that it names.
    """
    assert_accurate(actual.loss, reference.loss, "loss", factor=factor)
    assert_accurate(actual.ce, reference.ce, "ce", factor=factor)
    assert_accurate(actual.kl, reference.kl, "kl", factor=factor, slack=kl_slack)
    assert actual.grads.keys() == reference.grads.keys()
    for name, grad in actual.grads.items():
        slack = (grad_slack or {}).get(name, 0.0)
        what = f"gradient of {name}"
        assert_accurate(grad, reference.grads[name], what, factor=factor, slack=slack)


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


def slack_of_sums(case: Case, grad_loss: Tensor | None) -> dict[str, float]:
    """What a head's gradients may be off by where the rows of a batch cancel in their sum.

    The gradients of weight and bias add up rows whose errors are relative to the rows, not to what
    their cancellation leaves.
    """
    head = case.upcast()
    features = head["features"].reshape(case.rows, head["weight"].shape[1])
    keywords = {name: value for name, value in head.keywords.items() if name != "class_weight"}
    spelt_out = Case(
        "introspective_loss",
        {
            "logits": F.linear(features, head["weight"], head.tensors["bias"]),
            "target": head["target"].reshape(-1),
            "gradients": head["weight"].expand(case.rows, -1, -1),
            "inputs": features,
        },
        {**keywords, "weight": head.keywords["class_weight"]},
    )
    rows = None if grad_loss is None else grad_loss.reshape(-1)
    sizes = defined(spelt_out, rows).grads["logits"].norm(dim=1)
    precision = computed_precision(case["features"].dtype)
    return {
        "weight": precision * float((sizes * features.norm(dim=1)).sum()),
        "bias": precision * float(sizes.sum()),
    }


def assert_follows_definition(
    case: Case, *, factor: float = 1.0, rows_may_cancel: bool = False
) -> Outcome:
    """Evaluate the case and fail unless it agrees with the definition in value and dtype.

    With ``reduction="none"`` the incoming gradient is random, so that a gradient which mixes up the
    rows or their factors shows. ``rows_may_cancel`` is for heads with numbers that nobody chose:
    their gradients are held to :func:`slack_of_sums`. Returns what the backend gave.
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
        actual,
        reference,
        factor=factor,
        kl_slack=slack_of_kl(case, reference.kl),
        grad_slack=slack_of_sums(case, seen) if rows_may_cancel else None,
    )
    return actual
