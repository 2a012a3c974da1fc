"""Explaining a whole model gives on a GPU what it gives on a CPU, and draws none of its numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import introkernels as ik

pytestmark = pytest.mark.gpu

CLASSES = 7


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(8 * 36, CLASSES),
    ).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(5, 3, 8, 8, generator=generator, dtype=torch.float64)
    return images, torch.randint(CLASSES, (5,), generator=generator)


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert (got.cpu().double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("jvp", ["forward", "double_backward"])
@pytest.mark.parametrize("method", ik.explain.METHODS)
def test_statistics_are_those_of_the_cpu(method: Any, jvp: Any) -> None:
    images, labels = batch()
    keywords: dict[str, Any] = {"method": method, "mode": "eval", "jvp": jvp, "center": True}
    _, expected = ik.explain.class_explanation_stats(network(), images, labels, **keywords)
    _, stats = ik.explain.class_explanation_stats(
        network().cuda(), images.cuda(), labels.cuda(), **keywords
    )
    assert stats.dots.is_cuda
    assert_close(stats.dots, expected.dots, 1e-10)
    own = labels[:, None]
    assert_close(stats.sq_norms.gather(1, own.cuda()), expected.sq_norms.gather(1, own), 1e-10)
    if method != "sketch":  # its random signs are another device's
        assert_close(stats.sq_norms, expected.sq_norms, 1e-10)


def test_fused_attention_keeps_its_kernel_and_is_explained() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(32 * 6, CLASSES)).cuda()
    inputs = torch.randn(4, 6, 32, device="cuda")
    target = torch.arange(4, device="cuda")
    _, exact = ik.explain.class_explanation_stats(model, inputs, target)
    _, stats = ik.explain.class_explanation_stats(model, inputs, target, method="projection")
    assert_close(stats.dots, exact.dots.cpu().double(), 1e-3)


@pytest.mark.parametrize("method", ["exact", "projection", "sketch"])
def test_a_training_step_leaves_the_random_numbers_of_a_plain_one(method: Any) -> None:
    images, labels = (tensor.cuda() for tensor in batch())
    model = network().cuda()
    plain = copy.deepcopy(model)
    torch.manual_seed(5)
    expected = plain(images)
    state = torch.cuda.get_rng_state()
    torch.manual_seed(5)
    objective = ik.IntrospectiveObjective(model, method=method, bank_momentum=0.9)
    objective(images, labels).backward()
    assert objective.logits is not None
    assert objective.logits.equal(expected)
    assert torch.cuda.get_rng_state().equal(state)
    assert objective.bank is not None
    assert objective.bank.is_cuda
    assert objective.bank.isfinite().all()
