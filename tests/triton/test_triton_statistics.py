"""Explanation statistics in Triton, in its interpreter, against the definition in float64."""

from __future__ import annotations

import inspect
import itertools
import math
import mmap
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.cases import random_class_index, random_target
from helpers.tolerance import assert_accurate
from torch import Tensor

from introkernels import checks, reference
from introkernels.ops.triton import launch, statistics_config
from introkernels.ops.triton.kernels.statistics import NOT_SPECIALIZED
from introkernels.ops.triton.statistics import explanation_stats
from introkernels.ops.triton.statistics_config import share

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
IGNORED = -100
NAN = float("nan")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_center = pytest.mark.parametrize("center", [False, True])


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of 64 bytes and tiles of a few classes, so that small tensors have many of both."""
    for name, value in {
        "SLICE_BYTES": 64,
        "CENTERED_SLICE_BYTES": 64,
        "LINE_BYTES": 32,
        "TILE_BYTES": 512,
        "CENTERED_BYTES_IN_ONE_TILE": 256,
        "CENTERED_TILE_BYTES": 256,
        "CENTERED_TILE": 32,
        "CENTERED_IN_ONE_TILE": 4,
        "TILES_OF_A_GROUP": 1,
        "MAX_BLOCK_SUMS": 8,
        "SUMS_OF_A_THREAD": 1,
    }.items():
        assert hasattr(statistics_config, name)
        monkeypatch.setattr(statistics_config, name, value)


def random_case(
    rows: int, classes: int, shape: tuple[int, ...], dtype: torch.dtype, ignored: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients, inputs and target, one row of several ignored."""
    gradients = torch.randn(rows, classes, *shape, dtype=torch.float64).to(dtype)
    inputs = torch.randn(rows, *shape, dtype=torch.float64).to(dtype)
    return gradients, inputs, random_target(rows, classes, ignored if rows > 1 else 0)


