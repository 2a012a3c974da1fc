"""Statistics of a model whose targets are class probabilities, as mixup and cutmix give them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from explain_models import CLASSES, NETWORKS, assert_close, cnn, dense_explanations, images
from torch import Tensor, nn

import introkernels as ik
from introkernels.explain import METHODS, class_explanation_stats
from introkernels.types import ExplanationStats

ALL_METHODS = pytest.mark.parametrize("method", METHODS)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(31)


def mixed(target: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Mixup of each row's class with another row's; the last row is of all classes."""
    share = torch.rand(len(target), 1, generator=seeded(), dtype=torch.float64)
    classes = F.one_hot(target, CLASSES).double()
    probabilities = share * classes + (1 - share) * classes.roll(1, 0)
    probabilities[-1] = torch.linspace(0.1, 0.3, CLASSES, dtype=torch.float64)
    return probabilities.to(dtype)


def by_definition(
    explanations: Tensor, probabilities: Tensor, center: bool = False
) -> ExplanationStats:
    """One number at a time, of explanations ``[B, C, D]``."""
    dots = torch.empty(explanations.shape[:2], dtype=torch.float64)
    sq_norms = torch.empty_like(dots)
    for row, (of_class, shares) in enumerate(zip(explanations, probabilities, strict=True)):
        if center:
            of_class = of_class - of_class.mean(0)
        mixture = sum(share * some for share, some in zip(shares, of_class, strict=True))
        for c, some in enumerate(of_class):
            dots[row, c] = (some * mixture).sum()
            sq_norms[row, c] = (some * some).sum()
    return ExplanationStats(dots, sq_norms)


def sq_norm_of_mixture(stats: ExplanationStats, probabilities: Tensor) -> Tensor:
    """``[B, 1]``, from ``<E_y, E_y> = sum_k y_k <E_k, E_y>``."""
    return (probabilities * stats.dots).sum(1, keepdim=True)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("chunk", [None, 3])
def test_exact_equals_the_dense_jacobian(name: str, center: bool, chunk: int | None) -> None:
    make, data = NETWORKS[name]
    inputs, target = data()
    probabilities = mixed(target)
    expected = by_definition(dense_explanations(make(), inputs), probabilities, center)
    _, stats = class_explanation_stats(make(), inputs, probabilities, center=center, chunk=chunk)
    assert_close(stats, expected, 1e-12)
    assert stats.class_index is None


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_float32_is_as_accurate_as_the_contract_says(center: bool, dtype: torch.dtype) -> None:
    """Whatever the dtype of the probabilities."""
    inputs, target = images(torch.float32)
    probabilities = mixed(target, dtype)
    explanations = dense_explanations(cnn(torch.float32), inputs)
    # A sum of probabilities that is rounded takes as much of the mean away.
    expected = by_definition(explanations, probabilities.double(), center)
    _, stats = class_explanation_stats(cnn(torch.float32), inputs, probabilities, center=center)
    assert stats.dots.dtype == torch.float32
    assert_close(stats, expected, 2e-6)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("explainer", ik.explain.EXPLAINERS)
@pytest.mark.parametrize("jvp", ["forward", "double_backward"])
@pytest.mark.parametrize("method", ["projection", "sketch"])
def test_dots_are_exact(name: str, center: bool, explainer: str, jvp: Any, method: Any) -> None:
    make, data = NETWORKS[name]
    inputs, target = data()
    keywords: dict[str, Any] = {"center": center, "explainer": explainer}
    probabilities = mixed(target)
    _, exact = class_explanation_stats(
        make(), inputs, probabilities, generator=seeded(), **keywords
    )
    _, stats = class_explanation_stats(
        make(), inputs, probabilities, method=method, jvp=jvp, generator=seeded(), **keywords
    )
    assert (stats.dots - exact.dots).norm() <= 1e-11 * exact.dots.norm()
    if method == "projection":
        own = sq_norm_of_mixture(exact, probabilities)
        torch.testing.assert_close(stats.sq_norms, own.expand_as(stats.dots), rtol=1e-11, atol=0)


