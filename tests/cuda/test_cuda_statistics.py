"""Explanation statistics around every boundary of the CUDA kernels, against the definition.

A slice of a row is 1 KiB of gradients loaded by 16 bytes, or 128 numbers loaded one by one. Few
rows are cut into segments of slices, added in order, and without centring into groups of classes.
See csrc/cuda/statistics_slice.h and csrc/cuda/statistics.cu.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import emulated_backend
from helpers.cases import (
    introspective_case,
    random_class_index,
    random_explanations,
    random_target,
)
from helpers.far import far_apart
from helpers.oracle import assert_follows_definition
from helpers.tolerance import assert_accurate, assert_within
from torch import Tensor

import introkernels as ik
from introkernels import teachers
from introkernels.options import Options

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
IGNORED = -100
NAN = float("nan")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_center = pytest.mark.parametrize("center", [False, True])


def random_case(
    rows: int, classes: int, shape: tuple[int, ...], dtype: torch.dtype, ignored: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients, inputs and target."""
    gradients, inputs = random_explanations(rows, classes, shape, dtype, dtype)
    return gradients, inputs, random_target(rows, classes, ignored)


def assert_statistics_follow_definition(
    gradients: Tensor,
    inputs: Tensor,
    target: Tensor,
    *,
    center: bool = False,
    class_index: Tensor | None = None,
) -> ik.ExplanationStats:
    """Hold the statistics against the definition's in float64; returns what the kernels gave."""
    stats = ik.explanation_stats(gradients, inputs, target, center=center, class_index=class_index)
    expected = ik.reference.explanation_stats(
        gradients.double(), inputs.double(), target, center=center, class_index=class_index
    )
    assert_accurate(stats.dots, expected.dots, "dots")
    assert_accurate(stats.sq_norms, expected.sq_norms, "sq_norms")
    return stats


@every_dtype
@every_center
def test_sizes_around_slices(dtype: torch.dtype, center: bool) -> None:
    whole, of_load = 1024 // dtype.itemsize, 16 // dtype.itemsize
    by_vectors = (of_load, whole - of_load, whole, whole + of_load, 2 * whole)
    one_by_one = (1, 31, 33, 127, 129, whole - 1, whole + 1, 257)
    for size in (*by_vectors, *one_by_one):
        assert_statistics_follow_definition(
            *random_case(2, 5, (size,), dtype, ignored=1), center=center
        )


@every_center
def test_class_counts(center: bool) -> None:
    """A warp has four classes at a time, a block 32."""
    for classes in (1, 2, 3, 4, 5, 31, 32, 33, 35, 36, 37, 63, 65):
        # A single class centred is its own mean: rounding is all that could be left of it.
        if center and classes == 1:
            continue
        # With 40 rows, no row has more than one block.
        for rows in (3, 40):
            assert_statistics_follow_definition(
                *random_case(rows, classes, (24,), torch.float32), center=center
            )


@every_dtype
@every_center
@pytest.mark.parametrize("gap", [0, 1])
def test_segments(dtype: torch.dtype, center: bool, gap: int) -> None:
    """Slices that several blocks of a row have; the last of them may have fewer."""
    whole = 1024 // dtype.itemsize if gap == 0 else 128
    for rows, classes, slices in ((1, 33, 5), (1, 40, 1), (2, 5, 13), (3, 37, 14), (2, 100, 3)):
        # One number more, and nothing lies at whole vectors.
        gradients, inputs, target = random_case(rows, classes, (slices * whole + gap,), dtype)
        stats = assert_statistics_follow_definition(gradients, inputs, target, center=center)
        again = ik.explanation_stats(gradients, inputs, target, center=center)
        assert torch.equal(stats.dots, again.dots)
        assert torch.equal(stats.sq_norms, again.sq_norms)


@every_center
def test_groups_of_classes(center: bool) -> None:
    # One slice: each block writes its own classes. Then groups beside segments.
    for rows, classes, size in (
        (1, 100, 8),
        (1, 250, 8),
        (2, 129, 20),
        (1, 300, 700),
        (1, 70, 513),
    ):
        assert_statistics_follow_definition(
            *random_case(rows, classes, (size,), torch.float32), center=center
        )


