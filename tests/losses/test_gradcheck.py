"""The gradients are right, by finite differences and by autograd of the definition."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers.cases import (
    BUILDERS,
    Case,
    distillation_case,
    introspective_case,
    linear_case,
    similarity_case,
)
from helpers.oracle import assert_follows_definition, evaluate
from helpers.tolerance import assert_accurate
from torch import Tensor

import introkernels as ik

FLOAT64 = torch.float64
REDUCTIONS = ("mean", "sum", "none")
LOSS_KEYWORDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "ce_weight": 0.0, "kl_weight": 1.0},
    {"label_smoothing": 0.3, "class_weights": True, "ignored": 2, "ignore_index": -7},
]
LABEL_KEYWORDS: list[dict[str, Any]] = [
    {"similarity": "projection", "similarity_temperature": 0.3},
    {"label_mode": "split", "non_target_mass": 0.4},
    {"label_mode": "split", "similarity": "projection", "explained": 3, "ignored": 1},
]


def named(keywords: dict[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in keywords.items()) or "defaults"


def gradcheck_by(case: Case, *names: str) -> None:
    """Finite differences of the loss by the tensors called ``names``."""

    def loss(*tensors: Tensor) -> Tensor:
        replaced = case.with_tensors(**dict(zip(names, tensors, strict=True)))
        return getattr(ik, case.function)(*replaced.arguments(), **case.keywords)

    assert torch.autograd.gradcheck(loss, [case[name].requires_grad_() for name in names])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("keywords", LOSS_KEYWORDS, ids=named)
def test_distillation(backend: str, keywords: dict[str, Any], reduction: str) -> None:
    gradcheck_by(distillation_case(4, 5, FLOAT64, **keywords, reduction=reduction), "logits")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("keywords", LOSS_KEYWORDS + LABEL_KEYWORDS, ids=named)
def test_similarity(backend: str, keywords: dict[str, Any], reduction: str) -> None:
    gradcheck_by(similarity_case(4, 5, FLOAT64, **keywords, reduction=reduction), "logits")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("keywords", [*LOSS_KEYWORDS, *LABEL_KEYWORDS, {"center": True}], ids=named)
def test_introspective(backend: str, keywords: dict[str, Any], reduction: str) -> None:
    gradcheck_by(introspective_case(4, 5, FLOAT64, **keywords, reduction=reduction), "logits")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_linear_where_nothing_is_explained(backend: str, bias: bool, reduction: str) -> None:
    """Without the divergence the loss depends on features and weight through the logits alone."""
    case = linear_case(
        4, 5, FLOAT64, width=3, bias=bias, ignored=1, kl_weight=0.0, label_smoothing=0.1,
        class_weights=True, reduction=reduction,
    )  # fmt: skip
    gradcheck_by(case, *case.differentiable)


@pytest.mark.parametrize("keywords", [*LABEL_KEYWORDS[:2], {"center": True}], ids=named)
def test_linear_by_its_bias(backend: str, keywords: dict[str, Any]) -> None:
    """Explanations don't depend on the bias, so finite differences see the divergence there."""
    gradcheck_by(linear_case(4, 5, FLOAT64, width=3, ignored=1, **keywords), "bias")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("keywords", [{}, *LABEL_KEYWORDS[:2], {"center": True}], ids=named)
def test_linear_with_constant_explanations(
    backend: str, keywords: dict[str, Any], reduction: str
) -> None:
    case = linear_case(6, 5, FLOAT64, ignored=1, **keywords, reduction=reduction)
    assert_follows_definition(case)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_linear_is_the_introspective_loss_of_a_linear_layer(backend: str, reduction: str) -> None:
    case = linear_case(6, 5, FLOAT64, ignored=1, reduction=reduction)
    grad_loss = torch.rand(6 if reduction == "none" else (), dtype=FLOAT64)
    fused = evaluate(case, grad_loss=grad_loss)

    features, weight, bias = (case[name].clone().requires_grad_() for name in case.differentiable)
    loss = ik.introspective_loss(
        torch.nn.functional.linear(features, weight, bias),
        case["target"],
        weight.expand(6, -1, -1),
        features,
        reduction=reduction,
    )
    grads = torch.autograd.grad(loss, (features, weight, bias), grad_loss)

    assert_accurate(fused.loss, loss)
    for name, grad in zip(case.differentiable, grads, strict=True):
        assert_accurate(fused.grads[name], grad, name)


@pytest.mark.parametrize(
    "needed",
    [
        names
        for count in (1, 2)
        for names in itertools.combinations(("features", "weight", "bias"), count)
    ],
    ids="+".join,
)
def test_linear_gradients_do_not_depend_on_which_are_needed(
    backend: str, needed: tuple[str, ...]
) -> None:
    case = linear_case(6, 5, ignored=1)
    every = evaluate(case).grads
    leaves = {
        name: case[name].clone().requires_grad_(name in needed) for name in case.differentiable
    }
    loss = ik.linear_introspective_loss(*case.with_tensors(**leaves).arguments(), **case.keywords)
    loss.backward()
    for name, leaf in leaves.items():
        if name in needed:
            assert torch.equal(leaf.grad, every[name])
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("function", BUILDERS)
def test_constants_get_no_gradient(backend: str, function: str) -> None:
    case = BUILDERS[function](4, 5, class_weights=True)
    tensors = {
        name: tensor.requires_grad_()
        if isinstance(tensor, Tensor) and tensor.is_floating_point()
        else tensor
        for name, tensor in case.tensors.items()
    }
    keywords = {
        name: value.requires_grad_() if isinstance(value, Tensor) else value
        for name, value in case.keywords.items()
    }
    loss = getattr(ik, function)(*case.with_tensors(**tensors).arguments(), **keywords)
    loss.backward()
    for name, tensor in {**tensors, **keywords}.items():
        if isinstance(tensor, Tensor):
            assert (tensor.grad is not None) == (name in case.differentiable), name


@pytest.mark.parametrize("function", BUILDERS)
def test_parts_carry_no_graph(backend: str, function: str) -> None:
    case = BUILDERS[function](4, 5)
    leaves = {name: case[name].requires_grad_() for name in case.differentiable}
    arguments = case.with_tensors(**leaves).arguments()
    parts = getattr(ik, function)(*arguments, **case.keywords, return_parts=True)
    assert parts.loss.requires_grad
    assert not parts.ce.requires_grad
    assert not parts.kl.requires_grad


@pytest.mark.parametrize("function", BUILDERS)
def test_no_graph_without_gradients_wanted(backend: str, function: str) -> None:
    case = BUILDERS[function](4, 5)
    assert not getattr(ik, function)(*case.arguments(), **case.keywords).requires_grad
    case[case.differentiable[0]].requires_grad_()
    with torch.no_grad():
        assert not getattr(ik, function)(*case.arguments(), **case.keywords).requires_grad
    with torch.inference_mode():
        assert torch.isfinite(getattr(ik, function)(*case.arguments(), **case.keywords))


def test_statistics_and_soft_labels_carry_no_graph(backend: str) -> None:
    case = introspective_case(4, 5)
    gradients, inputs = case["gradients"].requires_grad_(), case["inputs"].requires_grad_()
    stats = ik.explanation_stats(gradients, inputs, case["target"])
    assert not stats.dots.requires_grad
    assert not stats.sq_norms.requires_grad
    graph_bearing = stats._replace(dots=stats.dots.clone().requires_grad_())
    assert not ik.soft_labels(graph_bearing, case["target"]).requires_grad
