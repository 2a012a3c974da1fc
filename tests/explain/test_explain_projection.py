"""Exact inner products from one Jacobian-vector product, and when that is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from explain_models import CLASSES, NETWORKS, assert_close, cnn, images, resnet
from torch import Tensor, nn
from torch.nn import functional as F

import introkernels as ik
from introkernels.explain import class_explanation_stats
from introkernels.types import ExplanationStats


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def assert_same_dots(stats: ExplanationStats, exact: ExplanationStats, tolerance: float) -> None:
    assert exact.dots.norm() > 0
    assert (stats.dots - exact.dots).norm() <= tolerance * exact.dots.norm()
    if exact.class_index is None:
        assert stats.class_index is None
    else:
        assert stats.class_index is not None
        assert stats.class_index.equal(exact.class_index)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("keywords", [{}, {"center": True}, {"top_k": 2, "center": True}])
@pytest.mark.parametrize("explainer", ik.explain.EXPLAINERS)
@pytest.mark.parametrize("jvp", ["forward", "double_backward"])
def test_dots_are_exact(name: str, keywords: dict[str, Any], explainer: str, jvp: Any) -> None:
    make, data = NETWORKS[name]
    inputs, target = data()
    keywords = {"explainer": explainer, **keywords}
    _, exact = class_explanation_stats(make(), inputs, target, generator=seeded(), **keywords)
    _, stats = class_explanation_stats(
        make(), inputs, target, method="projection", jvp=jvp, generator=seeded(), **keywords
    )
    assert_same_dots(stats, exact, 1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_finite_differences_have_their_own_accuracy(name: str) -> None:
    make, data = NETWORKS[name]
    # Of the order of the step, eps^(1/3), where that crosses the kink of a ReLU.
    of_a_step = torch.finfo(torch.float32).eps ** (1 / 3)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, of_a_step)):
        inputs, target = data(dtype)
        _, exact = class_explanation_stats(make(dtype), inputs, target)
        _, stats = class_explanation_stats(
            make(dtype), inputs, target, method="projection", jvp="finite_difference"
        )
        assert_same_dots(stats, exact, tolerance)


@pytest.mark.parametrize("keywords", [{}, {"top_k": 2}])
def test_each_norm_is_the_targets_to_the_last_bit(keywords: dict[str, Any]) -> None:
    inputs, target = images(torch.float32)
    _, stats = class_explanation_stats(
        cnn(torch.float32), inputs, target, method="projection", **keywords
    )
    position = target if stats.class_index is None else torch.zeros_like(target)
    of_target = stats.dots.gather(1, position[:, None])
    assert stats.sq_norms.equal(of_target.expand_as(stats.dots))


def test_projection_similarities_are_those_of_exact() -> None:
    inputs, target = images()
    similarities = [
        ik.explain.similarities(stats, target, similarity="projection")
        for _, stats in (
            class_explanation_stats(cnn(), inputs, target),
            class_explanation_stats(cnn(), inputs, target, method="projection"),
        )
    ]
    torch.testing.assert_close(similarities[1], similarities[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", ["projection", "sketch"])
@pytest.mark.parametrize("scale", [1e-10, 1e8])
def test_tangents_of_any_size_pass_through_float32(method: Any, scale: float) -> None:
    """A logit's explanation grows with the last layer's weight, and tangents with its square."""
    inputs, target = images(torch.float32)
    model = cnn(torch.float32).eval()
    keywords: dict[str, Any] = {"method": method, "jvp": "finite_difference"}
    _, usual = class_explanation_stats(model, inputs, target, generator=seeded(), **keywords)
    with torch.no_grad():
        model[-1].weight.mul_(scale)
        model[-1].bias.mul_(scale)
    _, scaled = class_explanation_stats(model, inputs, target, generator=seeded(), **keywords)
    of_scaled = ExplanationStats(
        scaled.dots.double() / scale**2, scaled.sq_norms.double() / scale**2
    )
    assert_close(of_scaled, ExplanationStats(*(t.double() for t in usual[:2])), 2e-2)


@pytest.mark.parametrize("scale", [1.0, 1e-2])
def test_half_precision_models_do_not_lose_small_tangents(scale: float) -> None:
    """``x^2 g`` of small inputs is below what float16 can hold, which the explanation is not."""
    dtype = torch.float16
    inputs, target = images(dtype)
    inputs = inputs * scale
    for make in (cnn, resnet):
        _, exact = class_explanation_stats(make(dtype), inputs, target)
        _, stats = class_explanation_stats(make(dtype), inputs, target, method="projection")
        assert_same_dots(stats, exact, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("explainer", ik.explain.EXPLAINERS)
def test_very_small_float16_inputs_give_no_nan(explainer: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, CLASSES)).half()
    inputs, target = images(torch.float16)
    inputs = inputs * 2e-4
    _, stats = class_explanation_stats(
        model, inputs, target, method="projection", explainer=explainer, generator=seeded()
    )
    _, exact = class_explanation_stats(
        model, inputs, target, explainer=explainer, generator=seeded()
    )
    assert stats.dots.isfinite().all()
    assert_same_dots(stats, exact, 2 * torch.finfo(torch.float16).eps)


class PerBatch(nn.Module):
    """Mixes the rows of a batch without a module that is known for it."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mix = mix
        self.last = nn.Linear(72, CLASSES).double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.mix(inputs.flatten(1)))


METHODS = ["projection", "sketch"]