@every_dtype
@every_center
@pytest.mark.parametrize("classes", [1024, 1025, 1060])
def test_more_classes_than_shared_memory_has_sums_for(
    dtype: torch.dtype, center: bool, classes: int
) -> None:
    for rows, size in ((1, 3), (2, 1 + 2048 // dtype.itemsize)):
        assert_statistics_follow_definition(
            *random_case(rows, classes, (size,), dtype), center=center
        )


def test_more_classes_than_a_group_has_where_rows_are_many() -> None:
    assert_statistics_follow_definition(*random_case(33, 1030, (3,), torch.float32, ignored=3))


@every_center
def test_dtypes_mixed(center: bool) -> None:
    for dtype in DTYPES[1:]:
        for inputs_dtype in DTYPES[1:]:
            for size in (31, 264):
                gradients, inputs, target = random_case(2, 5, (size,), dtype)
                assert_statistics_follow_definition(
                    gradients, inputs.to(inputs_dtype), target, center=center
                )


@every_dtype
@every_center
def test_class_index(dtype: torch.dtype, center: bool) -> None:
    for rows, explained, size in ((4, 3, 15), (1, 64, 700), (2, 300, 9), (1, 1030, 3)):
        gradients, inputs, _ = random_case(rows, explained, (size,), dtype)
        target = random_target(rows, 2000, ignored=rows // 4)
        index = random_class_index(target, 2000, explained)
        assert_statistics_follow_definition(
            gradients, inputs, target, class_index=index, center=center
        )
        # Of any strides, and named by numbers of more than 32 bits.
        far = torch.where(target == IGNORED, target, target + (1 << 40))
        spread = (index + (1 << 40)).repeat_interleave(2, 1).t().contiguous().t()[:, ::2]
        assert_statistics_follow_definition(
            gradients, inputs, far.repeat_interleave(3)[::3], class_index=spread, center=center
        )


def test_target_late_among_many_classes() -> None:
    """The threads of a block look for it, 256 classes at a time."""
    gradients, inputs, _ = random_case(4, 520, (4,), torch.float32)
    index = torch.stack([torch.randperm(1000)[:520] for _ in range(4)])
    target = index[torch.arange(4), torch.tensor([0, 255, 256, 519])]
    assert_statistics_follow_definition(gradients, inputs, target, class_index=index)


@every_center
@pytest.mark.parametrize("value", [NAN, torch.inf])
def test_ignored_rows_are_zero_whatever_they_hold(value: float, center: bool) -> None:
    """One block, then segments, groups of classes, and sums in global memory."""
    for classes, size in ((5, 24), (40, 1300), (100, 8), (1030, 300)):
        gradients, inputs, target = random_case(3, classes, (size,), torch.float32)
        target[1] = IGNORED
        gradients[1], inputs[1] = value, value
        stats = assert_statistics_follow_definition(gradients, inputs, target, center=center)
        assert not stats.dots[1].any()
        assert not stats.sq_norms[1].any()


@every_dtype
def test_nan_stays_in_its_class(dtype: torch.dtype) -> None:
    """Lanes beyond the last class hold copies of it, places beyond the last dimension zeros."""
    for classes, size in ((5, 24), (6, 129), (33, 520)):
        gradients, inputs, _ = random_case(2, classes, (size,), dtype)
        gradients[0, classes - 1, size - 1] = NAN
        target = torch.zeros(2, dtype=torch.int64)
        dots, sq_norms, _ = assert_statistics_follow_definition(gradients, inputs, target)
        assert dots.isnan().nonzero().tolist() == [[0, classes - 1]]
        assert sq_norms.isnan().nonzero().tolist() == [[0, classes - 1]]


def with_gaps(tensor: Tensor, *dims: int) -> Tensor:
    """The same numbers among NaN, every other one along each of ``dims``."""
    shape = [2 * size if dim in dims else size for dim, size in enumerate(tensor.shape)]
    index = tuple(slice(None, None, 2 if dim in dims else 1) for dim in range(tensor.dim()))
    wide = tensor.new_full(shape, NAN)
    wide[index] = tensor
    return wide[index]


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "channels last": ((3, 7, 8), lambda g: g.movedim(2, -1).contiguous().movedim(-1, 2)),
    "channels last 3d": ((3, 2, 7, 8), lambda g: g.movedim(2, -1).contiguous().movedim(-1, 2)),
    "transposed image": ((3, 7, 8), lambda g: g.mT.contiguous().mT),
    "classes innermost": ((7, 40), lambda g: g.movedim(1, -1).contiguous().movedim(-1, 1)),
    "rows innermost": ((7, 40), lambda g: g.movedim(0, -1).contiguous().movedim(-1, 0)),
    "gaps between columns": ((3, 7, 8), lambda g: with_gaps(g, 4)),
    "gaps between rows and columns": ((3, 7, 9), lambda g: with_gaps(g, 3, 4)),
    "gaps between classes": ((3, 7, 8), lambda g: with_gaps(g, 1)),
    "gaps everywhere": ((3, 7, 9), lambda g: with_gaps(g, 0, 1, 2, 3, 4)),
    "classes a word apart": ((264,), lambda g: with_gaps(g, 2)[..., :263]),
    "expanded columns": ((3, 7, 8), lambda g: g[..., :1].expand_as(g)),
    "expanded channels": ((3, 7, 8), lambda g: g[:, :, :1].expand_as(g)),
    "expanded rows": ((3, 7, 8), lambda g: g[:1].expand_as(g)),
    "sliced columns": ((3, 7, 9), lambda g: g[..., 1:]),
    "sliced channels": ((4, 8, 8), lambda g: g[:, :, 1:]),
    "all in one": ((), lambda g: g),
}


@every_dtype
@every_center
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, center: bool, dtype: torch.dtype) -> None:
    shape, arrange = LAYOUTS[layout]
    gradients, inputs, target = random_case(2, 6, shape, dtype)
    arranged = arrange(gradients)
    # The inputs in that order too, beside gradients that lie as usual.
    arranged_inputs = arrange(inputs.unsqueeze(1).expand(gradients.shape)).select(1, 0)
    inputs = arranged_inputs.contiguous()
    assert_statistics_follow_definition(arranged, inputs, target, center=center)
    assert_statistics_follow_definition(
        arranged.contiguous(), arranged_inputs, target, center=center
    )


@every_dtype
@every_center
def test_gradients_at_any_address(dtype: torch.dtype, center: bool) -> None:
    for size in (24, 264):
        gradients, inputs, target = random_case(2, 5, (size,), dtype)
        for shift in range(9):
            moved = torch.cat([gradients.flatten()[:shift], gradients.flatten()])[shift:]
            moved_inputs = torch.cat([inputs.flatten()[:shift], inputs.flatten()])[shift:]
            assert_statistics_follow_definition(
                moved.view_as(gradients), moved_inputs.view_as(inputs), target, center=center
            )


def test_expanded_classes_have_the_same_statistics() -> None:
    gradients, inputs, target = random_case(2, 6, (264,), torch.float32)
    dots, sq_norms, _ = assert_statistics_follow_definition(
        gradients[:, :1].expand_as(gradients), inputs, target
    )
    assert torch.equal(dots, dots[:, :1].expand_as(dots))
    assert torch.equal(dots, sq_norms)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("shape", [(3, 3, 3), (3, 3, 3, 16)], ids=str)
def test_far_gradients(shape: tuple[int, ...], dim: int) -> None:
    gradients, inputs = random_explanations(3, 3, shape[2:], torch.bfloat16, torch.bfloat16)
    target = torch.tensor([2, 0, 1])
    assert_statistics_follow_definition(far_apart(gradients, dim), inputs, target)


@pytest.mark.parametrize("dim", [0, 1])
def test_far_inputs(dim: int) -> None:
    gradients, inputs = random_explanations(3, 3, (3, 16), torch.bfloat16, torch.bfloat16)
    assert_statistics_follow_definition(gradients, far_apart(inputs, dim), torch.tensor([2, 0, 1]))


@every_dtype
@every_center
def test_the_fused_loss_of_several_blocks_a_row(dtype: torch.dtype, center: bool) -> None:
    """The last block of a row, whichever it is, has the statistics of all of them."""
    for rows, classes, size in ((1, 40, 1500), (3, 100, 24), (2, 1030, 9), (40, 7, 33)):
        assert_follows_definition(
            introspective_case(
                rows,
                classes,
                dtype,
                shape=(size,),
                center=center,
                ignored=rows // 3,
                reduction="none",
            )
        )


@every_dtype
@pytest.mark.parametrize("similarity", [0, 1])
@pytest.mark.parametrize("tau", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("explained", [None, 30])
def test_teacher_logits_of_the_fused_loss(
    dtype: torch.dtype, similarity: int, tau: float, explained: int | None
) -> None:
    """They have the digits of their type, counted from the statistics that they are made of."""
    rows, classes = 5, 70
    case = introspective_case(rows, classes, dtype, shape=(33,), explained=explained, ignored=1)
    options = Options(
        4.0, 0.5, 0.5, 0.0, IGNORED, 0, similarity_temperature=tau, similarity=similarity
    )
    index, target = case.keywords["class_index"], case["target"]
    operators = getattr(torch.ops, emulated_backend.NAMESPACE)
    *_, made = operators.introspective_forward(
        case["logits"],
        target,
        case["gradients"],
        case["inputs"],
        index,
        None,
        options.floats,
        options.ints,
    )
    dots, sq_norms = operators.explanation_stats(
        case["gradients"], case["inputs"], target, index, False, IGNORED
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert made.dtype == dots.dtype == wide
    stats = ik.ExplanationStats(dots.double(), sq_norms.double(), index)
    expected = teachers.of_stats(stats, target, classes, options)
    live = target != IGNORED
    bound = 4 * torch.finfo(wide).eps * (1 / tau + expected[live].abs())
    assert_within(made[live], expected[live], bound.nan_to_num(posinf=0.0), "teacher logits")
    assert not made[~live].any()
