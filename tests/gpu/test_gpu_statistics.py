"""The CUDA kernels on gradients that lie in vectors of 16 bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_cases import assert_same, leaves_of, on_gpu, results
from helpers.cases import Case, introspective_case
from helpers.oracle import assert_follows_definition
from helpers.tolerance import assert_accurate
from torch import Tensor

import introkernels as ik

pytestmark = pytest.mark.gpu

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Rows, classes, dimensions, keywords. Dimensions that come by 16 bytes: a part of a slice, which is
# 1 KiB of a class, one and a bit, and several segments of them. Classes around what a warp and a
# block work on at a time, and more than a block has.
CASES: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "one-vector": (1, 1, 16, {}),
    "part-of-a-slice": (300, 5, 48, {}),
    "slice-and-a-bit": (40, 31, 1040, {}),
    "segments": (64, 100, 3072, {}),
    "groups": (2, 1100, 2048, {}),
    "many-segments": (2, 4, 500_000, {}),
    "ignored": (70, 33, 4096, {"ignored": 9, "reduction": "none"}),
    "explained": (50, 300, 2064, {"explained": 7}),
}
every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def _on_cuda(gpu_backend: str) -> None:
    if gpu_backend != "cuda":
        pytest.skip("Triton's kernels are the same everywhere")


def case_of(name: str, dtype: torch.dtype) -> Case:
    rows, classes, dims, keywords = CASES[name]
    return on_gpu(lambda: introspective_case(rows, classes, dtype, shape=(dims,), **keywords))


def statistics_of(case: Case) -> list[Tensor]:
    arguments = (case["gradients"], case["inputs"], case["target"])
    return [*ik.explanation_stats(*arguments, class_index=case.keywords["class_index"])[:2]]


def exact_statistics_of(case: Case) -> list[Tensor]:
    arguments = (case["gradients"].double(), case["inputs"].double(), case["target"])
    index = case.keywords["class_index"]
    return [*ik.reference.explanation_stats(*arguments, class_index=index)[:2]]


@every_dtype
@every_case
def test_statistics(name: str, dtype: torch.dtype) -> None:
    case = case_of(name, dtype)
    for actual, exact in zip(statistics_of(case), exact_statistics_of(case), strict=True):
        assert_accurate(actual, exact)


@every_dtype
@every_case
def test_fused_loss(name: str, dtype: torch.dtype) -> None:
    case = case_of(name, dtype)
    with torch.device("cuda"):
        assert_follows_definition(case)


@every_case
def test_repeats_give_the_same_bits(name: str) -> None:
    case = leaves_of(case_of(name, torch.bfloat16))
    expected = [*statistics_of(case), *results(case)]
    for _ in range(40):
        assert_same([*statistics_of(case), *results(case)], expected)


@every_dtype
def test_views_of_larger_tensors(dtype: torch.dtype) -> None:
    """Rows and classes that begin at multiples of 16 bytes, and classes that are all one."""
    larger = torch.randn(9, 40, 3, 1040, device="cuda").to(dtype)
    inputs = torch.randn(7, 1040, device="cuda").to(dtype)
    target = torch.arange(7, device="cuda")
    for gradients in (larger[1:8, 2:39, 1], larger[1:8, :1, 1].expand(7, 37, 1040)):
        actual = ik.explanation_stats(gradients, inputs, target)
        exact = ik.reference.explanation_stats(gradients.double(), inputs.double(), target)
        assert_accurate(actual.dots, exact.dots, "dots")
        assert_accurate(actual.sq_norms, exact.sq_norms, "sq_norms")
