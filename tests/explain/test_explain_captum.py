"""Explanations against Captum's, coordinate by coordinate."""

from __future__ import annotations

import copy
from typing import Any

import captum.attr
import pytest
import torch
from explain_models import (
    CLASSES,
    NETWORKS,
    assert_close,
    dense_stats,
    resnet,
    token_transformer,
    tokens,
)
from torch import Tensor, nn

import introkernels as ik
from introkernels.explain import class_explanation_stats
from introkernels.types import ExplanationStats


class WithCoordinate(nn.Module):
    """A model with one more class, whose logit is one coordinate of the input.

    The explanation of that class by gradient x input is the coordinate ``x_d``, and zero elsewhere.
    So its inner product with the explanation of another class is ``x_d`` times that explanation's
    coordinate ``d``: statistics show the explanations themselves.
    """

    def __init__(self, model: nn.Module, coordinate: int) -> None:
        super().__init__()
        self.model = model
        self.coordinate = coordinate

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat([self.model(inputs), inputs.flatten(1)[:, self.coordinate, None]], 1)


def explanations(model: nn.Module, inputs: Tensor, **keywords: Any) -> Tensor:
    """Gradient x input ``[B, C, D]`` as class_explanation_stats has it."""
    target = torch.full((len(inputs),), CLASSES)
    columns = []
    for d, value in enumerate(inputs.flatten(1).t()):
        extended = WithCoordinate(copy.deepcopy(model), d)
        _, stats = class_explanation_stats(extended, inputs, target, **keywords)
        columns.append(stats.dots[:, :CLASSES] / value[:, None])
    return torch.stack(columns, 2)


def attributions(attribution: Any, inputs: Tensor, **keywords: Any) -> Tensor:
    """What a Captum attribution gives for each class, ``[B, C, D]``."""
    by_class = [
        attribution.attribute(inputs.clone().requires_grad_(), target=c, **keywords)
        for c in range(CLASSES)
    ]
    return torch.stack([a.detach().flatten(1) for a in by_class], 1)


def assert_equal(got: Tensor, expected: Tensor) -> None:
    """To 1e-10 of each class's own length."""
    assert got.shape == expected.shape
    assert expected.norm(dim=2).min() > 0
    assert ((got - expected).norm(dim=2) / expected.norm(dim=2)).max() < 1e-10


@pytest.mark.parametrize("name", NETWORKS)
def test_exact_is_input_x_gradient_in_eval_mode(name: str) -> None:
    make, data = NETWORKS[name]
    inputs, _ = data()
    expected = attributions(captum.attr.InputXGradient(make().eval()), inputs)
    assert_equal(explanations(make(), inputs), expected)


def test_exact_is_input_x_gradient_of_a_batch_that_is_normalised_together() -> None:
    inputs, _ = NETWORKS["resnet"][1]()
    expected = attributions(captum.attr.InputXGradient(resnet()), inputs)
    assert_equal(explanations(resnet(), inputs, mode="train"), expected)
    # Not what running statistics give.
    in_eval_mode = attributions(captum.attr.InputXGradient(resnet().eval()), inputs)
    assert (expected - in_eval_mode).norm() > 0.1 * expected.norm()


def test_an_ignored_row_has_no_part_in_what_is_normalised_together() -> None:
    inputs, target = NETWORKS["resnet"][1]()
    target[:] = 3
    target[1] = -100
    live = target != -100
    leaf = inputs.clone().requires_grad_()
    logits = resnet()(leaf)
    expected = torch.stack(
        [
            (torch.autograd.grad(logits[live, c].sum(), leaf, retain_graph=True)[0] * inputs)[live]
            for c in range(CLASSES)
        ],
        1,
    ).flatten(2)
    _, stats = class_explanation_stats(resnet(), inputs, target, mode="train")
    of_live = ExplanationStats(stats.dots[live], stats.sq_norms[live])
    assert_close(of_live, dense_stats(expected, target[live]), 1e-10)


@pytest.mark.parametrize("name", NETWORKS)
def test_projection_is_input_x_gradient(name: str) -> None:
    make, data = NETWORKS[name]
    inputs, _ = data()
    expected = attributions(captum.attr.InputXGradient(make().eval()), inputs)
    assert_equal(explanations(make(), inputs, method="projection"), expected)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    ("steps", "tolerance"),
    # Captum rounds the weights of the steps to float32, which 1 and 1/2 survive.
    [(1, 1e-10), (2, 1e-10), (7, 2e-7)],
)
@pytest.mark.parametrize("baseline", ["zero", "number", "tensor"])
def test_integrated_gradients(name: str, steps: int, tolerance: float, baseline: str) -> None:
    make, data = NETWORKS[name]
    inputs, target = data()
    start = {"zero": 0.0, "number": 0.3, "tensor": inputs[:1].flip(-1)}[baseline]
    expected = attributions(
        captum.attr.IntegratedGradients(make().eval(), multiply_by_inputs=True),
        inputs,
        baselines=start,
        n_steps=steps,
        method="gausslegendre",
    )
    explainer = ik.explain.IntegratedGradients(steps=steps, baseline=start)
    _, stats = class_explanation_stats(make(), inputs, target, explainer=explainer)
    assert_close(stats, dense_stats(expected, target), tolerance)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_is_saliency_with_its_sign(name: str) -> None:
    make, data = NETWORKS[name]
    inputs, target = data()
    expected = attributions(captum.attr.Saliency(make().eval()), inputs, abs=False)
    _, stats = class_explanation_stats(make(), inputs, target, explainer="gradient")
    assert_close(stats, dense_stats(expected, target), 1e-10)


@pytest.mark.parametrize("at", ["3", "3.norms.0", "4"])
def test_a_layer_is_layer_gradient_x_activation(at: str) -> None:
    inputs, target = NETWORKS["resnet"][1]()
    model = resnet().eval()
    layer = captum.attr.LayerGradientXActivation(model, model.get_submodule(at))
    expected = attributions(layer, inputs)
    _, stats = class_explanation_stats(resnet(), inputs, target, at=at)
    assert_close(stats, dense_stats(expected, target), 1e-10)


def test_tokens_are_explained_at_their_embedding() -> None:
    inputs, target = tokens()
    model = token_transformer().eval()
    layer = captum.attr.LayerGradientXActivation(model, model.embedding)
    by_class = [layer.attribute(inputs, target=c).detach().flatten(1) for c in range(CLASSES)]
    expected = dense_stats(torch.stack(by_class, 1), target)
    for method in ("exact", "projection"):
        _, stats = class_explanation_stats(
            token_transformer(), inputs, target, method=method, at="embedding"
        )
        assert_close(stats._replace(sq_norms=expected.sq_norms), expected, 1e-10)
    _, stats = class_explanation_stats(token_transformer(), inputs, target, at="embedding")
    assert_close(stats, expected, 1e-10)