@pytest.mark.parametrize("explainer", ik.explain.EXPLAINERS)
def test_explanations_of_a_mixture_of_logits(explainer: str) -> None:
    """``E_y`` is what explains the class of a model that has the mixture among its logits."""

    class WithMixture(nn.Module):
        def __init__(self, probabilities: Tensor) -> None:
            super().__init__()
            self.plain = cnn()
            self.probabilities = probabilities

        def forward(self, inputs: Tensor) -> Tensor:
            logits = self.plain(inputs)
            mixture = (self.probabilities * logits).sum(1, keepdim=True)
            return torch.cat([logits, mixture], 1)

    inputs, target = images()
    probabilities = mixed(target)
    last = torch.full_like(target, CLASSES)
    keywords: dict[str, Any] = {"explainer": explainer}
    _, expected = class_explanation_stats(
        WithMixture(probabilities), inputs, last, generator=seeded(), **keywords
    )
    _, stats = class_explanation_stats(cnn(), inputs, probabilities, generator=seeded(), **keywords)
    classes = ExplanationStats(expected.dots[:, :-1], expected.sq_norms[:, :-1])
    assert_close(stats, classes, 1e-11)
    for similarity in ("cosine", "projection"):
        torch.testing.assert_close(
            ik.explain.similarities(stats, probabilities, similarity=similarity),
            ik.explain.similarities(expected, last, similarity=similarity)[:, :-1],
        )


@pytest.mark.parametrize("center", [False, True])
def test_norms_of_the_sketch_are_unbiased(center: bool) -> None:
    """A two-sided z-test of each class's mean over 3000 independent estimates, as for classes."""
    inputs, target = images()
    probabilities = mixed(target)[1:2]
    assert probabilities.max() < 1
    model = cnn().eval()
    repeats = 3000
    _, known = class_explanation_stats(model, inputs[1:2], probabilities, center=center)
    # Copies of one row draw probes of their own.
    _, many = class_explanation_stats(
        model,
        inputs[1:2].expand(repeats, *inputs.shape[1:]),
        probabilities.expand(repeats, -1),
        method="sketch",
        probes=2,
        center=center,
        generator=seeded(),
    )
    errors = many.sq_norms - known.sq_norms
    standard_error = errors.std(0) / math.sqrt(repeats)
    residual = known.sq_norms - known.dots.square() / sq_norm_of_mixture(known, probabilities)
    # So that a bias of 15 % of a class's residual is caught; no class has an exact norm.
    assert (standard_error < 0.02 * residual).all()
    assert (standard_error > 0).all()
    # Bonferroni: an error rate of 1e-6 shared by the classes, in two tails each.
    limit = torch.distributions.Normal(0.0, 1.0).icdf(
        torch.tensor(1 - 1e-6 / (2 * CLASSES), dtype=torch.float64)
    )
    assert (errors.mean(0).abs() < limit * standard_error).all()


