"""The row kernels where a row takes several tiles, and where nobody has checked the indices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers.cases import Case, distillation_case, introspective_case, similarity_case
from helpers.oracle import assert_follows_definition
from helpers.tolerance import assert_accurate
from torch import Tensor

import introkernels as ik
from introkernels import checks
from introkernels.ops.triton import losses

NEVER = float("-inf")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _on_triton() -> Iterator[None]:
    with ik.use_backend("triton"):
        yield


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows and four classes at a time."""
    tile = losses.Tiles(lanes=2, vector=1, rows=2, chunks=2, num_warps=1)
    monkeypatch.setattr(losses, "vector_of", lambda logits, teacher: 1)
    monkeypatch.setattr(losses, "tiles", lambda *arguments: tile)


@contextmanager
def unchecked_indices() -> Iterator[None]:
    """As on a GPU, where looking at indices would stall the stream."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "values_are_readable", lambda tensor: False)
        yield


@every_dtype
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("classes", [3, 4, 5, 8, 11])
def test_rows_of_several_tiles(classes: int, dtype: torch.dtype) -> None:
    for options in (
        {"reduction": "none"},
        {"label_smoothing": 0.1, "class_weights": True, "ignored": 1},
    ):
        assert_follows_definition(distillation_case(5, classes, dtype, **options))
        explained = min(classes, 6)
        assert_follows_definition(
            similarity_case(5, classes, dtype, explained=explained, **options)
        )


@pytest.mark.parametrize("classes", [3, 100, 1000, 2048])
def test_few_rows_have_more_lanes(classes: int) -> None:
    for loop in (losses.SHORT_ROWS, losses.ROWS_OF_A_WARP, losses.BACKWARD):
        many, few = (losses.tiles(torch.Size((rows, classes)), 1, loop) for rows in (2**20, 8))
        assert many.lanes == 32 or classes <= loop.of_lane * many.lanes
        assert many.lanes <= few.lanes <= 32
        # Not more than read a class, though.
        assert few.lanes == 2 or few.lanes // 2 * loop.of_thread < classes
        assert {tile.lanes * tile.rows for tile in (many, few)} == {64}


def rising_and_falling(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits and teacher logits whose largest are in the first, a middle or the last tile."""
    ramp = torch.linspace(-20, 20, 12, dtype=torch.float64)
    hill = -ramp.abs()
    logits = torch.stack([ramp, -ramp, hill, -hill, ramp, hill])
    teacher = torch.stack([-ramp, -ramp, ramp, hill, ramp, -hill])
    return logits.to(dtype), teacher.to(dtype)


@every_dtype
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("temperature", [0.5, 1.0, 30.0])
def test_maxima_of_later_tiles(dtype: torch.dtype, temperature: float) -> None:
    logits, teacher = rising_and_falling(dtype)
    case = distillation_case(6, 12, dtype, temperature=temperature, reduction="none")
    assert_follows_definition(case.with_tensors(logits=logits, teacher_logits=teacher))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_distances_beyond_the_range_of_float32(dtype: torch.dtype) -> None:
    logits, teacher = (values / 20 * 1.8e38 for values in rising_and_falling(torch.float64))
    case = distillation_case(
        6, 12, dtype, temperature=100.0, ce_weight=0.0, kl_weight=1e-6, reduction="none"
    )
    case = case.with_tensors(
        logits=logits.to(dtype), teacher_logits=teacher.to(dtype), target=logits.argmax(1)
    )
    assert assert_follows_definition(case).loss.isfinite().all()


def test_a_norm_that_overflowed_makes_its_row_nan() -> None:
    gradients = torch.tensor([[[1.0] * 4, [2e19] * 4, [1.0, -1.0, 1.0, -1.0]]]).repeat(2, 1, 1)
    gradients[1, 1] = 1
    inputs, target = torch.ones(2, 4), torch.tensor([0, 0])
    for similarity, expected in (("cosine", [True, False]), ("projection", [False, False])):
        loss = ik.introspective_loss(
            torch.zeros(2, 3), target, gradients, inputs, similarity=similarity, reduction="none"
        )
        assert loss.isnan().tolist() == expected