def functional_batch_norm(inputs: Tensor) -> Tensor:
    return F.batch_norm(inputs, None, None, training=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "mix",
    [lambda x: x.softmax(0), lambda x: x.flip(0), functional_batch_norm],
    ids=["softmax over rows", "rows swapped", "functional BatchNorm"],
)
def test_rows_that_are_mixed_are_noticed(method: Any, mix: Callable[[Tensor], Tensor]) -> None:
    inputs, target = images()
    with pytest.raises(ValueError, match=r"depend on that row alone.*method='exact'"):
        class_explanation_stats(PerBatch(mix), inputs, target, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_batchnorm_that_needs_the_batch_is_refused_by_name(method: Any) -> None:
    inputs, target = images()
    with pytest.raises(ValueError, match=r"BatchNorm2d '1' computes with the statistics"):
        class_explanation_stats(cnn(), inputs, target, method=method, mode="train")
    model = nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten()).double()
    for training in (False, True):
        with pytest.raises(ValueError, match=r"BatchNorm2d '0'.*method='exact'"):
            class_explanation_stats(model.train(training), inputs, target, method=method)


def test_batchnorm_in_eval_mode_may_be_explained_in_a_training_pass() -> None:
    inputs, target = images()
    model = cnn()
    model[1].eval()
    model[3].p = 0.0
    _, exact = class_explanation_stats(model, inputs, target, mode="train")
    _, stats = class_explanation_stats(model, inputs, target, mode="train", method="projection")
    assert_same_dots(stats, exact, 1e-12)


class AlwaysDropout(nn.Module):
    """Random in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(72, CLASSES).double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(F.dropout(inputs.flatten(1), 0.5, training=True))


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("explainer", ["gradient_x_input", "integrated_gradients"])
@pytest.mark.parametrize("jvp", ["forward", "double_backward", "finite_difference"])
def test_all_passes_draw_the_same_random_numbers(mode: Any, explainer: str, jvp: Any) -> None:
    inputs, target = images()
    model = AlwaysDropout()
    results = []
    for method in ("exact", "projection"):
        torch.manual_seed(2)
        logits, stats = class_explanation_stats(
            model, inputs, target, method=method, mode=mode, explainer=explainer, jvp=jvp
        )
        results.append((logits, stats, torch.get_rng_state()))
    (logits, exact, state), (other_logits, stats, other_state) = results
    assert_same_dots(stats, exact, 1e-9)
    assert logits.equal(other_logits)
    assert state.equal(other_state)
    torch.manual_seed(2)
    assert logits.equal(model(inputs))


@pytest.mark.parametrize("method", METHODS)
def test_random_numbers_of_another_library_are_noticed(method: Any) -> None:
    generator = np.random.default_rng(0)

    def drop(x: Tensor) -> Tensor:
        return x * torch.from_numpy(generator.integers(0, 2, tuple(x.shape))) * 2

    inputs, target = images()
    with pytest.raises(ValueError, match="draws random numbers of its own"):
        class_explanation_stats(PerBatch(drop), inputs, target, method=method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("top_k", [None, 2])
def test_a_row_of_nan_is_nan_and_touches_no_other(method: Any, top_k: int | None) -> None:
    inputs, target = images()
    keywords: dict[str, Any] = {"method": method, "top_k": top_k}
    _, clean = class_explanation_stats(cnn(), inputs, target, generator=seeded(), **keywords)
    inputs[2, 0, 0, 0] = torch.nan
    _, stats = class_explanation_stats(cnn(), inputs, target, generator=seeded(), **keywords)
    others = torch.arange(len(inputs)) != 2
    assert stats.dots[2].isnan().all()
    assert stats.dots[others].equal(clean.dots[others])
    assert stats.sq_norms[others].equal(clean.sq_norms[others])


@pytest.mark.parametrize("method", METHODS)
def test_ignored_rows_are_zero(method: Any) -> None:
    inputs, target = images()
    _, every = class_explanation_stats(cnn(), inputs, target, method=method, generator=seeded())
    target[1], inputs[1] = -100, torch.nan
    _, stats = class_explanation_stats(cnn(), inputs, target, method=method, generator=seeded())
    live = target != -100
    assert stats.dots[~live].eq(0).all()
    assert stats.sq_norms[~live].eq(0).all()
    assert stats.dots[live].equal(every.dots[live])
    assert stats.sq_norms[live].equal(every.sq_norms[live])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("jvp", "constant"),
    [
        ("forward", torch.zeros_like),
        ("forward", torch.detach),
        ("forward", torch.round),
        ("double_backward", torch.zeros_like),
        ("double_backward", torch.detach),
        ("double_backward", torch.round),
        ("finite_difference", torch.zeros_like),
    ],
)
def test_logits_that_ignore_the_inputs_have_zero_explanations(
    method: Any, jvp: Any, constant: Callable[[Tensor], Tensor]
) -> None:
    inputs, target = images()
    for explainer in ik.explain.EXPLAINERS:
        _, stats = class_explanation_stats(
            PerBatch(constant), inputs, target, method=method, jvp=jvp, explainer=explainer
        )
        assert stats.dots.eq(0).all()
        assert stats.sq_norms.eq(0).all()


@pytest.mark.parametrize("method", METHODS)
def test_no_rows(method: Any) -> None:
    inputs, target = images()
    for top_k, columns in ((None, CLASSES), (2, 3)):
        for jvp in ik.explain.JVPS:
            logits, stats = class_explanation_stats(
                cnn(), inputs[:0], target[:0], method=method, top_k=top_k, jvp=jvp
            )
            assert logits.shape == (0, CLASSES)
            assert stats.dots.shape == stats.sq_norms.shape == (0, columns)