def test_one_probe_is_exact_where_explanations_are_collinear() -> None:
    class Collinear(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs.sum(1, keepdim=True) * torch.arange(1.0, CLASSES + 1)

    target = images()[1]
    inputs = torch.rand(len(target), 7, generator=seeded(), dtype=torch.float64)
    probabilities = mixed(target)
    _, known = class_explanation_stats(Collinear(), inputs, probabilities)
    _, stats = class_explanation_stats(
        Collinear(), inputs, probabilities, method="sketch", probes=1
    )
    torch.testing.assert_close(stats.sq_norms, known.sq_norms, rtol=1e-12, atol=0)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_head_equals_the_definition(center: bool, mode: Any) -> None:
    inputs, target = images()
    model = cnn()
    model[3].p = 0.0
    probabilities = mixed(target)
    features = cnn().train(mode == "train")
    features[3].p = 0.0
    expected = by_definition(
        model[-1].weight.detach() * features[:-1](inputs).detach()[:, None], probabilities, center
    )
    _, stats = class_explanation_stats(
        model, inputs, probabilities, method="head", mode=mode, center=center
    )
    assert_close(stats, expected, 1e-12)


@ALL_METHODS
@pytest.mark.parametrize("center", [False, True])
def test_probabilities_of_one_class_are_that_class(method: Any, center: bool) -> None:
    inputs, target = images()
    keywords: dict[str, Any] = {"method": method, "center": center}
    _, of_class = class_explanation_stats(cnn(), inputs, target, generator=seeded(), **keywords)
    one_hot = F.one_hot(target, CLASSES).double()
    _, stats = class_explanation_stats(cnn(), inputs, one_hot, generator=seeded(), **keywords)
    assert_close(stats, of_class, 1e-13)


@ALL_METHODS
def test_no_row_is_ignored(method: Any) -> None:
    inputs, target = images()
    probabilities = mixed(target)
    expected, stats = (
        class_explanation_stats(
            cnn(), inputs, probabilities, method=method, ignore_index=some, generator=seeded()
        )[1]
        for some in (-100, 0)
    )
    assert stats.dots.equal(expected.dots)
    assert stats.sq_norms.equal(expected.sq_norms)
    assert stats.sq_norms.ne(0).all()


@ALL_METHODS
def test_what_is_left_untouched(method: Any) -> None:
    inputs, target = images()
    probabilities = mixed(target).requires_grad_()
    before = probabilities.detach().clone()
    model = cnn()
    logits, stats = class_explanation_stats(
        model, inputs, probabilities, method=method, center=True
    )
    assert probabilities.equal(before)
    assert not stats.dots.requires_grad
    assert not stats.sq_norms.requires_grad
    logits.sum().backward()
    assert probabilities.grad is None
    assert all(parameter.grad is not None for parameter in model.parameters())


@ALL_METHODS
def test_a_row_without_any_probability_has_no_explanation(method: Any) -> None:
    inputs, target = images()
    probabilities = mixed(target)
    probabilities[2] = 0
    _, stats = class_explanation_stats(cnn(), inputs, probabilities, method=method)
    assert stats.dots[2].eq(0).all()
    cosines = ik.explain.similarities(stats, probabilities)
    assert cosines[2].eq(0).all()
    assert cosines.isfinite().all()


@ALL_METHODS
def test_no_rows(method: Any) -> None:
    inputs, target = images()
    logits, stats = class_explanation_stats(cnn(), inputs[:0], mixed(target)[:0], method=method)
    assert logits.shape == stats.dots.shape == stats.sq_norms.shape == (0, CLASSES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@ALL_METHODS
def test_half_models(method: Any, dtype: torch.dtype) -> None:
    inputs, target = images(dtype)
    probabilities = mixed(target, torch.float32)
    _, exact = class_explanation_stats(cnn(dtype), inputs, probabilities, mode="eval")
    _, stats = class_explanation_stats(
        cnn(dtype), inputs, probabilities, method=method, mode="eval"
    )
    assert stats.dots.dtype == torch.float32
    assert stats.dots.isfinite().all()
    if method in ("projection", "sketch"):
        # Two ways through a model that rounds each layer.
        error = (stats.dots - exact.dots).norm()
        assert error <= 4 * torch.finfo(dtype).eps * exact.dots.norm()


@pytest.mark.parametrize("method", ["projection", "sketch"])
def test_rows_that_are_mixed_are_noticed(method: Any) -> None:
    class Flipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = cnn()

        def forward(self, inputs: Tensor) -> Tensor:
            return self.plain(inputs).flip(0)

    inputs, target = images()
    with pytest.raises(ValueError, match=r"depend on that row alone.*method='exact'"):
        class_explanation_stats(Flipped(), inputs, mixed(target), method=method)


@ALL_METHODS
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"target": torch.ones(6, CLASSES + 1)},
            ValueError,
            r"target must have the shape of logits \[6, 5\] .*got float32\[6, 6\]",
        ),
        (
            {"target": torch.ones(5, CLASSES)},
            ValueError,
            r"target must have shape \[6, C\] .*rows of inputs, got float32\[5, 5\]",
        ),
        ({"target": torch.ones(6, CLASSES, 1)}, ValueError, r"got float32\[6, 5, 1\]"),
        (
            {"target": torch.ones(6, CLASSES).to_sparse()},
            TypeError,
            r"target must be a dense \(strided\) tensor",
        ),
        (
            {"target": torch.ones(6, CLASSES, device="meta")},
            ValueError,
            r"target must be on the device of inputs \(cpu\)",
        ),
        (
            {"top_k": 2},
            ValueError,
            "top_k must be None where target holds class probabilities, got 2",
        ),
    ],
)
def test_bad_calls(
    changes: dict[str, Any], error: type[Exception], message: str, method: Any
) -> None:
    inputs, target = images()
    arguments = {"inputs": inputs, "target": mixed(target), "method": method, **changes}
    with pytest.raises(error, match=message):
        class_explanation_stats(cnn(), **arguments)