@every_dtype
@pytest.mark.usefixtures("small_tiles")
def test_tiles_without_classes_or_labels(dtype: torch.dtype) -> None:
    logits, teacher = rising_and_falling(dtype)
    # No class in the first tile, none in the middle, one in all; no label before the last tile.
    logits[0, :4] = NEVER
    logits[1, 4:8] = NEVER
    logits[2, :11] = NEVER
    teacher[3, :9] = NEVER
    teacher[4, 1:] = NEVER
    teacher[5, 4:8] = NEVER
    target = torch.tensor([11, 0, 11, 3, 5, 6])
    case = distillation_case(6, 12, dtype, reduction="none", label_smoothing=0.1)
    assert_follows_definition(
        case.with_tensors(logits=logits, teacher_logits=teacher, target=target)
    )


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("distance", [1e-2, 1e-4])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_close_distributions_whose_tiles_differ(distance: float, offset: float) -> None:
    # Each tile's own distance from its teacher is far larger than that of the rows.
    logits = 3 * torch.randn(4, 12, dtype=torch.float64)
    step = torch.tensor([1.0, -1.0, 0.5]).repeat_interleave(4)
    teacher = logits + distance * (step + 0.1 * torch.randn(4, 12)) + offset
    # What float32 makes of the two is the problem to solve.
    logits, teacher = logits.float(), teacher.float()
    case = distillation_case(
        4, 12, torch.float32, ce_weight=0.0, kl_weight=1.0, temperature=2.0, reduction="none"
    )
    assert_follows_definition(case.with_tensors(logits=logits, teacher_logits=teacher))


def guarded(tensor: Tensor) -> Tensor:
    """The same numbers within memory that holds NaN, or huge indices, on all sides."""
    wall = float("nan") if tensor.is_floating_point() else 2**60
    buffer = torch.full((3 * tensor.numel(),), wall, dtype=tensor.dtype)
    inner = buffer[tensor.numel() : 2 * tensor.numel()].view(tensor.shape)
    return inner.copy_(tensor)


def unknown_targets(case: Case, rows: dict[int, int]) -> Case:
    """The case with targets that are no class, all tensors guarded."""
    target = case["target"].clone()
    for row, value in rows.items():
        target[row] = value
    tensors = {
        name: tensor if tensor is None else guarded(tensor) for name, tensor in case.tensors.items()
    }
    return case.with_tensors(**{**tensors, "target": guarded(target)})


CASES: dict[str, Any] = {
    "distillation": lambda **keywords: distillation_case(5, 7, **keywords),
    "similarity": lambda **keywords: similarity_case(5, 7, **keywords),
    "similarity-explained": lambda **keywords: similarity_case(5, 7, explained=3, **keywords),
    "introspective": lambda **keywords: introspective_case(5, 7, shape=(9,), **keywords),
}


@pytest.mark.parametrize("name", CASES)
def test_a_target_that_is_no_class_makes_its_row_nan(name: str) -> None:
    case = CASES[name](reduction="none", class_weights=True)
    bad = unknown_targets(case, {1: 7, 3: -5, 4: 2**40})
    logits = bad["logits"].requires_grad_()
    with unchecked_indices():
        loss = getattr(ik, case.function)(*bad.arguments(), **bad.keywords)
        (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.isnan().tolist() == [False, True, False, True, True]
    assert grad.isnan().all(1).tolist() == [False, True, False, True, True]
    good = case.upcast()
    expected = getattr(ik.reference, case.function)(*good.arguments(), **good.keywords)
    assert_accurate(loss[[0, 2]], expected[[0, 2]])


def test_a_batch_without_rows() -> None:
    for build in (distillation_case, similarity_case, introspective_case):
        for reduction in ("mean", "sum", "none"):
            case = build(0, 5, reduction=reduction)
            expected = getattr(ik.reference, case.function)(*case.arguments(), **case.keywords)
            loss = getattr(ik, case.function)(*case.arguments(), **case.keywords)
            assert loss.shape == expected.shape
            assert torch.equal(loss.isnan(), expected.isnan())
            assert_accurate(loss.nan_to_num(), expected.nan_to_num())
