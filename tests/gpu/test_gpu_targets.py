"""Targets that are no class: NaN in their rows alone, or an error where that is asked for."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import assert_same, leaves_of, loss_of, on_gpu, results
from helpers.cases import BUILDERS, Case

import introkernels as ik

pytestmark = pytest.mark.gpu

ROWS, CLASSES, BAD_ROW = 37, 19, 5
every_loss = pytest.mark.parametrize("loss", BUILDERS)
every_bad = pytest.mark.parametrize("bad", [CLASSES, -1, -101, 2**40, 2**62, -(2**63)])


def good_and_bad(loss: str, bad: int, **keywords: object) -> tuple[Case, Case]:
    """A case of rows that are not reduced, and the same with one target that is no class."""
    good = on_gpu(lambda: BUILDERS[loss](ROWS, CLASSES, reduction="none", **keywords))
    target = good["target"].clone()
    target[BAD_ROW] = bad
    return good, good.with_tensors(target=target)


def by_row(case: Case) -> list[torch.Tensor]:
    """Loss, terms, and the gradient that has a row for each row of the loss."""
    return results(leaves_of(case))[:4]


def assert_spoils_its_row_alone(good: Case, bad: Case) -> None:
    others = torch.arange(ROWS, device="cuda") != BAD_ROW
    actual, expected = by_row(bad), by_row(good)
    for tensor in actual:
        assert tensor[BAD_ROW].isnan().all()
    assert_same([t[others] for t in actual], [t[others] for t in expected])
    assert all(tensor[others].isfinite().all() for tensor in actual)


@every_bad
@every_loss
def test_a_bad_target_spoils_its_row_alone(loss: str, bad: int) -> None:
    assert_spoils_its_row_alone(*good_and_bad(loss, bad))


@every_bad
@pytest.mark.parametrize("loss", ["similarity_loss", "introspective_loss"])
def test_a_bad_target_among_explained_classes(loss: str, bad: int) -> None:
    assert_spoils_its_row_alone(*good_and_bad(loss, bad, explained=4))


@pytest.mark.parametrize("value", [CLASSES, -1, 2**40, -(2**63)])
@pytest.mark.parametrize("loss", ["similarity_loss", "introspective_loss"])
def test_a_bad_explained_class_spoils_its_row_alone(loss: str, value: int) -> None:
    good, _ = good_and_bad(loss, 0, explained=4)
    name = "stats_index" if loss == "similarity_loss" else "class_index"
    index = good[name].clone()
    place = int((index[BAD_ROW] != good["target"][BAD_ROW]).nonzero()[0, 0])
    index[BAD_ROW, place] = value
    if name in good.tensors:
        bad = good.with_tensors(**{name: index})
    else:
        bad = good.with_keywords(**{name: index})
    assert_spoils_its_row_alone(good, bad)


@every_bad
def test_a_bad_target_has_no_inner_products(bad: int) -> None:
    good, spoilt = good_and_bad("introspective_loss", bad)
    others = torch.arange(ROWS, device="cuda") != BAD_ROW
    expected, actual = (
        ik.explanation_stats(case["gradients"], case["inputs"], case["target"])
        for case in (good, spoilt)
    )
    assert actual.dots[BAD_ROW].isnan().all()
    assert_same(
        [actual.dots[others], actual.sq_norms[others]],
        [expected.dots[others], expected.sq_norms[others]],
    )


@every_loss
def test_a_bad_target_reaches_the_mean(loss: str) -> None:
    _, bad = good_and_bad(loss, CLASSES)
    assert loss_of(bad.with_keywords(reduction="mean")).isnan()


@every_loss
def test_checks_on_request(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = good_and_bad(loss, CLASSES)
    monkeypatch.setenv("INTROKERNELS_CHECK", "1")
    assert loss_of(good).isfinite().all()
    with pytest.raises(IndexError, match=rf"target\[{BAD_ROW}\] is {CLASSES}, outside"):
        loss_of(bad)


@every_loss
def test_an_ignored_row_may_hold_anything(loss: str) -> None:
    good, ignored = good_and_bad(loss, -100)
    others = torch.arange(ROWS, device="cuda") != BAD_ROW
    actual, expected = by_row(ignored), by_row(good)
    for tensor in actual:
        assert not tensor[BAD_ROW].any()
    assert_same([t[others] for t in actual], [t[others] for t in expected])
