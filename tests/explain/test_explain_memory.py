"""No method holds an explanation of each class: nothing has B x C x D elements."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from introkernels.explain import class_explanation_stats

ROWS, CLASSES, DIMENSIONS = 4, 1000, 600


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            # Views of a number in all places hold one element.
            if isinstance(leaf, Tensor):
                self.numel = max(self.numel, leaf.untyped_storage().nbytes() // leaf.itemsize)
        return result


def largest(**keywords: Any) -> int:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(DIMENSIONS, 3), nn.Tanh(), nn.Linear(3, CLASSES))
    inputs, target = torch.randn(ROWS, DIMENSIONS), torch.arange(ROWS)
    with LargestTensor() as seen:
        class_explanation_stats(model, inputs, target, **keywords)
    return seen.numel


# Inputs, logits and the two weights are all that has to be there.
NEEDED = max(ROWS * DIMENSIONS, ROWS * CLASSES, 3 * DIMENSIONS, 3 * CLASSES)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("explainer", ["gradient_x_input", "integrated_gradients"])
@pytest.mark.parametrize("jvp", ["forward", "double_backward", "finite_difference"])
@pytest.mark.parametrize("method", ["projection", "sketch"])
def test_products_with_the_jacobian(method: Any, jvp: Any, explainer: str, center: bool) -> None:
    assert largest(method=method, jvp=jvp, explainer=explainer, center=center) <= NEEDED


@pytest.mark.parametrize("method", ["projection", "sketch", "exact", "head"])
def test_some_classes(method: Any) -> None:
    assert largest(method=method, top_k=5, center=True) <= NEEDED


@pytest.mark.parametrize("center", [False, True])
def test_the_head(center: bool) -> None:
    assert largest(method="head", center=center) <= NEEDED


@pytest.mark.parametrize("keywords", [{}, {"center": True}, {"explainer": "gradient"}])
def test_exact_one_class_at_a_time(keywords: dict[str, Any]) -> None:
    # The statistics of all classes are collected as [B, C].
    assert largest(method="exact", **keywords) <= NEEDED


def test_exact_in_chunks() -> None:
    chunk = 40
    wanted = chunk * max(ROWS * DIMENSIONS, ROWS * CLASSES)
    assert largest(method="exact", chunk=chunk) <= wanted
    assert wanted < ROWS * CLASSES * DIMENSIONS / 10
