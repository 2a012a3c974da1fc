"""Explanations of extreme scale: similarities are ratios, so it must not matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tolerance import assert_accurate

import introkernels as ik

KEYWORDS = {"ce_weight": 0.0, "kl_weight": 1.0, "temperature": 1.0, "similarity_temperature": 0.1}


@pytest.mark.parametrize("similarity", ["cosine", "projection"])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(
    ("feature_scale", "weight_scale"),
    [
        (1e-23, 1.0),
        (1e-20, 1.0),
        (1.0, 1e-22),
        (1.0, 3e-10),
        (1.0, 3e-9),
        (1e-9, 3e8),
        (1e-9, 3e9),
        (3e19, 1e-19),
        (1e25, 1e-25),
        (1e-25, 1e25),
    ],
)
def test_head_squares_neither_overflow_nor_underflow(
    backend: str, feature_scale: float, weight_scale: float, similarity: str, center: bool
) -> None:
    features = torch.randn(6, 16) * feature_scale
    weight = torch.randn(5, 16) * weight_scale
    target = torch.randint(5, (6,))
    keywords = {**KEYWORDS, "similarity": similarity, "center": center}
    loss = ik.linear_introspective_loss(features, weight, target, **keywords)
    expected = ik.reference.linear_introspective_loss(
        features.double(), weight.double(), target, **keywords
    )
    assert_accurate(loss, expected)


def test_a_centred_head_takes_a_large_common_part_away(backend: str) -> None:
    # All products and sums of these logits are float32 numbers. The mean of seven classes is not.
    features = torch.randint(1, 3, (6, 16)) * torch.tensor([1.0, -1.0]).repeat(8)
    weight = 200 + torch.randint(-32, 32, (7, 16)) / 1024
    target = torch.tensor([0, 1, 2, 3, 4, 5])
    options: dict[str, Any] = {**KEYWORDS, "similarity_temperature": 1.0, "center": True}
    loss = ik.linear_introspective_loss(features, weight, target, **options)
    expected = ik.reference.linear_introspective_loss(
        features.double(), weight.double(), target, **options
    )
    assert_accurate(loss, expected)


@pytest.mark.parametrize("scale", [1e-200, 1e-160, 1e160, 1e200])
def test_gradient_and_input_may_be_extreme_where_their_product_is_not(
    backend: str, scale: float
) -> None:
    gradients = torch.randn(3, 4, 5, dtype=torch.float64)
    inputs = torch.randn(3, 5, dtype=torch.float64)
    target = torch.tensor([0, 1, 2])
    scaled = ik.explanation_stats(gradients * scale, inputs / scale, target)
    expected = ik.reference.explanation_stats(gradients, inputs, target)
    assert_accurate(scaled.dots, expected.dots)
    assert_accurate(scaled.sq_norms, expected.sq_norms)


def test_a_norm_that_overflowed_gives_nan_rather_than_a_wrong_similarity(backend: str) -> None:
    gradients = torch.tensor([[[1.0] * 4, [2e19] * 4, [1.0, -1.0, 1.0, -1.0]]])
    target = torch.tensor([0])
    stats = ik.explanation_stats(gradients, torch.ones(1, 4), target)
    assert stats.sq_norms[0].isinf().tolist() == [False, True, False]
    assert ik.similarity_loss(torch.zeros(1, 3), target, stats).isnan()
