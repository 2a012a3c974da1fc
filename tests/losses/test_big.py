"""Tensors of more than 2^31 elements, in bfloat16: every offset into them has to be 64 bits wide.

What is only read lies in pages that are mapped and never written, which take no memory, save the
rows that a test fills. Nearly all rows are ignored; those that are not, at both ends and between,
hold numbers of their own, so that an offset that wraps around meets other numbers, or none. The
oracle sees these rows alone.

`make test-big` runs these tests, one after the other.
"""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path

import pytest
import torch
from helpers import backends
from helpers.bounds import bounds_of
from helpers.cases import (
    Case,
    distillation_case,
    introspective_case,
    linear_case,
    random_class_index,
    similarity_case,
)
from helpers.oracle import (
    Outcome,
    assert_outcomes_agree,
    defined,
    evaluate,
)
from helpers.tolerance import assert_accurate
from torch import Tensor

import introkernels as ik

pytestmark = pytest.mark.big

LIMIT = 1 << 31
IGNORED = -100
GIBIBYTE = 1 << 30
REQUIRED = "INTROKERNELS_REQUIRE_BIG"

# Just over 2^31 logits of a vocabulary.
ROWS, CLASSES = 67_200, 32_000


def need(gibibytes: float) -> None:
    """Skip the test where memory is short, or fail where INTROKERNELS_REQUIRE_BIG=1."""
    if backends.device() == "cuda":
        # Nothing is left unwritten there: it is the largest sum of what the tests tell of.
        gibibytes = 24
        available = torch.cuda.mem_get_info()[0]
    else:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        available = found * 1024
    if available >= gibibytes * GIBIBYTE:
        return
    reason = f"needs {gibibytes} GiB of memory, available are {available / GIBIBYTE:.1f}"
    if os.environ.get(REQUIRED) == "1":
        pytest.fail(f"{reason}, and {REQUIRED}=1")
    pytest.skip(reason)


