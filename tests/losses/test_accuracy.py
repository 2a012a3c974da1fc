"""Every loss, dtype, option and size against the definition in float64, within the tolerances."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.backends import sized
from helpers.cases import (
    BUILDERS,
    HEADS,
    WITH_LABELS,
    Case,
    distillation_case,
    introspective_case,
    linear_case,
    similarity_case,
)
from helpers.oracle import assert_follows_definition

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF_TYPES = (torch.bfloat16, torch.float16)
REDUCTIONS = ("mean", "sum", "none")
# Each dtype and each reduction once, where the product of the two would add nothing.
DTYPES_WITH_REDUCTIONS = (
    (torch.float64, "none"),
    (torch.float32, "mean"),
    (torch.bfloat16, "sum"),
    (torch.float16, "mean"),
)

# Around the widths of vectors (8 doubles, 16 floats, 32 halves) and of register tiles.
CLASS_COUNTS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 100, 257, 1000)
EXPLANATION_SIZES = (1, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 784, 1025, 4099)

every_loss = pytest.mark.parametrize("loss", BUILDERS)
every_loss_with_labels = pytest.mark.parametrize("loss", WITH_LABELS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


@every_loss
@every_dtype
@every_reduction
def test_dtypes_and_reductions(backend: str, loss: str, dtype: torch.dtype, reduction: str) -> None:
    assert_follows_definition(
        BUILDERS[loss](
            33,
            100,
            dtype,
            ignored=3,
            class_weights=True,
            label_smoothing=0.1,
            reduction=reduction,
        )
    )


@every_loss
@every_dtype
def test_class_counts(backend: str, loss: str, dtype: torch.dtype) -> None:
    for rows, classes in zip(itertools.cycle((5, 1, 3, 2)), CLASS_COUNTS, strict=False):
        assert_follows_definition(BUILDERS[loss](rows, classes, dtype, reduction="none"))


@every_loss
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 33, 64, 257])
def test_row_counts(backend: str, loss: str, rows: int) -> None:
    for reduction in REDUCTIONS:
        assert_follows_definition(
            BUILDERS[loss](rows, 10, torch.float32, ignored=rows // 4, reduction=reduction)
        )


@every_dtype
@pytest.mark.parametrize("center", [False, True])
def test_explanation_sizes(backend: str, dtype: torch.dtype, center: bool) -> None:
    for size in EXPLANATION_SIZES:
        assert_follows_definition(
            introspective_case(3, 7, dtype, shape=(size,), center=center, temperature=2.0)
        )
        assert_follows_definition(
            linear_case(3, 7, dtype, width=size, center=center, temperature=2.0)
        )


@every_dtype
def test_one_large_row(backend: str, dtype: torch.dtype) -> None:
    # Few rows with many classes and long explanations are what is split over threads.
    assert_follows_definition(introspective_case(1, 257, dtype, shape=(1025,)))
    assert_follows_definition(linear_case(1, 257, dtype, width=1025))
    assert_follows_definition(similarity_case(2, sized(40_001, 4_501), dtype))
    assert_follows_definition(distillation_case(2, sized(40_001, 4_501), dtype))


@every_dtype
def test_parts_of_a_row_may_lie_far_apart(backend: str, dtype: torch.dtype) -> None:
    # Parts of a row are summed up relative to the largest logits of each. These rise or fall from
    # part to part, and there are parts without a class or without a soft label.
    classes = sized(20_001, 4_501)
    case = distillation_case(
        4, classes, dtype, class_weights=True, label_smoothing=0.1, reduction="none"
    )
    rise = torch.linspace(0, 90, classes)
    offsets = torch.stack([rise, rise.flip(0), rise.flip(0), torch.zeros(classes)])
    logits = case["logits"] + offsets.to(dtype)
    teacher = case["teacher_logits"] + offsets[[0, 1, 0, 3]].to(dtype)
    logits[3, : classes // 3] = -torch.inf
    teacher[3, 2 * classes // 3 :] = -torch.inf
    target = torch.tensor([classes - 1, 0, classes // 2, classes - 2])
    assert_follows_definition(
        case.with_tensors(logits=logits, teacher_logits=teacher, target=target)
    )


@every_dtype
def test_many_rows_of_a_head(backend: str, dtype: torch.dtype) -> None:
    # More rows than a chunk of a head holds.
    assert_follows_definition(linear_case(700, 33, dtype, width=15, ignored=50))


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (3, 5, 7), (2, 3, 2, 3), (0,)], ids=str)
@every_dtype
def test_explanation_shapes(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_follows_definition(introspective_case(4, 6, dtype, shape=shape))


@every_loss_with_labels
@every_dtype
@pytest.mark.parametrize("label_mode", ["softmax", "split"])
@pytest.mark.parametrize("similarity", ["cosine", "projection"])
def test_label_options(
    backend: str, loss: str, dtype: torch.dtype, similarity: str, label_mode: str
) -> None:
    for temperature, similarity_temperature in ((1.0, 0.5), (2.0, 5.0)):
        assert_follows_definition(
            BUILDERS[loss](
                5,
                17,
                dtype,
                ignored=1,
                similarity=similarity,
                label_mode=label_mode,
                temperature=temperature,
                similarity_temperature=similarity_temperature,
                non_target_mass=0.7,
            )
        )


@pytest.mark.parametrize("non_target_mass", [0.0, 1e-6, 0.5, 1.0])
@every_loss_with_labels
def test_non_target_mass(backend: str, loss: str, non_target_mass: float) -> None:
    for classes in (1, 2, 10):
        assert_follows_definition(
            BUILDERS[loss](
                4, classes, torch.float32, label_mode="split", non_target_mass=non_target_mass
            )
        )


@every_loss
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("class_weights", [False, True])
def test_cross_entropy_options(
    backend: str, loss: str, class_weights: bool, label_smoothing: float
) -> None:
    for dtype, reduction in DTYPES_WITH_REDUCTIONS:
        assert_follows_definition(
            BUILDERS[loss](
                6,
                9,
                dtype,
                ignored=2,
                class_weights=class_weights,
                label_smoothing=label_smoothing,
                reduction=reduction,
            )
        )


@every_loss
@pytest.mark.parametrize(
    ("ce_weight", "kl_weight"), [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (2.5, 7.0)]
)
def test_weights_of_the_terms(backend: str, loss: str, ce_weight: float, kl_weight: float) -> None:
    for dtype, reduction in DTYPES_WITH_REDUCTIONS:
        case = BUILDERS[loss](
            6, 9, dtype, ce_weight=ce_weight, kl_weight=kl_weight, reduction=reduction
        )
        assert_follows_definition(case)


@every_loss
@pytest.mark.parametrize("temperature", [0.25, 1.0, 2.0, 3.0, 5.0, 20.0])
def test_temperatures(backend: str, loss: str, temperature: float) -> None:
    for dtype in DTYPES:
        assert_follows_definition(BUILDERS[loss](6, 33, dtype, temperature=temperature))


@every_loss
@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 3, 12345])
def test_ignore_index(backend: str, loss: str, ignore_index: int) -> None:
    for reduction in REDUCTIONS:
        case = BUILDERS[loss](
            8, 5, torch.float32, ignored=3, ignore_index=ignore_index, reduction=reduction
        )
        assert (case["target"] == ignore_index).any()
        assert_follows_definition(case)


@every_dtype
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("similarity", ["cosine", "projection"])
@pytest.mark.parametrize("label_mode", ["softmax", "split"])
def test_class_index(
    backend: str, dtype: torch.dtype, center: bool, similarity: str, label_mode: str
) -> None:
    for explained in (1, 2, 9, 33):
        labels = {"similarity": similarity, "label_mode": label_mode}
        if not (center and explained == 1):
            assert_follows_definition(
                introspective_case(
                    5, 33, dtype, explained=explained, ignored=1, center=center, **labels
                )
            )
        assert_follows_definition(
            similarity_case(5, 33, dtype, explained=explained, ignored=1, **labels)
        )


@pytest.mark.parametrize("half", HALF_TYPES, ids=str)
@every_reduction
def test_half_types_mixed_with_float32(backend: str, half: torch.dtype, reduction: str) -> None:
    single = torch.float32
    cases: list[Case] = [
        distillation_case(9, 33, half, teacher_dtype=single, reduction=reduction),
        distillation_case(9, 33, single, teacher_dtype=half, reduction=reduction),
        similarity_case(9, 33, half, stats_dtype=single, reduction=reduction),
        similarity_case(9, 33, single, stats_dtype=half, reduction=reduction),
        linear_case(9, 33, half, weight_dtype=single, reduction=reduction),
        linear_case(9, 33, single, weight_dtype=half, reduction=reduction),
    ]
    either = (half, single)
    cases += [
        introspective_case(
            9, 33, logits, gradients_dtype=gradients, inputs_dtype=inputs, reduction=reduction
        )
        for logits, gradients, inputs in itertools.product(either, either, either)
    ]
    for case in cases:
        assert_follows_definition(case)


def test_the_two_half_types_mixed(backend: str) -> None:
    for first, second in (HALF_TYPES, HALF_TYPES[::-1]):
        assert_follows_definition(distillation_case(9, 33, first, teacher_dtype=second))
        assert_follows_definition(linear_case(9, 33, first, weight_dtype=second))
        assert_follows_definition(
            introspective_case(9, 33, first, gradients_dtype=second, inputs_dtype=first)
        )


@every_loss
def test_class_weights_of_another_dtype(backend: str, loss: str) -> None:
    for dtype in DTYPES:
        for weight_dtype in DTYPES:
            case = BUILDERS[loss](5, 10, dtype, class_weights=True)
            name = "class_weight" if loss in HEADS else "weight"
            assert_follows_definition(case.with_keywords(**{name: case[name].to(weight_dtype)}))


def test_bias_of_another_dtype(backend: str) -> None:
    for dtype in (torch.float32, *HALF_TYPES):
        for bias_dtype in (torch.float32, *HALF_TYPES):
            case = linear_case(5, 10, dtype)
            assert_follows_definition(case.with_tensors(bias=case["bias"].to(bias_dtype)))


@every_dtype
def test_head_without_bias_and_with_more_dimensions(backend: str, dtype: torch.dtype) -> None:
    for reduction in REDUCTIONS:
        case = linear_case(24, 9, dtype, bias=False, ignored=4, reduction=reduction)
        assert_follows_definition(case)
        assert_follows_definition(
            case.with_tensors(
                features=case["features"].reshape(2, 3, 4, -1),
                target=case["target"].reshape(2, 3, 4),
            )
        )
    assert_follows_definition(
        case.with_tensors(features=case["features"][0], target=torch.tensor(3))
    )


def test_statistics_may_be_wider_than_the_logits(backend: str) -> None:
    for dtype in (torch.float32, *HALF_TYPES):
        assert_follows_definition(similarity_case(5, 10, dtype, stats_dtype=torch.float64))