def assert_follows_definition(
    gradients: Tensor,
    inputs: Tensor,
    target: Tensor,
    class_index: Tensor | None = None,
    center: bool = False,
    ignore_index: int = IGNORED,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Hold the statistics against the definition's."""
    arguments = (gradients, inputs, target, class_index, center, ignore_index)
    stats = explanation_stats(*arguments)
    expected = reference.explanation_stats(
        gradients.double(),
        inputs.double(),
        target,
        center=center,
        class_index=class_index,
        ignore_index=ignore_index,
    )
    wide = torch.float64 if gradients.dtype == torch.float64 else torch.float32
    for name, actual in zip(("dots", "sq_norms"), stats, strict=True):
        assert actual.dtype == wide
        assert actual.is_contiguous()
        assert_accurate(actual, getattr(expected, name), name, factor=factor)
    return stats


@every_dtype
@every_center
def test_sizes_around_the_boundaries_of_slices(dtype: torch.dtype, center: bool) -> None:
    slice_ = 2048 // dtype.itemsize
    for size in (1, 17, slice_ - 1, slice_, slice_ + 1, 2 * slice_ + 8):
        gradients, inputs, target = random_case(2, 5, (size,), dtype)
        assert share(gradients, inputs, center).num_slices == math.ceil(size / slice_) or size % 8
        assert_follows_definition(gradients, inputs, target, center=center)


@every_dtype
@every_center
def test_small_slices_and_tiles(small: None, dtype: torch.dtype, center: bool) -> None:
    slice_ = 64 // dtype.itemsize
    for size, classes in ((slice_ + 1, 3), (3 * slice_, 9), (3 * slice_ - 1, 17)):
        gradients, inputs, target = random_case(2, classes, (size,), dtype)
        work = share(gradients, inputs, center)
        assert work.num_slices > 1
        assert work.shape.one_tile == (center and classes == 3)
        assert work.num_groups > 1 or center or classes == 3
        assert_follows_definition(gradients, inputs, target, center=center)


@every_dtype
@every_center
def test_repeats_are_equal_bit_for_bit(small: None, dtype: torch.dtype, center: bool) -> None:
    gradients, inputs, target = random_case(2, 9, (40,), dtype)
    first, second = (
        torch.stack(explanation_stats(gradients, inputs, target, None, center, IGNORED))
        for _ in range(2)
    )
    assert torch.equal(first.view(torch.uint8), second.view(torch.uint8))


@every_center
def test_numbers_of_classes_around_the_boundaries_of_tiles(center: bool) -> None:
    for classes in (1, 2, 3, 5, 12, 13, 16, 17, 33, 65, 130):
        # A single class centred is its own mean: nothing is left of it.
        gradients, inputs, target = random_case(3, classes, (24,), torch.float32)
        if center and classes == 1:
            dots, sq_norms = explanation_stats(gradients, inputs, target, None, True, IGNORED)
            assert not dots.any()
            assert not sq_norms.any()
        else:
            assert_follows_definition(gradients, inputs, target, center=center)


@every_center
def test_classes_in_groups(center: bool) -> None:
    """Few rows of many classes are shared out by classes too, without tickets for one slice."""
    gradients, inputs, target = random_case(2, 70, (520,), torch.float32)
    work = share(gradients, inputs, center)
    assert (work.num_groups == 1) == center
    assert_follows_definition(gradients, inputs, target, center=center)
    one_slice = gradients[..., :512].contiguous(), inputs[..., :512].contiguous()
    work = share(*one_slice, center)
    assert work.shape.one_slice == (not center)
    assert (work.num_groups == 1) == center
    assert_follows_definition(*one_slice, target, center=center)


def test_rows_do_not_change_the_compiled_kernel() -> None:
    """However many rows, groups or not: the same compile-time constants."""
    numbers_of_rows = (1, 2, 33, 1000)
    seen = []
    for rows in numbers_of_rows:
        gradients = torch.empty(rows, 200, 40, 64, device="meta")
        inputs = torch.empty(rows, 40, 64, device="meta")
        recorded: list[launch.Launch] = []
        with launch.recording(recorded.append):
            dots, _ = explanation_stats(
                gradients, inputs, torch.empty(rows, dtype=torch.int64, device="meta"), None,
                False, IGNORED,
            )  # fmt: skip
        assert dots.shape == (rows, 200)
        (only,) = recorded
        seen.append(only)
        assert only.grid == (share(gradients, inputs, False).num_programs,)
    groups = [only.grid[0] / rows for only, rows in zip(seen, numbers_of_rows, strict=True)]
    assert groups[0] > groups[-1]
    assert all(only.options == seen[0].options for only in seen)
    # What follows from the rows is not compiled in.
    names = list(inspect.signature(seen[0].kernel.fn).parameters)
    for position, name in enumerate(names[: len(seen[0].arguments)]):
        values = {repr(only.arguments[position]) for only in seen}
        is_tensor = isinstance(seen[0].arguments[position], Tensor)
        assert is_tensor or len(values) == 1 or name in NOT_SPECIALIZED


def test_dtypes_mixed() -> None:
    for first, second in itertools.product(DTYPES[1:], DTYPES[1:]):
        gradients, inputs, target = random_case(2, 5, (72,), first)
        assert_follows_definition(gradients, inputs.to(torch.float32).to(second), target)


@every_dtype
@every_center
@pytest.mark.parametrize("explained", [1, 3, 18])
def test_class_index(dtype: torch.dtype, center: bool, explained: int) -> None:
    gradients, inputs, target = random_case(4, explained, (3, 5), dtype)
    target = random_target(4, 40, 1)
    index = random_class_index(target, 40, explained)
    if center and explained == 1:
        return
    assert_follows_definition(gradients, inputs, target, index, center=center)
    # Of any strides, and named by numbers of more than 32 bits.
    far = torch.where(target == IGNORED, target, target + (1 << 40))
    spread = (index + (1 << 40)).repeat_interleave(2, 1).t().contiguous().t()[:, ::2]
    assert_follows_definition(gradients, inputs, far.repeat_interleave(3)[::3], spread)


def test_target_late_among_many_classes(small: None) -> None:
    """Positions are looked for in blocks of 256 classes."""
    gradients, inputs, _ = random_case(3, 520, (4,), torch.float32)
    index = torch.stack([torch.randperm(1000)[:520] for _ in range(3)])
    target = index[torch.arange(3), torch.tensor([255, 256, 519])]
    assert_follows_definition(gradients, inputs, target, index)


def with_gaps(tensor: Tensor, *dims: int) -> Tensor:
    """The same numbers among NaN, every other one along each of ``dims``."""
    shape = [2 * size if dim in dims else size for dim, size in enumerate(tensor.shape)]
    index = tuple(slice(None, None, 2 if dim in dims else 1) for dim in range(tensor.dim()))
    wide = tensor.new_full(shape, NAN)
    wide[index] = tensor
    return wide[index]


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "channels last": ((3, 4, 8), lambda g: g.movedim(2, -1).contiguous().movedim(-1, 2)),
    "transposed image": ((3, 4, 8), lambda g: g.mT.contiguous().mT),
    "transposed classes": ((4, 8), lambda g: g.transpose(1, 3).contiguous().transpose(1, 3)),
    "gaps between columns": ((3, 4, 8), lambda g: with_gaps(g, 4)),
    "gaps between rows": ((3, 4, 8), lambda g: with_gaps(g, 3)),
    "gaps between rows and columns": ((3, 4, 5), lambda g: with_gaps(g, 3, 4)),
    "gaps everywhere": ((3, 4, 5), lambda g: with_gaps(g, 0, 1, 2, 3, 4)),
    "expanded columns": ((3, 4, 5), lambda g: g[..., :1].expand_as(g)),
    "expanded channels": ((3, 4, 8), lambda g: g[:, :, :1].expand_as(g)),
    "expanded classes": ((3, 4, 8), lambda g: g[:, :1].expand_as(g)),
    "expanded rows": ((3, 4, 8), lambda g: g[:1].expand_as(g)),
    "not aligned": ((3, 4, 8), lambda g: torch.cat([g.flatten()[:1], g.flatten()])[1:].view_as(g)),
    "no dimension": ((), lambda g: g),
    "empty": ((3, 0, 5), lambda g: g),
}


