"""Targets and explained classes that don't exist raise; what ignored rows hold does not matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.cases import BUILDERS, Case
from torch import Tensor

import introkernels as ik

pytestmark = pytest.mark.usefixtures("indices_are_checked")

B, C, K = 4, 5, 3
TARGET = torch.tensor([0, 1, 2, 1])
CLASS_INDEX = torch.tensor([[0, 1, 2], [4, 1, 0], [2, 3, 4], [1, 4, 3]])

FUNCTIONS = (*BUILDERS, "explanation_stats")
EXPLAINING = ("introspective_loss", "similarity_loss", "explanation_stats")


def call(function: str, target: Tensor, index: Tensor | None = None, **keywords: Any) -> Tensor:
    """The loss, or the dots, of random tensors with this target and these explained classes."""
    # Where the test makes its tensors.
    target = target.to(torch.get_default_device())
    index = None if index is None else index.to(target.device)
    explained = {} if index is None else {"explained": K}
    builder = "introspective_loss" if function == "explanation_stats" else function
    case: Case = BUILDERS[builder](B, C, **explained).with_tensors(target=target)
    if function == "explanation_stats":
        arguments = (case["gradients"], case["inputs"], target)
        return ik.explanation_stats(*arguments, class_index=index, **keywords).dots
    if function == "similarity_loss":
        case = case.with_tensors(stats_index=index)
    if function == "introspective_loss":
        keywords["class_index"] = index
    return getattr(ik, function)(*case.arguments(), **keywords)


def with_entry(tensor: Tensor, place: tuple[int, ...], value: int) -> Tensor:
    changed = tensor.clone()
    changed[place] = value
    return changed


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("bad", [C, -1, -101, 2**62, -(2**63)])
def test_target_that_is_no_class(backend: str, function: str, bad: int) -> None:
    with pytest.raises(IndexError, match=rf"target\[2\] is {bad}, outside \[0, {C}\)"):
        call(function, with_entry(TARGET, (2,), bad))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("function", BUILDERS)
def test_every_reduction_checks_the_target(backend: str, function: str, reduction: str) -> None:
    with pytest.raises(IndexError, match=r"target\[3\] is 5"):
        call(function, with_entry(TARGET, (3,), C), reduction=reduction)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("ignore_index", [C, -1, 2, -(2**63), 2**63 - 1])
def test_any_int64_may_be_the_ignored_target(
    backend: str, function: str, ignore_index: int
) -> None:
    target = with_entry(TARGET, (2,), ignore_index)
    assert torch.isfinite(call(function, target, ignore_index=ignore_index)).all()
    with pytest.raises(IndexError, match=rf"target\[2\] is -100.*ignore_index={ignore_index}"):
        call(function, with_entry(TARGET, (2,), -100), ignore_index=ignore_index)


@pytest.mark.parametrize("function", EXPLAINING)
def test_explained_classes_that_fit_their_rows(backend: str, function: str) -> None:
    assert torch.isfinite(call(function, TARGET, CLASS_INDEX)).all()


@pytest.mark.parametrize("function", EXPLAINING)
@pytest.mark.parametrize(
    ("place", "value", "error", "message"),
    [
        pytest.param((1, 0), -1, IndexError, r"\[1, 0\] is -1, outside", id="negative"),
        pytest.param((1, 1), 0, ValueError, r"\[1\].*target 1, got \[4, 0, 0\]", id="no-target"),
        pytest.param((2, 2), 3, ValueError, r"\[2\].*once, got \[2, 3, 3\]", id="class-twice"),
        pytest.param((3, 1), 1, ValueError, r"\[3\].*once, got \[1, 1, 3\]", id="target-twice"),
    ],
)
def test_explained_classes_that_do_not_fit_their_row(
    backend: str,
    function: str,
    place: tuple[int, int],
    value: int,
    error: type[Exception],
    message: str,
) -> None:
    index = with_entry(CLASS_INDEX, place, value)
    with pytest.raises(error, match=rf"class_index{message}"):
        call(function, TARGET, index)
    ignored = with_entry(TARGET, place[:1], -100)
    assert torch.isfinite(call(function, ignored, index)).all()


@pytest.mark.parametrize("function", EXPLAINING[:2])
@pytest.mark.parametrize("value", [C, 2**62])
def test_explained_class_beyond_the_logits(backend: str, function: str, value: int) -> None:
    index = with_entry(CLASS_INDEX, (1, 2), value)
    with pytest.raises(IndexError, match=rf"class_index\[1, 2\] is {value}, outside \[0, {C}\)"):
        call(function, TARGET, index)
    ignored = with_entry(TARGET, (1,), -100)
    assert torch.isfinite(call(function, ignored, index)).all()


@pytest.mark.parametrize("target", [[0, 9], [-1, 2]])
def test_soft_labels_refuse_a_target_that_is_no_class(target: list[int]) -> None:
    stats = ik.ExplanationStats(torch.rand(2, 3), torch.rand(2, 3))
    with pytest.raises(IndexError, match=r"target\[[01]\] is (9|-1), outside \[0, 3\)"):
        ik.soft_labels(stats, torch.tensor(target))
    assert ik.soft_labels(stats, torch.tensor([-100, 2])).isnan().tolist() == [
        [True] * 3,
        [False] * 3,
    ]


def test_a_negative_target_is_out_of_range_also_among_chosen_classes(backend: str) -> None:
    index = torch.tensor([[0, 1], [-5, 2]])
    with pytest.raises(IndexError, match=r"target\[1\] is -5"):
        ik.explanation_stats(
            torch.randn(2, 2, 3), torch.randn(2, 3), torch.tensor([0, -5]), class_index=index
        )
