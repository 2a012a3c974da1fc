"""Explanation statistics: accuracy, layouts of their classes, and their degenerate cases."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.cases import introspective_case, random_class_index, random_target
from helpers.tolerance import assert_accurate
from torch import Tensor

import introkernels as ik

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_center = pytest.mark.parametrize("center", [False, True])


def assert_stats_follow_definition(
    gradients: Tensor,
    inputs: Tensor,
    target: Tensor,
    *,
    center: bool = False,
    class_index: Tensor | None = None,
    factor: float = 1.0,
) -> ik.ExplanationStats:
    stats = ik.explanation_stats(gradients, inputs, target, center=center, class_index=class_index)
    expected = ik.reference.explanation_stats(
        gradients.double(), inputs.double(), target, center=center, class_index=class_index
    )
    wide = torch.float64 if gradients.dtype == torch.float64 else torch.float32
    assert stats.dots.dtype == stats.sq_norms.dtype == wide
    assert stats.class_index is class_index
    assert not stats.dots.requires_grad
    assert not stats.sq_norms.requires_grad
    assert_accurate(stats.dots, expected.dots, "dots", factor=factor)
    assert_accurate(stats.sq_norms, expected.sq_norms, "sq_norms", factor=factor)
    return stats


@every_dtype
@every_center
def test_sizes(backend: str, dtype: torch.dtype, center: bool) -> None:
    sizes = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 784, 1025, 8193, 2 * 16384 + 5)
    for size, classes in zip(sizes, itertools.cycle((1, 2, 3, 10)), strict=False):
        # A single class centred is its own mean: rounding is all that could be left of it.
        classes = 5 if center and classes == 1 else classes
        case = introspective_case(3, classes, dtype, shape=(size,))
        assert_stats_follow_definition(
            case["gradients"], case["inputs"], case["target"], center=center
        )


@every_dtype
@every_center
def test_groups_of_classes(backend: str, dtype: torch.dtype, center: bool) -> None:
    """Kernels take some classes at a time; no number of them leaves one out or takes one twice."""
    for classes in range(2, 13):
        case = introspective_case(3, classes, dtype, shape=(40,))
        assert_stats_follow_definition(
            case["gradients"], case["inputs"], case["target"], center=center
        )


@every_dtype
@every_center
def test_many_classes(backend: str, dtype: torch.dtype, center: bool) -> None:
    for rows, classes in ((2, 1000), (33, 100), (1, 257), (70, 9)):
        case = introspective_case(rows, classes, dtype, shape=(17,), ignored=rows // 3)
        assert_stats_follow_definition(
            case["gradients"], case["inputs"], case["target"], center=center
        )


@every_center
def test_dtypes_mixed(backend: str, center: bool) -> None:
    for first, second in itertools.product(DTYPES[1:], DTYPES[1:]):
        case = introspective_case(3, 5, gradients_dtype=first, inputs_dtype=second, shape=(65,))
        assert_stats_follow_definition(
            case["gradients"], case["inputs"], case["target"], center=center
        )


@every_dtype
@every_center
@pytest.mark.parametrize("explained", [2, 3, 17])
def test_class_index(backend: str, dtype: torch.dtype, center: bool, explained: int) -> None:
    case = introspective_case(6, 40, dtype, explained=explained, shape=(3, 5), ignored=2)
    stats = assert_stats_follow_definition(
        case["gradients"],
        case["inputs"],
        case["target"],
        center=center,
        class_index=case["class_index"],
    )
    assert (stats.dots[case["target"] == -100] == 0).all()


def test_class_index_may_name_any_class(backend: str) -> None:
    # The statistics alone don't know how many classes there are.
    gradients, inputs = torch.randn(2, 3, 4), torch.randn(2, 4)
    target = torch.tensor([10**12, 7])
    index = torch.tensor([[5, 10**12, 1], [7, 0, 2**62]])
    assert_stats_follow_definition(gradients, inputs, target, class_index=index)


def test_class_0_among_explained_classes(backend: str) -> None:
    """It is also what a kernel may take the places beyond the last explained class for."""
    case = introspective_case(100, 30, shape=(5,), explained=3)
    index, target = case["class_index"], case["target"].clone()
    target[:10] = 0
    index[:10] = torch.tensor([7, 0, 3])
    gradients, inputs = case["gradients"], case["inputs"]
    assert_stats_follow_definition(gradients, inputs, target, class_index=index)


def test_explained_classes_have_the_numbers_they_have_among_all(backend: str) -> None:
    target = random_target(6, 20)
    index = random_class_index(target, 20, 5)
    gradients, inputs = torch.randn(6, 20, 31).double(), torch.randn(6, 31).double()
    picked = gradients.gather(1, index[:, :, None].expand(-1, -1, 31))
    full = ik.explanation_stats(gradients, inputs, target)
    some = ik.explanation_stats(picked, inputs, target, class_index=index)
    assert_accurate(some.dots, full.dots.gather(1, index))
    assert_accurate(some.sq_norms, full.sq_norms.gather(1, index))


@pytest.mark.parametrize(("dtype", "common"), [(torch.float64, 1e5), (torch.float32, 1e3)], ids=str)
def test_center_takes_a_large_common_part_away(
    backend: str, dtype: torch.dtype, common: float
) -> None:
    case = introspective_case(4, 10, dtype, shape=(65,))
    gradients = case["gradients"] + common * torch.randn(4, 1, 65, dtype=dtype)
    # Rounding the mean costs one part in 1 / eps of the common part, linearly: an expansion of
    # the square, <E_c, E_y> - <E_c, mean> - ..., would lose the square of it.
    assert_stats_follow_definition(
        gradients, case["inputs"], case["target"], center=True, factor=common
    )


@every_dtype
def test_zero_inputs_have_zero_statistics(backend: str, dtype: torch.dtype) -> None:
    case = introspective_case(4, 5, dtype)
    inputs = case["inputs"].clone()
    inputs[1] = 0
    gradients = case["gradients"].clone()
    gradients[2, 3] = 0
    stats = assert_stats_follow_definition(gradients, inputs, case["target"])
    assert (stats.dots[1] == 0).all()
    assert (stats.sq_norms[1] == 0).all()
    assert stats.sq_norms[2, 3] == 0
    assert (stats.sq_norms[0] > 0).all()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 3, 4)], ids=str)
def test_shapes(backend: str, shape: tuple[int, ...]) -> None:
    gradients, inputs = torch.randn(4, 5, *shape), torch.randn(4, *shape)
    stats = assert_stats_follow_definition(gradients, inputs, random_target(4, 5))
    assert stats.dots.shape == stats.sq_norms.shape == (4, 5)


def test_no_rows(backend: str) -> None:
    stats = ik.explanation_stats(
        torch.randn(0, 5, 7), torch.randn(0, 7), torch.empty(0, dtype=torch.int64)
    )
    assert stats.dots.shape == stats.sq_norms.shape == (0, 5)


@every_dtype
@every_center
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_ignored_rows_are_zero_whatever_they_hold(
    backend: str, dtype: torch.dtype, center: bool, value: float
) -> None:
    case = introspective_case(5, 6, dtype, explained=3)
    target, index = case["target"].clone(), case["class_index"].clone()
    gradients, inputs = case["gradients"].clone(), case["inputs"].clone()
    target[[1, 3]] = -100
    index[1] = torch.tensor([10**9, -(10**9), 10**9])
    gradients[1, 0], inputs[3] = value, value
    stats = assert_stats_follow_definition(
        gradients, inputs, target, center=center, class_index=index
    )
    for statistic in stats[:2]:
        assert (statistic[[1, 3]] == 0).all()
        assert statistic.isfinite().all()


@every_center
@pytest.mark.parametrize("where", ["gradients", "inputs"])
def test_nan_stays_in_its_row(backend: str, center: bool, where: str) -> None:
    case = introspective_case(5, 6, shape=(65,))
    clean = ik.explanation_stats(case["gradients"], case["inputs"], case["target"], center=center)
    spoiled = case[where].clone()
    spoiled[2, ..., 3] = float("nan")
    spoiled_case = case.with_tensors(**{where: spoiled})
    stats = ik.explanation_stats(
        spoiled_case["gradients"], spoiled_case["inputs"], case["target"], center=center
    )
    others = [0, 1, 3, 4]
    for statistic, expected in zip(stats[:2], clean[:2], strict=True):
        assert statistic[2].isnan().all()
        assert torch.equal(statistic[others], expected[others])


def test_nan_in_one_class_spoils_that_class_alone(backend: str) -> None:
    case = introspective_case(3, 6, shape=(65,))
    target = torch.tensor([0, 0, 0])
    gradients = case["gradients"].clone()
    gradients[1, 4, 7] = float("nan")
    stats = assert_stats_follow_definition(gradients, case["inputs"], target)
    assert stats.dots[1].isnan().nonzero().tolist() == [[4]]


@pytest.mark.parametrize("size", [1e-9, 1e-5, 1e4])
def test_small_and_large_explanations(backend: str, size: float) -> None:
    # 1e-9 squared twice is 1e-36, still a normal float32 number.
    case = introspective_case(3, 5, shape=(65,))
    assert_stats_follow_definition(case["gradients"] * size, case["inputs"] * size, case["target"])


def test_half_types_do_not_overflow(backend: str) -> None:
    gradients = torch.full((2, 3, 100), 60000.0, dtype=torch.float16)
    inputs = torch.full((2, 100), -60000.0, dtype=torch.float16)
    stats = assert_stats_follow_definition(gradients, inputs, torch.tensor([0, 2]))
    assert stats.dots.isfinite().all()


def test_inner_product_with_itself_is_the_squared_norm(backend: str) -> None:
    for dtype, center in itertools.product(DTYPES, (False, True)):
        case = introspective_case(8, 6, dtype, shape=(129,))
        target = case["target"]
        stats = ik.explanation_stats(case["gradients"], case["inputs"], target, center=center)
        of_target = stats.dots.gather(1, target[:, None]), stats.sq_norms.gather(1, target[:, None])
        assert_accurate(of_target[0], of_target[1].double())
