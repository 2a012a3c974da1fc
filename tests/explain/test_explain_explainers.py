"""Explainers beyond gradient x input: their definitions, with every method."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from explain_models import CLASSES, assert_close, cnn, dense_stats, images, vectors
from torch import Tensor, nn

import introkernels as ik
from introkernels.explain import (
    Gradient,
    GradientXInput,
    IntegratedGradients,
    SmoothGrad,
    class_explanation_stats,
)
from introkernels.explain.explainers import Explainer


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def gradients(model: nn.Module, inputs: Tensor) -> Tensor:
    """``dz_c/dx`` ``[B, C, *S]`` of a model in eval mode."""
    leaf = inputs.clone().requires_grad_()
    logits = model(leaf)
    return torch.stack(
        [
            torch.autograd.grad(logits[:, c].sum(), leaf, retain_graph=True)[0]
            for c in range(logits.shape[1])
        ],
        1,
    )


def test_smoothgrad_is_the_mean_gradient_of_noisy_copies() -> None:
    inputs, target = images()
    model = cnn().eval()
    generator = seeded()
    flat = inputs.flatten(1)
    spread = (flat.max(1).values - flat.min(1).values)[:, None, None, None]
    total = torch.zeros(len(inputs), CLASSES, *inputs.shape[1:], dtype=torch.float64)
    for _ in range(5):
        noise = torch.randn(inputs.shape, generator=generator).double()
        total += gradients(model, inputs + 0.2 * spread * noise)
    expected = dense_stats((total / 5).flatten(2), target)
    explainer = SmoothGrad(samples=5, noise=0.2)
    _, stats = class_explanation_stats(
        model, inputs, target, explainer=explainer, generator=seeded()
    )
    assert_close(stats, expected, 1e-12)
    _, stats = class_explanation_stats(
        model, inputs, target, explainer=explainer, generator=seeded(), method="projection"
    )
    assert_close(stats._replace(sq_norms=expected.sq_norms), expected, 1e-12)


def test_smoothgrad_without_a_generator_leaves_random_numbers_alone() -> None:
    inputs, target = images()
    model = cnn().eval()
    # Tests before this one may have drawn from the numbers of its seed.
    torch.manual_seed(5)
    class_explanation_stats(model, inputs, target, explainer="smoothgrad")
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = (
        class_explanation_stats(model, inputs, target, explainer="smoothgrad")[1].dots
        for _ in range(2)
    )
    assert torch.get_rng_state().equal(state)
    assert not first.equal(second)
    # Another seed starts the package's own numbers anew.
    torch.manual_seed(4)
    class_explanation_stats(model, inputs, target, explainer="smoothgrad")
    torch.manual_seed(3)
    _, again = class_explanation_stats(model, inputs, target, explainer="smoothgrad")
    assert again.dots.equal(first)


def test_integrated_gradients_add_up_to_the_difference_of_logits() -> None:
    """Completeness (Sundararajan et al. 2017): the sum of ``E_c`` is ``z_c(x) - z_c(b)``.

    The sum of the inputs is a logit whose explanation is ``x - b``, here 1 everywhere: inner
    products with it are sums.
    """

    class Sums(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            flat = inputs.flatten(1)
            first = flat[:, :1]
            return torch.stack([flat.exp().sum(1), (first * flat.sin()).sum(1), flat.sum(1)], 1)

    inputs, _ = vectors(rows=3)
    baseline = inputs - 1
    _, stats = class_explanation_stats(
        Sums(),
        inputs,
        torch.full((3,), 2),
        explainer=IntegratedGradients(steps=20, baseline=baseline),
    )
    expected = Sums()(inputs) - Sums()(baseline)
    torch.testing.assert_close(stats.dots, expected, rtol=1e-12, atol=1e-12)


def test_one_step_is_taken_in_the_middle() -> None:
    inputs, target = images()
    model = cnn().eval()
    _, stats = class_explanation_stats(
        model, inputs, target, explainer=IntegratedGradients(steps=1, baseline=2.0)
    )
    by_hand = gradients(model, (inputs + 2) / 2) * (inputs - 2)[:, None]
    assert_close(stats, dense_stats(by_hand.flatten(2), target), 1e-12)


def test_a_linear_model_has_the_same_integrated_gradients_as_gradient_x_input() -> None:
    torch.manual_seed(0)
    model = nn.Linear(9, CLASSES).double()
    inputs, target = torch.randn(4, 9, dtype=torch.float64), torch.tensor([0, 1, 4, 2])
    _, expected = class_explanation_stats(model, inputs, target)
    _, stats = class_explanation_stats(model, inputs, target, explainer="integrated_gradients")
    assert_close(stats, expected, 1e-13)


@pytest.mark.parametrize("method", ["exact", "sketch"])
def test_names_stand_for_default_settings(method: Any) -> None:
    inputs, target = images()
    for name, explainer in {
        "gradient_x_input": GradientXInput(),
        "gradient": Gradient(),
        "integrated_gradients": IntegratedGradients(steps=16, baseline=0.0),
        "smoothgrad": SmoothGrad(samples=8, noise=0.15),
    }.items():
        by_name, by_object = (
            class_explanation_stats(
                cnn(), inputs, target, method=method, explainer=given, generator=seeded()
            )[1]
            for given in (name, explainer)
        )
        assert by_name.dots.equal(by_object.dots)
        assert by_name.sq_norms.equal(by_object.sq_norms)


@pytest.mark.parametrize("explainer", ["gradient_x_input", "integrated_gradients", "smoothgrad"])
def test_the_logits_are_those_of_a_training_forward(explainer: str) -> None:
    inputs, target = images()
    model = cnn()
    plain = copy.deepcopy(model)
    torch.manual_seed(4)
    expected = plain(inputs)
    expected.sum().backward()
    torch.manual_seed(4)
    logits, _ = class_explanation_stats(
        model, inputs, target, explainer=explainer, mode="train", method="exact"
    )
    assert logits.equal(expected)
    logits.sum().backward()
    for got, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        assert got.grad is not None
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-12, atol=1e-14)
    for name, value in plain.state_dict().items():
        assert model.state_dict()[name].equal(value), name


HEADS: dict[str, Explainer] = {
    "gradient_x_input": GradientXInput(),
    "gradient": Gradient(),
    "integrated": IntegratedGradients(baseline=0.5),
    "integrated from features": IntegratedGradients(baseline=torch.linspace(-1, 1, 24).double()),
    "smoothgrad": SmoothGrad(),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("top_k", [None, 2])
def test_the_head_in_closed_form(name: str, center: bool, top_k: int | None) -> None:
    inputs, target = images()
    model = cnn().eval()
    features = model[:-1](inputs).detach()
    factor = {
        "gradient_x_input": features,
        "integrated": features - 0.5,
        "integrated from features": features - torch.linspace(-1, 1, 24).double(),
    }.get(name, torch.ones_like(features))
    _, stats = class_explanation_stats(
        model, inputs, target, method="head", explainer=HEADS[name], center=center, top_k=top_k
    )
    weight = model[-1].weight.detach()
    if stats.class_index is None:
        explanations, of_target = weight * factor[:, None], target
    else:
        explanations = weight[stats.class_index] * factor[:, None]
        of_target = torch.zeros_like(target)
    assert_close(stats, dense_stats(explanations, of_target, center), 1e-12)


@pytest.mark.parametrize("similarity", ["cosine", "projection"])
def test_the_head_gives_the_loss_of_a_linear_head(similarity: Any) -> None:
    inputs, target = images()
    model = cnn().eval()
    logits, stats = class_explanation_stats(model, inputs, target, method="head")
    loss = ik.similarity_loss(logits, target, stats, similarity=similarity)
    expected = ik.linear_introspective_loss(
        model[:-1](inputs), model[-1].weight, target, model[-1].bias, similarity=similarity
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    found = torch.autograd.grad(loss, tuple(model.parameters()))
    wanted = torch.autograd.grad(expected, tuple(model.parameters()))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("method", ["exact", "projection"])
@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        ((0.0, 1.0), r"baseline must have one entry for each explained tensor \(1\), got 2"),
        (torch.zeros(2, 1, 2, 6, 6), r"baseline must broadcast to float64\[6, 2, 6, 6\]"),
    ],
)
def test_baselines_that_do_not_fit(method: Any, baseline: Any, message: str) -> None:
    inputs, target = images()
    with pytest.raises(ValueError, match=message):
        class_explanation_stats(
            cnn(), inputs[:6], target, method=method, explainer=IntegratedGradients(4, baseline)
        )


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        IntegratedGradients(steps=0)
    with pytest.raises(TypeError, match="samples must be an int, got 1.5"):
        SmoothGrad(samples=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"noise .*got 0"):
        SmoothGrad(noise=0.0)
    with pytest.raises(ValueError, match=r"noise .*got nan"):
        SmoothGrad(noise=math.nan)
    inputs, target = images()
    with pytest.raises(ValueError, match="explainer must be one of 'gradient_x_input', .*'lime'"):
        class_explanation_stats(cnn(), inputs, target, explainer="lime")
    with pytest.raises(ValueError, match="explainer must be one of"):
        class_explanation_stats(cnn(), inputs, target, explainer=Gradient)  # type: ignore[arg-type]
