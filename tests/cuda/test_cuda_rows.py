"""Rows of logits around every boundary of the CUDA kernels, against the definition in float64.

A vector is 4 classes, or 8 of two tensors of one half type. A row has the 4 to 32 lanes of a group
up to 2048 classes and the 256 threads of a block beyond; a block takes several parts of a row where
rows are few and have 16384 classes for each part. See csrc/cuda/row_forward.cu.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers.cases import Case, distillation_case, introspective_case, similarity_case
from helpers.far import far_apart
from helpers.oracle import (
    Outcome,
    assert_follows_definition,
    defined,
    evaluate,
    exact_distillation,
)
from helpers.tolerance import assert_accurate, assert_rows_accurate
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
@pytest.mark.parametrize("case_of", [distillation_case, similarity_case])
def test_class_counts(dtype: torch.dtype, case_of: Callable[..., Case]) -> None:
    # 64 rows of few classes are a block: a whole one, and one with rows to spare.
    for rows, counts in ((67, OF_A_FEW_LANES), (9, OF_MANY_LANES), (2, OF_A_BLOCK)):
        for classes in counts:
            assert_follows_definition(case_of(rows, classes, dtype, ignored=1, reduction="none"))


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
@pytest.mark.parametrize("label_mode", ["softmax", "split"])
def test_explained_classes_of_a_long_row(dtype: torch.dtype, label_mode: str) -> None:
    """More classes than a block has threads, of which as many are explained."""
    for explained in (255, 257, 600):
        keywords = {"explained": explained, "label_mode": label_mode, "reduction": "none"}
        assert_follows_definition(similarity_case(3, 700, dtype, **keywords))
    assert_follows_definition(
        introspective_case(2, 700, dtype, shape=(3,), explained=300, label_mode=label_mode)
    )


# What the first vectors of a row say of it, which is all that its references come from.
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


MISLEADING = (
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
every_misleading = pytest.mark.parametrize(
    "mislead", MISLEADING, ids=lambda mislead: mislead.__name__
)


def misled(case: Case, mislead: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Case:
    """The case with logits and teacher logits of which the first classes mislead."""
    logits, teacher = mislead(case["logits"].clone(), case["teacher_logits"].clone())
    return case.with_tensors(logits=logits, teacher_logits=teacher)


@every_dtype
@every_misleading
def test_first_vectors_mislead(
    dtype: torch.dtype, mislead: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> None:
    # Groups of 4, 16 and 32 lanes, and a block.
    for classes in (60, 250, 2001, 9001):
        case = misled(distillation_case(3, classes, dtype, reduction="none"), mislead)
        # Targets that exist, among them the very last class and one of the first that do.
        last = torch.tensor([classes - 1, classes - 2, classes * 2 // 3 + 1])
        assert_follows_definition(case.with_tensors(target=last))


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
def test_nearly_equal_distributions_whose_first_vectors_mislead(classes: int, below: float) -> None:
    """Where they say that q and p are far apart, all of the divergence is in what cancels."""
    result = assert_follows_definition(nearly_equal(classes, torch.float32, below))
    assert (result.kl < (1e-5 if below > 1 else 1e-1)).all()


@every_depth
def test_nearly_equal_distributions_whose_first_vectors_mislead_in_float64(below: float) -> None:
    case = nearly_equal(60, torch.float64, below)
    result = evaluate(case)
    # The definition has but 9 digits of such a divergence.
    losses, grads = exact_distillation(case)
    assert_accurate(result.loss, losses, "loss")
    assert_accurate(result.grads["logits"], grads, "gradient")


def sure_of_late_classes(
    rows: int, classes: int, dtype: torch.dtype, spread: float, sureness: float
) -> Case:
    """A case of the divergence alone: p and q of a row are largest at the same late class."""
    sure = torch.linspace(classes // 2, classes - 1, rows).long()
    moved = {}
    for name in ("logits", "teacher_logits"):
        moved[name] = spread * torch.randn(rows, classes, dtype=torch.float64)
        moved[name][torch.arange(rows), sure] += 0.5 * (sureness + math.log(classes))
    return distillation_case(
        rows, classes, dtype, reduction="none", temperature=0.5, ce_weight=0.0, kl_weight=1.0
    ).with_tensors(**{name: tensor.to(dtype) for name, tensor in moved.items()})


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES], ids=str)
@pytest.mark.parametrize("classes", [60, 250, 2500, OF_PARTS])
@pytest.mark.parametrize(("spread", "sureness"), [(0.01, 10.0), (0.7, 10.0), (0.15, 5.0)])
def test_rows_sure_of_a_class_that_comes_late(
    dtype: torch.dtype, classes: int, spread: float, sureness: float
) -> None:
    """What the first vectors say of q and p is coarse beside what is left of them there."""
    rows = 2 if classes == OF_PARTS else 100
    case = sure_of_late_classes(rows, classes, dtype, spread, sureness)
    result, expected = evaluate(case), defined(case)
    assert_accurate(result.loss, expected.loss, "loss")
    assert_rows_accurate(result.grads["logits"], expected.grads["logits"], "gradient")


def test_rows_sure_of_a_class_that_comes_first() -> None:
    """There Q and P are 1 and a little, of which a quotient of floats would have lost the most."""
    logits, teacher = 0.02 * torch.rand(2, 64, 19, dtype=torch.float64)
    logits[:, 0] += 60
    teacher[:, 0] += 60
    case = distillation_case(
        64, 19, reduction="none", temperature=4.0, ce_weight=0.0, kl_weight=1.0
    ).with_tensors(logits=logits.float(), teacher_logits=teacher.float())
    result, expected = evaluate(case), defined(case)
    assert_accurate(result.loss, expected.loss, "loss")
    assert_rows_accurate(result.grads["logits"], expected.grads["logits"], "gradient")


def test_rows_sure_of_a_class_that_comes_late_in_float64() -> None:
    case = sure_of_late_classes(12, 60, torch.float64, 0.01, 10.0)
    result = evaluate(case)
    losses, grads = exact_distillation(case)
    assert_accurate(result.loss, losses, "loss")
    assert_rows_accurate(result.grads["logits"], grads, "gradient")


@every_dtype
@every_misleading
def test_parts_of_a_row(
    dtype: torch.dtype, mislead: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> None:
    """With two thirds of the classes, whole parts go astray."""
    case = misled(distillation_case(2, OF_PARTS, dtype, reduction="none"), mislead)
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


def test_parts_of_statistics() -> None:
    assert_follows_definition(similarity_case(2, OF_PARTS, torch.bfloat16, reduction="none"))


def test_parts_between_which_distributions_hardly_differ() -> None:
    """A part's share of q is almost its share of p: what parts bring must not cancel."""
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


@pytest.mark.parametrize("stats_dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_where_statistics_begin(stats_dtype: torch.dtype) -> None:
    case = similarity_case(3, 37, stats_dtype=stats_dtype, reduction="none")
    expected = evaluate(case)
    for shift in range(4):
        moved = case.with_tensors(
            **{
                name: somewhere_else(case[name], shift, 3)
                for name in ("logits", "dots", "sq_norms")
            }
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


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", ["logits", "dots", "sq_norms"])
@pytest.mark.parametrize("explained", [None, 3])
def test_similarity_of_far_rows_and_classes(name: str, dim: int, explained: int | None) -> None:
    case = similarity_case(
        3,
        3,
        torch.bfloat16,
        stats_dtype=torch.bfloat16,
        explained=explained,
        label_mode="split",
        reduction="none",
    )
    assert_follows_definition(case.with_tensors(**{name: far_apart(case[name], dim)}))


def test_far_class_weights() -> None:
    case = distillation_case(
        5, 3, torch.bfloat16, class_weights=True, label_smoothing=0.1, reduction="none"
    )
    assert_follows_definition(case.with_keywords(weight=far_apart(case["weight"], 0)))