def untouched_zeros(*shape: int) -> Tensor:
    """Zeros in bfloat16 whose pages come into being when they are written; on a GPU plain ones."""
    if backends.device() == "cuda":
        return torch.zeros(shape, dtype=torch.bfloat16)
    pages = mmap.mmap(-1, 2 * math.prod(shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.bfloat16).view(shape)


def live_rows(rows: int, count: int = 24) -> Tensor:
    """The numbers of the rows that are not ignored: the first, the last, and some between."""
    ends = torch.tensor([0, 1, rows - 2, rows - 1])
    between = torch.randperm(rows - 4)[: max(0, count - 4)] + 2
    return torch.cat([ends, between]).sort().values


def spread(small: Tensor, live: Tensor, rows: int) -> Tensor:
    """``rows`` rows in bfloat16, zeros but for those of ``small`` at the places ``live``."""
    big = untouched_zeros(rows, *small.shape[1:])
    big[live] = small
    return big


def spread_case(small: Case, live: Tensor, rows: int, *names: str) -> Case:
    """The rows of ``small`` at the places ``live`` among ignored ones.

    ``names`` are the arguments that get ``rows`` rows of pages that are never touched.
    """
    target = torch.full((rows,), IGNORED)
    target[live] = small["target"]
    return small.with_tensors(
        target=target, **{name: spread(small[name], live, rows) for name in names}
    )


def assert_rows_agree(big: Case, small: Case, live: Tensor, by_row: str) -> None:
    """Evaluate ``big`` and hold its rows ``live`` against what ``small`` is defined to give.

    ``by_row`` is the argument whose gradient has a row for each row of the loss; it must be zero in
    all other rows. The reduction is ``"none"``, and each live row gets an incoming gradient of its
    own.
    """
    of_rows = torch.rand(len(live)) + 0.5
    grad_loss = torch.zeros(big.rows).index_copy(0, live, of_rows)
    actual = evaluate(big, grad_loss=grad_loss)
    assert actual.loss.count_nonzero() == len(live)
    assert actual.grads[by_row].shape == big[by_row].shape
    assert_zero_elsewhere(actual.grads[by_row], live)

    incoming = of_rows.double()
    of_live_rows = Outcome(
        actual.loss[live],
        actual.ce[live],
        actual.kl[live],
        {**actual.grads, by_row: actual.grads[by_row][live]},
    )
    assert_outcomes_agree(of_live_rows, defined(small, incoming), bounds_of(small, incoming))


def assert_zero_elsewhere(big: Tensor, live: Tensor) -> None:
    """All rows but ``live`` are zeros."""
    other = torch.ones(len(big), dtype=torch.bool).index_fill(0, live, False)
    for rows, wanted in zip(big.split(1024), other.split(1024), strict=True):
        assert not (rows.flatten(1).any(dim=1) & wanted).any()


def test_distillation(compiled_backend: str) -> None:
    """4.3 GB each of logits and teacher logits (untouched) and of gradient (written)."""
    need(6)
    live = live_rows(ROWS)
    small = distillation_case(len(live), CLASSES, torch.bfloat16, reduction="none")
    big = spread_case(small, live, ROWS, "logits", "teacher_logits")
    assert big["logits"].numel() > LIMIT
    assert_rows_agree(big, small, live, "logits")


def test_similarity(compiled_backend: str) -> None:
    """4.3 GB each of logits, dots and squared norms (untouched) and of gradient (written)."""
    need(6)
    live = live_rows(ROWS)
    small = similarity_case(
        len(live), CLASSES, torch.bfloat16, stats_dtype=torch.bfloat16, reduction="none"
    )
    big = spread_case(small, live, ROWS, "logits", "dots", "sq_norms")
    assert big["dots"].numel() > LIMIT
    assert_rows_agree(big, small, live, "logits")


def test_introspective_with_many_logits(compiled_backend: str) -> None:
    """4.3 GB each of logits (untouched) and of gradient (written); three classes are explained."""
    need(6)
    live = live_rows(ROWS)
    small = introspective_case(
        len(live), CLASSES, torch.bfloat16, shape=(5,), explained=3, reduction="none"
    )
    big = spread_case(small, live, ROWS, "logits", "gradients", "inputs")
    index = random_class_index(torch.full((ROWS,), IGNORED), 9, 3)
    index[live] = small["class_index"]
    big = big.with_keywords(class_index=index)
    assert big["logits"].numel() > LIMIT
    assert_rows_agree(big, small, live, "logits")


@pytest.mark.parametrize("center", [False, True])
def test_introspective_with_many_explanations(compiled_backend: str, center: bool) -> None:
    """8.6 GB of gradients (untouched): a thousand classes, explained at small images."""
    need(2)
    rows = 1400  # past 2^32 as well
    live = live_rows(rows, count=9)
    small = introspective_case(
        len(live), 1000, torch.bfloat16, shape=(3, 32, 32), center=center, reduction="none"
    )
    big = spread_case(small, live, rows, "logits", "gradients", "inputs")
    assert big["gradients"].numel() > LIMIT
    assert_rows_agree(big, small, live, "logits")


def test_explanation_stats(compiled_backend: str) -> None:
    """8.6 GB of gradients (untouched)."""
    need(2)
    rows = 1400  # past 2^32 as well
    live = live_rows(rows, count=9)
    small = introspective_case(len(live), 1000, torch.bfloat16, shape=(3, 32, 32))
    big = spread_case(small, live, rows, "gradients", "inputs")
    assert big["gradients"].numel() > LIMIT
    stats = ik.explanation_stats(big["gradients"], big["inputs"], big["target"])
    wide = small.upcast()
    reference = ik.reference.explanation_stats(wide["gradients"], wide["inputs"], wide["target"])
    for name in ("dots", "sq_norms"):
        actual = getattr(stats, name)
        assert_accurate(actual[live], getattr(reference, name), name)
        assert_zero_elsewhere(actual, live)


@pytest.mark.parametrize("center", [False, True])
def test_statistics_of_long_explanations(compiled_backend: str, center: bool) -> None:
    """4.3 GB of inputs and 8.6 GB of gradients in a single row (all untouched)."""
    need(2)
    length = LIMIT + 40
    gradients, inputs = untouched_zeros(1, 2, length), untouched_zeros(1, length)
    # Numbers whose sums are exact, at both ends of both classes.
    gradients[0, :, 0] = torch.tensor([2.0, 6.0])
    gradients[0, :, -1] = torch.tensor([1.0, -3.0])
    inputs[0, 0], inputs[0, -1] = 1.0, 2.0
    stats = ik.explanation_stats(gradients, inputs, torch.tensor([0]), center=center)
    if center:  # explanations -2, 4 and 2, -4 are left of 2, 2 and 6, -6
        assert stats.dots.tolist() == [[20.0, -20.0]]
        assert stats.sq_norms.tolist() == [[20.0, 20.0]]
    else:
        assert stats.dots.tolist() == [[8.0, 0.0]]
        assert stats.sq_norms.tolist() == [[8.0, 72.0]]


def test_head_of_many_rows_and_classes(compiled_backend: str) -> None:
    """More logits than 2^31, which never exist at once."""
    need(2)
    live = live_rows(ROWS)
    small = linear_case(len(live), CLASSES, torch.bfloat16, width=8, reduction="none")
    big = spread_case(small, live, ROWS, "features")
    assert big.rows * CLASSES > LIMIT
    assert_rows_agree(big, small, live, "features")


def test_head_whose_rows_lie_far_apart(compiled_backend: str) -> None:
    """Rows of features and weight 2^30 elements apart: 8.6 and 10.7 GB (untouched)."""
    need(2)
    small = linear_case(4, 5, torch.bfloat16, width=33, reduction="none")
    big = small
    for name in ("features", "weight"):
        sparse = untouched_zeros(len(small[name]), 1 << 30)[:, -33:]
        sparse.copy_(small[name])
        big = big.with_tensors(**{name: sparse})
    assert_rows_agree(big, small, torch.arange(4), "features")


def test_head_of_many_features(compiled_backend: str) -> None:
    """4.3 GB of features (untouched), and their gradient in float32 and in bfloat16 (written)."""
    need(13.5)
    rows, width = (1 << 17) + 8, 1 << 14
    live = live_rows(rows)
    small = linear_case(len(live), 4, torch.bfloat16, width=width, reduction="none")
    big = spread_case(small, live, rows, "features")
    assert big["features"].numel() > LIMIT
    assert_rows_agree(big, small, live, "features")


def test_head_of_many_weights(compiled_backend: str) -> None:
    """4.3 GB of weight (untouched), and its gradient in float32 and in bfloat16 (written)."""
    need(13.5)
    classes, width = (1 << 17) + 8, 1 << 14
    live = live_rows(classes)
    small = linear_case(4, len(live), torch.bfloat16, width=width, bias=False, reduction="none")
    target = live[torch.tensor([0, -1, -2, 7])]
    big = small.with_tensors(weight=spread(small["weight"], live, classes), target=target)
    assert big["weight"].numel() > LIMIT
    actual = evaluate(big)

    # The definition would store the weight in float64. Classes of weight zero have logits and
    # statistics of zero, so that what is left of it are the rows of the others.
    features, weight = small["features"].double(), small["weight"].double()
    of_target = weight[torch.tensor([0, -1, -2, 7])]

    def of_all_classes(of_live: Tensor) -> Tensor:
        return torch.zeros(4, classes, dtype=torch.float64).index_copy(1, live, of_live)

    squares = features.square()
    logits = of_all_classes(features @ weight.T).requires_grad_()
    stats = ik.ExplanationStats(
        of_all_classes((squares * of_target) @ weight.T),
        of_all_classes(squares @ weight.square().T),
        None,
    )
    parts = ik.reference.similarity_loss(logits, target, stats, reduction="none", return_parts=True)
    (grad_logits,) = torch.autograd.grad(parts.loss.sum(), logits)
    assert_accurate(actual.loss, parts.loss.detach(), "loss")
    assert_accurate(actual.ce, parts.ce, "ce")
    assert_accurate(actual.grads["features"], grad_logits[:, live] @ weight, "gradient of features")
    some = torch.cat([live, live_rows(classes)])
    assert_accurate(
        actual.grads["weight"][some], grad_logits[:, some].T @ features, "gradient of weight"
    )
