"""A second differentiation raises; it is never dropped in silence."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import BUILDERS, Case
from torch import Tensor

import introkernels as ik

MESSAGE = r"differentiated once.*introkernels\.reference"


def first_gradients(case: Case, functions: object = ik) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """The leaves, and the gradients of the squared losses, differentiable again."""
    leaves = {name: case[name].detach().requires_grad_() for name in case.differentiable}
    arguments = case.with_tensors(**leaves).arguments()
    loss = getattr(functions, case.function)(*arguments, **case.keywords)
    gradients = torch.autograd.grad(loss.sum(), leaves.values(), create_graph=True)
    return list(leaves.values()), gradients


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("function", BUILDERS)
def test_differentiating_a_gradient_raises(backend: str, function: str, reduction: str) -> None:
    leaves, gradients = first_gradients(BUILDERS[function](4, 5, reduction=reduction))
    for gradient in gradients:
        with pytest.raises(RuntimeError, match=MESSAGE):
            torch.autograd.grad(gradient.square().sum(), leaves, retain_graph=True)


@pytest.mark.parametrize("function", BUILDERS)
def test_gradient_penalty_in_a_larger_sum_raises(backend: str, function: str) -> None:
    leaves, gradients = first_gradients(BUILDERS[function](4, 5))
    penalty = sum(gradient.square().sum() for gradient in gradients)
    with pytest.raises(RuntimeError, match=MESSAGE):
        (sum(leaf.square().sum() for leaf in leaves) + 0.1 * penalty).backward()


@pytest.mark.parametrize("function", BUILDERS)
def test_differentiating_by_the_incoming_gradient_raises(backend: str, function: str) -> None:
    case = BUILDERS[function](4, 5, reduction="none")
    leaf = case[case.differentiable[0]].requires_grad_()
    loss = getattr(ik, function)(*case.arguments(), **case.keywords)
    incoming = torch.ones(4, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss, leaf, incoming, create_graph=True)
    with pytest.raises(RuntimeError, match=MESSAGE):
        torch.autograd.grad(gradient.sum(), incoming)


@pytest.mark.parametrize("function", BUILDERS)
def test_loss_within_a_function_differentiated_twice_raises(backend: str, function: str) -> None:
    case = BUILDERS[function](4, 5)
    name = case.differentiable[0]

    def loss(leaf: Tensor) -> Tensor:
        arguments = case.with_tensors(**{name: leaf}).arguments()
        return getattr(ik, function)(*arguments, **case.keywords)

    with pytest.raises(RuntimeError, match=MESSAGE):
        torch.func.jacrev(torch.func.jacrev(loss))(case[name])
    with pytest.raises(RuntimeError, match=MESSAGE):
        torch.autograd.functional.hessian(loss, case[name])


@pytest.mark.parametrize("function", BUILDERS)
def test_create_graph_alone_gives_the_same_gradients(backend: str, function: str) -> None:
    case = BUILDERS[function](4, 5)
    _, kept = first_gradients(case)
    leaves = [case[name].requires_grad_() for name in case.differentiable]
    loss = getattr(ik, function)(*case.arguments(), **case.keywords)
    for again, gradient in zip(kept, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(again, gradient)


@pytest.mark.parametrize("function", BUILDERS)
def test_definition_allows_it(function: str) -> None:
    case = BUILDERS[function](4, 5, torch.float64)
    name = case.differentiable[0]

    def loss(leaf: Tensor) -> Tensor:
        arguments = case.with_tensors(**{name: leaf}).arguments()
        return getattr(ik.reference, function)(*arguments, **case.keywords)

    hessian = torch.autograd.functional.hessian(loss, case[name]).flatten(2).flatten(0, 1)
    assert hessian.abs().max() > 0
    if name == "logits":
        assert torch.autograd.gradgradcheck(loss, case[name].requires_grad_())
        assert torch.linalg.eigvalsh(hessian).min() > -1e-12, "the losses are convex in the logits"
