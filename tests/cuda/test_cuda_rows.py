"""Rows of logits around every boundary of the CUDA kernels, against the definition in float64.

A vector is 4 classes, or 8 of two tensors of one half type. A row has the 4 to 32 lanes of a group
up to 2048 classes and the 256 threads of a block beyond; a block takes several parts of a row where
rows are few and have 16384 classes for each part. See csrc/cuda/row_loss.cu.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers.bounds import bounds_of
from helpers.cases import Case, distillation_case, introspective_case
from helpers.far import far_apart
from helpers.oracle import (
    Outcome,
    assert_follows_definition,
    evaluate,
    exact_distillation,
)
from helpers.tolerance import assert_accurate, assert_within
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF_TYPES = (torch.bfloat16, torch.float16)
NEVER = -torch.inf
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Around one and two vectors, then around the rounds and the sizes of groups.
OF_A_FEW_LANES = (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65)
OF_MANY_LANES = (127, 128, 129, 255, 256, 257, 1023, 1025, 2047, 2048)
OF_A_BLOCK = (2049, 2056, 4097)
# Three parts of a row, the last one longer than the others and of no whole vectors.
OF_PARTS = 3 * 16384 + 5


@every_dtype
def test_class_counts(dtype: torch.dtype) -> None:
    # 64 rows of few classes are a block: a whole one, and one with rows to spare.
    for rows, counts in ((67, OF_A_FEW_LANES), (9, OF_MANY_LANES), (2, OF_A_BLOCK)):
        for classes in counts:
            assert_follows_definition(
                distillation_case(rows, classes, dtype, ignored=1, reduction="none")
            )


@pytest.mark.parametrize("half", HALF_TYPES, ids=str)
@pytest.mark.parametrize("class_weights", [False, True])
def test_class_counts_of_mixed_dtypes(half: torch.dtype, class_weights: bool) -> None:
    other = next(dtype for dtype in HALF_TYPES if dtype != half)
    for classes in (1, 7, 8, 9, 64, 65, 257, 2049):
        for dtype, teacher_dtype in ((half, torch.float32), (torch.float32, half), (half, other)):
            assert_follows_definition(
                distillation_case(
                    3,
                    classes,
                    dtype,
                    teacher_dtype=teacher_dtype,
                    class_weights=class_weights,
                    label_smoothing=0.1 if class_weights else 0.0,
                )
            )


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_rows_of_several_blocks(rows: int, reduction: str) -> None:
    """The last block adds up the terms of 256 rows at a time."""
    for classes in (5, 100):
        assert_follows_definition(
            distillation_case(
                rows, classes, ignored=rows // 5, class_weights=True, reduction=reduction
            )
        )


@every_dtype
def test_explained_classes_of_a_long_row(dtype: torch.dtype) -> None:
    """More classes than a block has threads, of which as many are explained."""
    for explained in (255, 257, 600):
        assert_follows_definition(
            introspective_case(2, 700, dtype, shape=(3,), explained=explained)
        )


# Where the largest logits of a row come, to which threads, groups and parts rescale their sums.
def sorted_upwards(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return z.sort(1).values, t.sort(1, descending=True).values


def sorted_downwards(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return z.sort(1, descending=True).values, t.sort(1).values


def first_classes_do_not_exist(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    z[:, : z.shape[1] * 2 // 3] = NEVER
    return z, t


def first_classes_have_no_label(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    t[:, : t.shape[1] * 2 // 3] = NEVER
    return z, t


def first_classes_are_unlikely(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    z[:, : z.shape[1] * 2 // 3] -= 100
    return z, t


def first_classes_are_unlikely_to_the_teacher(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    t[:, : t.shape[1] * 2 // 3] -= 1000
    return z, t


def last_class_is_sure(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    z[:, -1] = 500
    return z, t


def last_class_is_sure_to_both(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    z[:, -1] = 6e4
    t[:, -1] = 6e4
    return z, t


def last_class_is_sure_to_the_teacher(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    t[:, -1] = 6e4
    return z, t


def sure_classes_are_far_apart(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    z[:, -1] = 6e4
    t[:, 5] = 6e4
    return z, t


ORDERS = (
    sorted_upwards,
    sorted_downwards,
    first_classes_do_not_exist,
    first_classes_have_no_label,
    first_classes_are_unlikely,
    first_classes_are_unlikely_to_the_teacher,
    last_class_is_sure,
    last_class_is_sure_to_both,
    last_class_is_sure_to_the_teacher,
    sure_classes_are_far_apart,
)
every_order = pytest.mark.parametrize("arrange", ORDERS, ids=lambda arrange: arrange.__name__)


def arranged(case: Case, arrange: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Case:
    """The case with logits and teacher logits in that order."""
    logits, teacher = arrange(case["logits"].clone(), case["teacher_logits"].clone())
    return case.with_tensors(logits=logits, teacher_logits=teacher)


@every_dtype
@every_order
def test_where_the_largest_logits_come(
    dtype: torch.dtype, arrange: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> None:
    # Groups of 4, 16 and 32 lanes, and a block.
    for classes in (60, 250, 2001, 9001):
        case = arranged(distillation_case(3, classes, dtype, reduction="none"), arrange)
        # Targets that exist, among them the very last class and one of the first that do.
        last = torch.tensor([classes - 1, classes - 2, classes * 2 // 3 + 1])
        assert_follows_definition(case.with_tensors(target=last))


def eps_of(dtype: torch.dtype) -> float:
    """Half a unit in the last place of the type that this one is computed in."""
    return 2.0**-53 if dtype == torch.float64 else 2.0**-24


def assert_follows_exact(case: Case) -> None:
    """Hold a distillation case of reduction "none" against arithmetic with 50 digits."""
    result, bounds = evaluate(case), bounds_of(case, None)
    losses, grads = exact_distillation(case)
    assert_within(result.loss, losses, bounds.loss, "loss")
    assert_within(result.grads["logits"], grads, bounds.grads["logits"], "gradient")


def nearly_equal(classes: int, dtype: torch.dtype, below: float) -> Case:
    """A case of the divergence alone, of which the last third of the classes has all."""
    logits = torch.randn(2, classes, dtype=dtype)
    teacher = logits + 1e-3 * torch.randn(2, classes, dtype=dtype)
    first = classes * 2 // 3
    logits[:, :first] -= below
    teacher[:, :first] -= 1.5 * below
    return distillation_case(
        2, classes, dtype, reduction="none", temperature=1.0, ce_weight=0.0, kl_weight=1.0
    ).with_tensors(logits=logits, teacher_logits=teacher)


every_depth = pytest.mark.parametrize("below", [1.0, 15.0, 40.0])


@every_depth
@pytest.mark.parametrize("classes", [60, 250, 2500, OF_PARTS])
def test_nearly_equal_distributions_whose_likely_classes_come_late(
    classes: int, below: float
) -> None:
    result = assert_follows_definition(nearly_equal(classes, torch.float32, below))
    assert (result.kl < (1e-5 if below > 1 else 1e-1)).all()


@every_depth
def test_nearly_equal_distributions_whose_likely_classes_come_late_in_float64(below: float) -> None:
    assert_follows_exact(nearly_equal(60, torch.float64, below))


@every_dtype
@pytest.mark.parametrize("temperature", [0.05, 4.0, 100.0])
@pytest.mark.parametrize("classes", [3, 130, 2100])
def test_logits_near_the_largest_number(
    dtype: torch.dtype, temperature: float, classes: int
) -> None:
    """Differences of such logits are beyond what their type holds, and so are quotients by T."""
    largest = torch.finfo(dtype).max
    logits = torch.full((2, classes), largest, dtype=dtype)
    logits[1] *= -1
    teacher = temperature * torch.rand(2, classes, dtype=torch.float64).to(dtype)
    logits[0, -1], teacher[0, -1] = -largest, -largest
    case = distillation_case(
        2, classes, dtype, temperature=temperature, reduction="none", ce_weight=0.0
    ).with_tensors(logits=logits, teacher_logits=teacher)
    q = torch.softmax(teacher.double() / temperature, 1)
    count = torch.tensor([classes - 1, classes], dtype=torch.float64)
    kl = torch.xlogy(q, q).sum(1) + count.log()
    assert_within(evaluate(case).kl, kl, 16 * eps_of(dtype) * (1 + 3 * count.log()), "kl")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_divergence_near_the_largest_number(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    case = distillation_case(3, 3, dtype, temperature=100.0, reduction="none").with_tensors(
        logits=torch.tensor([[largest, -largest, largest / 2]] * 3).to(dtype),
        teacher_logits=torch.zeros(3, 3).to(dtype),
    )
    z = case["logits"].double() / 100
    kl = torch.logsumexp(z, 1) - z.mean(1) - math.log(3)
    assert_accurate(evaluate(case).kl, kl, "kl")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_teacher_without_weight_spoils_nothing(dtype: torch.dtype) -> None:
    case = distillation_case(3, 40, dtype, reduction="none", ce_weight=1.0, kl_weight=0.0)
    expected = evaluate(case)
    for value in (torch.nan, torch.inf, NEVER):
        teacher = torch.full_like(case["teacher_logits"], value)
        result = evaluate(case.with_tensors(teacher_logits=teacher))
        assert torch.equal(result.loss, expected.loss)
        assert torch.equal(result.grads["logits"], expected.grads["logits"])


@pytest.mark.parametrize("place", [1, 37], ids=["same_vector", "another_thread"])
def test_soft_labels_below_the_smallest_number(place: int) -> None:
    """They matter beside a distance that is near the largest one."""
    largest = torch.finfo(torch.float32).max
    logits, teacher = torch.zeros(3, 40), torch.full((3, 40), NEVER)
    logits[:, 0], logits[:, place] = largest, -largest
    teacher[:, 0], teacher[:, place] = 0.0, -0.05 * torch.tensor([88.0, 100.0, 106.0])
    case = distillation_case(3, 40, reduction="none", temperature=0.05).with_tensors(
        logits=logits, teacher_logits=teacher, target=torch.zeros(3, dtype=torch.int64)
    )
    q = torch.softmax(teacher.double() / 0.05, 1)[:, place]
    # An exponential has the digits of its argument, which is 7 bits long.
    assert_accurate(evaluate(case).kl, q * (2 * largest / 0.05), "kl", factor=10)


def test_many_classes_of_a_thread() -> None:
    """Roundings of a sum of the same number may all go one way; no row is cut into parts here."""
    rows, classes = 5, 300_000
    logits = torch.zeros(rows, classes)
    # The first vector of each thread, to which its sums are relative.
    logits[:, :1024] = 1.52
    assert_follows_definition(
        distillation_case(rows, classes, reduction="none").with_tensors(
            logits=logits, teacher_logits=torch.randn(rows, 1).expand(rows, classes)
        )
    )


@every_dtype
@every_order
def test_parts_of_a_row(
    dtype: torch.dtype, arrange: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> None:
    """Two thirds of the classes are whole parts."""
    case = arranged(distillation_case(2, OF_PARTS, dtype, reduction="none"), arrange)
    target = torch.tensor([OF_PARTS - 1, OF_PARTS - 8])
    assert_follows_definition(case.with_tensors(target=target))


@pytest.mark.parametrize("classes", [2 * 16384 - 1, 2 * 16384, 2 * 16384 + 1, 8 * 16384 + 9])
def test_numbers_of_parts(classes: int) -> None:
    assert_follows_definition(
        distillation_case(1, classes, class_weights=True, label_smoothing=0.1)
    )


def test_parts_of_rows_of_which_some_are_ignored() -> None:
    case = distillation_case(4, 2 * 16384 + 3, torch.bfloat16, ignored=1)
    target = case["target"].clone()
    # The first class of a part, and the last one of another.
    target[(target >= 0).nonzero().flatten()[:2]] = torch.tensor([16384, 16383])
    assert_follows_definition(case.with_tensors(target=target))


def test_parts_between_which_distributions_hardly_differ() -> None:
    logits = torch.randn(2, OF_PARTS)
    teacher = logits + 1e-3 * torch.randn(2, OF_PARTS)
    case = distillation_case(2, OF_PARTS, reduction="none", temperature=1.0, ce_weight=0.0)
    result = assert_follows_definition(case.with_tensors(logits=logits, teacher_logits=teacher))
    assert (result.kl < 1e-6).all()


def somewhere_else(tensor: Tensor, shift: int, gap: int) -> Tensor:
    """The same numbers from element ``shift`` of a tensor on, ``gap`` NaN between rows."""
    rows, classes = tensor.shape
    wide = tensor.new_full((shift + rows * (classes + gap) + 8,), torch.nan)
    view = wide.as_strided((rows, classes), (classes + gap, 1), shift)
    return view.copy_(tensor)


def assert_same_bits(actual: Outcome, expected: Outcome) -> None:
    for name in ("loss", "ce", "kl"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    for name, grad in expected.grads.items():
        assert torch.equal(actual.grads[name], grad), f"gradient of {name}"


@every_dtype
@pytest.mark.parametrize("classes", [7, 16, 37, 150, 1001, 2501])
def test_bits_do_not_depend_on_where_rows_begin(dtype: torch.dtype, classes: int) -> None:
    """Half types are put together from words of two where their rows do not begin at one."""
    case = distillation_case(3, classes, dtype, reduction="none")
    expected = evaluate(case)
    for shift in range(8):
        for gap in (0, 1, 8):
            moved = case.with_tensors(
                logits=somewhere_else(case["logits"], shift, gap),
                teacher_logits=somewhere_else(case["teacher_logits"], 7 - shift, gap),
            )
            assert_same_bits(evaluate(moved), expected)


@every_dtype
def test_bits_of_a_part_do_not_depend_on_where_rows_begin(dtype: torch.dtype) -> None:
    case = distillation_case(1, OF_PARTS, dtype)
    moved = case.with_tensors(
        logits=somewhere_else(case["logits"], 3, 1),
        teacher_logits=somewhere_else(case["teacher_logits"], 1, 1),
    )
    assert_same_bits(evaluate(moved), evaluate(case))


@every_dtype
def test_strides_of_every_tensor(dtype: torch.dtype) -> None:
    def spread(tensor: Tensor) -> Tensor:
        wide = tensor.new_full((tensor.shape[0] + 1, 3 * tensor.shape[-1]), torch.nan)
        view = wide[1:, 1::3] if tensor.dim() == 2 else wide[0, : 3 * len(tensor) : 3]
        return view.copy_(tensor)

    for classes in (21, 300, 2100):
        case = distillation_case(3, classes, dtype, class_weights=True, reduction="none")
        for name in ("logits", "teacher_logits"):
            assert_follows_definition(case.with_tensors(**{name: spread(case[name])}))
            transposed = case[name].t().contiguous().t()
            assert_follows_definition(case.with_tensors(**{name: transposed}))
            assert_follows_definition(case.with_tensors(**{name: case[name][:1].expand(3, -1)}))
            assert_follows_definition(
                case.with_tensors(**{name: case[name][:, :1].expand_as(case[name])})
            )
        weight = case["weight"].repeat_interleave(2)[::2]
        target = case["target"].repeat_interleave(2)[::2]
        assert_follows_definition(case.with_keywords(weight=weight).with_tensors(target=target))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", ["logits", "teacher_logits"])
def test_distillation_of_far_rows_and_classes(name: str, dim: int) -> None:
    case = distillation_case(3, 3, torch.bfloat16, reduction="none")
    assert_follows_definition(case.with_tensors(**{name: far_apart(case[name], dim)}))


def test_far_class_weights() -> None:
    case = distillation_case(
        5, 3, torch.bfloat16, class_weights=True, label_smoothing=0.1, reduction="none"
    )
    assert_follows_definition(case.with_keywords(weight=far_apart(case["weight"], 0)))
