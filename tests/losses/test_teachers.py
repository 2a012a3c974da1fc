"""Teacher logits of explanation statistics, against the definition in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.cases import Case, similarity_case
from helpers.tolerance import assert_within
from torch import Tensor

import introkernels as ik
from introkernels import teachers

LABELS = [
    {"similarity": similarity, "label_mode": label_mode}
    for similarity, label_mode in itertools.product(("cosine", "projection"), ("softmax", "split"))
]
every_label = pytest.mark.parametrize(
    "labels", LABELS, ids=lambda labels: "-".join(labels.values())
)


def stats_of(case: Case) -> ik.ExplanationStats:
    return ik.ExplanationStats(case["dots"], case["sq_norms"], case.tensors["stats_index"])


@every_label
@pytest.mark.parametrize("explained", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_follows_the_definition(
    labels: dict[str, str], explained: int | None, dtype: torch.dtype
) -> None:
    for temperature, tau in itertools.product((0.05, 4.0, 100.0), (0.01, 1.0, 100.0)):
        case = similarity_case(6, 17, dtype, explained=explained)
        keywords = {"temperature": temperature, "similarity_temperature": tau, **labels}
        actual = ik.teacher_logits(stats_of(case), case["target"], **keywords)
        expected = ik.reference.teacher_logits(stats_of(case.upcast()), case["target"], **keywords)
        assert actual.dtype == dtype
        eps = torch.finfo(dtype).eps / 2
        assert_within(actual, expected, 8 * eps * (1 / tau + expected.abs()), "teacher logits")


@every_label
def test_distils_what_the_loss_of_statistics_does(labels: dict[str, str]) -> None:
    case = similarity_case(6, 9, torch.float64, explained=4)
    stats, target = stats_of(case), case["target"]
    found = ik.teacher_logits(stats, target, **labels)
    everywhere = teachers.among_all(found, stats.class_index, 9)
    torch.testing.assert_close(
        ik.distillation_loss(case["logits"], everywhere, target),
        ik.similarity_loss(case["logits"], target, stats, **labels),
    )
    torch.testing.assert_close(
        torch.softmax(found / 4.0, 1), ik.soft_labels(stats, target, **labels)
    )
    assert everywhere.isfinite().sum(1).tolist() == [4] * 6


@pytest.mark.parametrize("mass", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("classes", [1, 5])
def test_split_holds_the_mass_of_the_others(classes: int, mass: float) -> None:
    case = similarity_case(4, classes, torch.float64)
    q = ik.soft_labels(stats_of(case), case["target"], label_mode="split", non_target_mass=mass)
    of_target = q.gather(1, case["target"][:, None])[:, 0]
    wanted = 1 - mass if classes > 1 else 1.0
    torch.testing.assert_close(of_target, torch.full((4,), wanted, dtype=torch.float64))
    torch.testing.assert_close(q.sum(1), torch.ones(4, dtype=torch.float64))


def test_norms_that_are_zero_or_infinite() -> None:
    dots = torch.tensor([[4.0, 2.0, 0.0]])
    target = torch.tensor([0])

    def of(*sq_norms: float) -> Tensor:
        return ik.explain.similarities(ik.ExplanationStats(dots, torch.tensor([sq_norms])), target)

    assert of(4.0, 4.0, 0.0).tolist() == [[1.0, 0.5, 0.0]]
    assert of(0.0, 4.0, 4.0).tolist() == [[1.0, 0.0, 0.0]]
    assert of(4.0, float("inf"), 4.0).isnan().tolist() == [[False, True, False]]


def test_ignored_and_unknown_targets() -> None:
    stats = ik.ExplanationStats(
        torch.ones(3, 2), torch.ones(3, 2), torch.tensor([[0, 1], [0, 1], [1, 2]])
    )
    found = ik.teacher_logits(stats, torch.tensor([-100, 2, 2]))
    assert found.isnan().all(1).tolist() == [True, True, False]
    with pytest.raises(IndexError, match=r"target\[1\] is 7, outside \[0, 5\)"):
        ik.teacher_logits(stats_of(similarity_case(2, 5)), torch.tensor([-100, 7]))


def test_a_class_that_does_not_exist_spoils_its_row() -> None:
    logits = torch.zeros(2, 2)
    index = torch.tensor([[0, 2], [1, 3]])
    spread = teachers.among_all(logits, index, 3)
    never = float("-inf")
    assert spread[0].tolist() == [0.0, never, 0.0]
    assert spread[1].isnan().any()
