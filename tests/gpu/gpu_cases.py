"""Calls of every loss on GPU tensors, and their results as one flat list."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from helpers.cases import (
    Case,
    distillation_case,
    introspective_case,
    linear_case,
    similarity_case,
)
from torch import Tensor

import introkernels as ik

# Every kernel and every way of sharing work: rows that share a program, rows of several programs
# that meet at a ticket, heads of one chunk and of several.
CASES: dict[str, Callable[[], Case]] = {
    "distillation": lambda: distillation_case(65, 100, ignored=3, class_weights=True),
    "distillation-none": lambda: distillation_case(
        33, 3001, torch.bfloat16, ignored=2, reduction="none"
    ),
    "similarity": lambda: similarity_case(65, 100, ignored=3),
    "similarity-explained": lambda: similarity_case(17, 300, explained=40, label_mode="split"),
    "introspective": lambda: introspective_case(20, 10, torch.bfloat16, shape=(3, 65, 65)),
    "introspective-centred": lambda: introspective_case(
        6, 17, shape=(2051,), center=True, ignored=1, reduction="none"
    ),
    "introspective-explained": lambda: introspective_case(5, 33, shape=(40_003,), explained=4),
    "head": lambda: linear_case(48, 100, torch.bfloat16, width=64, ignored=2),
    "head-centred": lambda: linear_case(
        40, 257, width=33, center=True, reduction="none", class_weights=True
    ),
    "head-chunks": lambda: linear_case(700, 5000, width=128),
}


def case_of(name: str) -> Case:
    """The case of that name, on the current GPU."""
    return on_gpu(CASES[name])


def on_gpu(build: Callable[[], Case]) -> Case:
    with torch.device("cuda"):
        return build()


def leaves_of(case: Case) -> Case:
    """The same tensors, those that are trained as leaves."""
    return case.with_tensors(
        **{name: case[name].detach().requires_grad_() for name in case.differentiable}
    )


def loss_of(case: Case, **keywords: Any) -> Tensor:
    return getattr(ik, case.function)(*case.arguments(), **case.keywords, **keywords)


def results(case: Case) -> list[Tensor]:
    """Loss, terms and gradients of a case of leaves, without any look at numbers."""
    loss, ce, kl = loss_of(case, return_parts=True)
    leaves = [case[name] for name in case.differentiable]
    grads = torch.autograd.grad(loss, leaves, torch.ones_like(loss))
    return [loss.detach(), ce, kl, *grads]


def refill(case: Case, other: Case) -> None:
    """Write the numbers of ``other`` into the tensors of ``case``."""
    with torch.no_grad():
        for values, news in ((case.tensors, other.tensors), (case.keywords, other.keywords)):
            for name, tensor in values.items():
                if isinstance(tensor, Tensor):
                    tensor.copy_(news[name])


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    """The same bits, where NaN is NaN."""
    for number, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        same = (ours == theirs) | (ours.isnan() & theirs.isnan())
        wrong = int((~same).sum())
        assert wrong == 0, f"result {number} differs in {wrong} of {theirs.numel()} places"
