"""Small cases of every kernel follow the definition: the first thing to know of a new GPU.

compute-sanitizer runs them too (benchmarks/gpu_sanitize.py).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu_cases import CASES, on_gpu
from helpers.cases import (
    Case,
    distillation_case,
    introspective_case,
    linear_case,
    similarity_case,
)
from helpers.oracle import assert_follows_definition
from helpers.tolerance import assert_accurate

import introkernels as ik

pytestmark = pytest.mark.gpu

# Beside the common cases: the other dtypes, rows that are not aligned, and projections.
MORE: dict[str, Callable[[], Case]] = {
    "distillation-float64": lambda: distillation_case(9, 101, torch.float64),
    "distillation-float16": lambda: distillation_case(9, 4096, torch.float16),
    "distillation-long": lambda: distillation_case(2, 70_001),
    "similarity-projection": lambda: similarity_case(9, 300, similarity="projection"),
    "similarity-float64": lambda: similarity_case(5, 33, torch.float64, label_mode="split"),
    "introspective-float64": lambda: introspective_case(3, 7, torch.float64, shape=(1001,)),
    "introspective-float16": lambda: introspective_case(3, 12, torch.float16, shape=(777,)),
    "head-float64": lambda: linear_case(9, 33, torch.float64, width=20),
    "head-float16": lambda: linear_case(65, 65, torch.float16, width=33, bias=False),
    "head-half-features": lambda: linear_case(
        65, 40, torch.bfloat16, weight_dtype=torch.float32, width=20, similarity="projection"
    ),
}
ALL = CASES | MORE


@pytest.mark.parametrize("name", ALL)
def test_losses_and_gradients(name: str) -> None:
    case = on_gpu(ALL[name])
    with torch.device("cuda"):
        assert_follows_definition(case)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("introspective")])
def test_statistics(name: str, center: bool) -> None:
    case = on_gpu(ALL[name])
    arguments = (case["gradients"], case["inputs"], case["target"])
    index = case.keywords.get("class_index")
    stats = ik.explanation_stats(*arguments, center=center, class_index=index)
    exact = ik.reference.explanation_stats(
        *(a.double() if a.is_floating_point() else a for a in arguments),
        center=center,
        class_index=index,
    )
    assert_accurate(stats.dots, exact.dots, "dots")
    assert_accurate(stats.sq_norms, exact.sq_norms, "sq_norms")
