"""The same bits in every run, with enough programs to overtake each other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu_cases import CASES, assert_same, case_of, leaves_of, on_gpu, results
from helpers.cases import (
    Case,
    distillation_case,
    introspective_case,
    linear_case,
    similarity_case,
)
from helpers.oracle import assert_follows_definition

import introkernels as ik

pytestmark = pytest.mark.gpu

REPEATS = 40

# Thousands of programs, more than any GPU holds at once; long rows meet at a ticket each.
LARGE: dict[str, Callable[[], Case]] = {
    "distillation": lambda: distillation_case(20_000, 1000, torch.bfloat16, ignored=100),
    "distillation-short": lambda: distillation_case(100_003, 10),
    "similarity": lambda: similarity_case(4096, 1000, ignored=10),
    "similarity-explained": lambda: similarity_case(2048, 1000, explained=20),
    "introspective": lambda: introspective_case(256, 100, torch.bfloat16, shape=(3072,)),
    "introspective-float32": lambda: introspective_case(64, 100, shape=(3072,), center=True),
    "introspective-long": lambda: introspective_case(
        64, 1000, torch.bfloat16, shape=(65_537,), explained=8
    ),
    "introspective-row": lambda: introspective_case(1, 5, shape=(3_000_001,)),
    "head": lambda: linear_case(2100, 2000, torch.bfloat16, width=64),
    "head-many": lambda: linear_case(5000, 100, width=64, ignored=100, center=True),
}


@pytest.mark.parametrize("name", LARGE)
def test_repeats_give_the_same_bits(name: str) -> None:
    case = leaves_of(on_gpu(LARGE[name]))
    expected = results(case)
    for _ in range(REPEATS):
        assert_same(results(case), expected)


def test_repeats_of_statistics_give_the_same_bits() -> None:
    case = on_gpu(LARGE["introspective"])
    arguments = (case["gradients"], case["inputs"], case["target"])
    expected = list(ik.explanation_stats(*arguments)[:2])
    for _ in range(REPEATS):
        assert_same(list(ik.explanation_stats(*arguments)[:2]), expected)


@pytest.mark.parametrize("name", CASES)
def test_repeats_beside_other_work_give_the_same_bits(name: str) -> None:
    """Another stream takes processors away, so that programs start at other times."""
    case = leaves_of(case_of(name))
    expected = results(case)
    other = torch.cuda.Stream()
    noise = torch.randn(2048, 2048, device="cuda")
    torch.cuda.synchronize()
    for _ in range(10):
        with torch.cuda.stream(other):
            noise.copy_(noise @ noise / 2048)
        assert_same(results(case), expected)
    other.synchronize()


@pytest.mark.parametrize("name", LARGE)
def test_large_calls_follow_the_definition(name: str) -> None:
    case = on_gpu(LARGE[name])
    is_head = case.function == "linear_introspective_loss"
    # The definition holds some copies of all explanations in float64.
    explanations = case.tensors.get("gradients", case["weight"] if is_head else None)
    numbers = 0 if explanations is None else explanations.numel() * (case.rows if is_head else 1)
    if 8 * 8 * numbers > torch.cuda.mem_get_info()[0]:
        pytest.skip("the definition needs more memory than this GPU has free")
    assert_follows_definition(case)