@every_center
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, center: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, arrange = LAYOUTS[layout]
    monkeypatch.setattr(statistics_config, "SLICE_BYTES", 256)
    if center and layout == "expanded classes":
        return  # they have nothing left to compare once their mean is gone
    gradients, inputs, target = random_case(2, 6, shape, torch.float32, ignored=0)
    version = gradients._version
    assert_follows_definition(arrange(gradients), inputs, target, center=center)
    arranged_inputs = arrange(inputs.unsqueeze(1).expand(gradients.shape)).select(1, 0)
    assert_follows_definition(gradients, arranged_inputs, target, center=center)
    assert gradients._version == version


def test_gradients_are_never_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[launch.Launch] = []
    for shape, arrange in LAYOUTS.values():
        gradients, inputs, target = random_case(3, 6, shape, torch.float32)
        gradients = arrange(gradients)
        with launch.recording(recorded.append):
            explanation_stats(gradients, inputs, target, None, False, IGNORED)
        assert recorded[-1].arguments[0] is gradients


@pytest.mark.parametrize("where", ["row", "class", "inner", "slice"])
def test_offsets_of_more_than_32_bits(where: str) -> None:
    """Elements more than 2^31 apart, in pages of which few are ever touched."""
    shape, strides = {
        "row": ((2, 3, 4, 8), ((1 << 31) + 8, 64, 8, 1)),
        "class": ((2, 3, 4, 8), (32, (1 << 30) + 64, 8, 1)),
        "inner": ((2, 3, 5, 8), (8, 16, 1 << 29, 1)),
        # A single dimension, of which even a slice needs 64 bits.
        "slice": ((2, 3, 20), (1, 2, 1 << 27)),
    }[where]
    length = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    assert length > 1 << 31
    pages = mmap.mmap(-1, 2 * length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    storage = torch.frombuffer(pages, dtype=torch.bfloat16)
    gradients = storage.as_strided(shape, strides)
    numbers, inputs, target = random_case(2, 3, shape[2:], torch.bfloat16, ignored=0)
    gradients.copy_(numbers)
    wide = share(gradients, inputs, False).shape.wide
    assert wide == (where in ("inner", "slice"))
    for center in (False, True):
        assert_follows_definition(gradients, inputs, target, center=center)


@every_center
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_ignored_rows_are_zero_whatever_they_hold(center: bool, value: float, small: None) -> None:
    for size in (8, 40):
        gradients, inputs, _ = random_case(5, 6, (size,), torch.float32)
        target = random_target(5, 30)
        index = random_class_index(target, 30, 6)
        target[[1, 3]] = 10**12
        index[1], index[3] = 10**12, -(10**12)
        gradients[1], inputs[3] = value, value
        dots, sq_norms = assert_follows_definition(
            gradients, inputs, target, index, center, ignore_index=10**12
        )
        assert not dots[[1, 3]].any()
        assert not sq_norms[[1, 3]].any()


def test_ignored_rows_are_not_read(small: None) -> None:
    """Their strides may lead anywhere: a row 2^60 elements away would be no memory of ours."""
    gradients, inputs, _ = random_case(1, 3, (40,), torch.float32)
    far = torch.as_strided(gradients, (2, 3, 40), (0, 40, 1))
    work = share(far, inputs.expand(2, 40), False)
    target = torch.tensor([1, IGNORED])
    dots = torch.empty(2, 3)
    sq_norms = torch.empty(2, 3)
    recorded: list[launch.Launch] = []
    with launch.recording(recorded.append):
        explanation_stats(far, inputs.expand(2, 40), target, None, False, IGNORED)
    (only,) = recorded
    arguments = list(work.arguments(target, None, dots, sq_norms, IGNORED, ticket=True))
    arguments[list(inspect.signature(only.kernel.fn).parameters).index("row_stride")] = 1 << 50
    launch.launch(only.kernel, only.grid, *arguments, **only.options)
    assert not dots[1].any()
    assert not sq_norms[1].any()
    expected = explanation_stats(gradients, inputs, target[:1], None, False, IGNORED)
    assert torch.equal(dots[:1], expected[0])
    assert torch.equal(sq_norms[:1], expected[1])


@every_center
@pytest.mark.parametrize("indexed", [False, True])
def test_unknown_target_gives_nan_and_reads_nothing_else(
    center: bool, indexed: bool, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "values_are_readable", lambda tensor: False)
    for size in (8, 40):
        gradients, inputs, _ = random_case(6, 5, (size,), torch.float32)
        # The far ones lie outside of this process's memory.
        target = torch.tensor([5, -1, 1 << 40, -(1 << 40), 4, IGNORED])
        index = torch.arange(5).repeat(6, 1) if indexed else None
        among_nan = with_gaps(gradients, 0, 1)
        stats = explanation_stats(among_nan, inputs, target, index, center, IGNORED)
        expected = reference.explanation_stats(
            gradients.double(), inputs.double(), target, center=center, class_index=index
        )
        assert expected.dots[:4].isnan().all()
        assert_accurate(stats[0], expected.dots, "dots")
        assert_accurate(stats[1], expected.sq_norms, "sq_norms")


def test_checks_on_the_host() -> None:
    gradients, inputs, _ = random_case(2, 3, (4,), torch.float32)
    with pytest.raises(IndexError, match=r"target\[1\] is 3, outside \[0, 3\)"):
        explanation_stats(gradients, inputs, torch.tensor([0, 3]), None, False, IGNORED)
    index = torch.tensor([[5, 7, 9], [1, 2, 3]])
    with pytest.raises(ValueError, match=r"class_index\[1\] must hold the row's target 9"):
        explanation_stats(gradients, inputs, torch.tensor([5, 9]), index, False, IGNORED)
    with pytest.raises(IndexError, match=r"target\[0\] is -1"):
        explanation_stats(gradients, inputs, torch.tensor([-1, 9]), index, False, IGNORED)


@every_center
@pytest.mark.parametrize("where", ["gradients", "inputs"])
def test_nan_stays_in_its_row(center: bool, where: str, small: None) -> None:
    case = dict(zip(("gradients", "inputs"), random_case(4, 6, (40,), torch.float32), strict=False))
    target = random_target(4, 6)
    clean = explanation_stats(*case.values(), target, None, center, IGNORED)
    case[where][2, ..., 3] = NAN
    spoiled = explanation_stats(*case.values(), target, None, center, IGNORED)
    for statistic, expected in zip(spoiled, clean, strict=True):
        assert statistic[2].isnan().all()
        assert torch.equal(statistic[[0, 1, 3]], expected[[0, 1, 3]])


def test_nan_in_one_class_spoils_that_class_alone(small: None) -> None:
    gradients, inputs, _ = random_case(3, 6, (40,), torch.float32)
    gradients[1, 4, 7] = NAN
    dots, sq_norms = assert_follows_definition(gradients, inputs, torch.tensor([0, 0, 0]))
    assert dots.isnan().nonzero().tolist() == sq_norms.isnan().nonzero().tolist() == [[1, 4]]


@pytest.mark.parametrize(
    ("dtype", "common"), [(torch.float64, 1e5), (torch.float32, 1e3), (torch.float32, 1e6)], ids=str
)
@pytest.mark.parametrize("classes", [10, 40])
def test_center_takes_a_large_common_part_away(
    dtype: torch.dtype, common: float, classes: int
) -> None:
    gradients, inputs, target = random_case(2, classes, (65,), dtype)
    gradients = gradients + common * torch.randn(2, 1, 65, dtype=dtype)
    # Without a factor for the common part where the oracle does not round it itself: classes are
    # compared with the target's before anything is rounded.
    factor = common if dtype == torch.float64 else 1.0
    assert_follows_definition(gradients, inputs, target, center=True, factor=factor)


@every_center
@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e25, 1e30])
def test_gradient_and_input_may_be_extreme_where_their_product_is_not(
    scale: float, center: bool
) -> None:
    gradients, inputs, target = random_case(3, 4, (5,), torch.float32)
    assert_follows_definition(gradients * scale, inputs / scale, target, center=center)


def test_half_types_do_not_overflow() -> None:
    gradients = torch.full((2, 3, 100), 60000.0, dtype=torch.float16)
    inputs = torch.full((2, 100), -60000.0, dtype=torch.float16)
    assert_follows_definition(gradients, inputs, torch.tensor([0, 2]))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3, 4)], ids=str)
@every_center
def test_degenerate_shapes(shape: tuple[int, ...], center: bool) -> None:
    gradients, inputs, target = random_case(3, 5, shape, torch.float32)
    dots, _ = assert_follows_definition(gradients, inputs, target, center=center)
    assert dots.shape == (3, 5)
    for rows, classes in ((0, 5), (3, 0)):
        none = torch.full((rows,), IGNORED)
        stats = explanation_stats(
            gradients[:rows, :classes], inputs[:rows], none, None, center, IGNORED
        )
        assert all(statistic.shape == (rows, classes) for statistic in stats)
