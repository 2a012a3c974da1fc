"""How strided gradients, and the inputs beside them, are presented to kernels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from introkernels.ops.triton.layout import Explanations, explanations

ROWS, CLASSES = 2, 3


def numbered(*shape: int) -> tuple[Tensor, Tensor]:
    """Gradients whose elements are all different, and inputs that number their dimensions."""
    gradients = torch.arange(ROWS * CLASSES * math.prod(shape), dtype=torch.float32)
    inputs = torch.arange(math.prod(shape), dtype=torch.float32).expand(ROWS, -1)
    return gradients.reshape(ROWS, CLASSES, *shape), inputs.reshape(ROWS, *shape)


def walked(explained: Explanations) -> tuple[Tensor, Tensor]:
    """What a kernel that follows the sizes and strides reads: ``[B, K, D]`` and ``[B, D]``."""
    vector = explained.vector
    elements = explained.gradients.as_strided(
        (ROWS, CLASSES, *explained.sizes, vector),
        (
            explained.row_stride * vector,
            explained.class_stride * vector,
            *(stride * vector for stride in explained.strides),
            1,
        ),
    )
    inputs = explained.inputs.as_strided(
        (ROWS, explained.num_dims), (explained.inputs_row_stride * vector, 1)
    )
    return elements.reshape(ROWS, CLASSES, explained.num_dims), inputs


def assert_same_pairs(gradients: Tensor, inputs: Tensor) -> Explanations:
    """Each gradient has to meet the input of its own dimension; returns the presentation."""
    explained = explanations(gradients, inputs)
    elements, numbers = walked(explained)
    order = numbers[0].argsort()
    assert torch.equal(numbers[:, order], inputs.reshape(ROWS, -1))
    assert torch.equal(elements[:, :, order], gradients.reshape(ROWS, CLASSES, -1))
    assert explained.gradients is gradients
    return explained


def with_gaps(tensor: Tensor, *dims: int, step: int = 2) -> Tensor:
    """The same elements, every ``step``-th of a larger tensor's along each of ``dims``."""
    shape = [size * step if dim in dims else size for dim, size in enumerate(tensor.shape)]
    index = tuple(slice(None, None, step if dim in dims else 1) for dim in range(tensor.dim()))
    wide = tensor.new_full(shape, float("nan"))
    wide[index] = tensor
    return wide[index]


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor], int, int]] = {
    # shape, arrangement, dimensions left, elements of a vector in float32
    "contiguous": ((4, 6, 8), lambda g: g, 1, 4),
    "one odd dimension": ((7,), lambda g: g, 1, 1),
    "two in a vector": ((6,), lambda g: g, 1, 2),
    "channels last": ((4, 6, 8), lambda g: g.movedim(2, -1).contiguous().movedim(-1, 2), 1, 4),
    "transposed image": ((4, 6, 8), lambda g: g.mT.contiguous().mT, 1, 4),
    "gaps between columns": ((4, 6, 8), lambda g: with_gaps(g, 4), 1, 1),
    "gaps between rows": ((4, 6, 8), lambda g: with_gaps(g, 3), 2, 4),
    "gaps between rows and columns": ((4, 6, 8), lambda g: with_gaps(g, 3, 4), 2, 1),
    "gaps between channels and rows": ((4, 6, 8), lambda g: with_gaps(g, 2, 3), 3, 4),
    "gaps between classes": ((4, 6, 8), lambda g: with_gaps(g, 1), 1, 4),
    "rows cut out": ((4, 6, 8), lambda g: torch.cat([g, g[..., :1]], -1)[..., :-1], 2, 1),
    "expanded columns": ((4, 6, 8), lambda g: g[..., :1].expand_as(g), 2, 1),
    "expanded channels": ((4, 6, 8), lambda g: g[:, :, :1].expand_as(g), 2, 4),
    "expanded classes": ((4, 6, 8), lambda g: g[:, :1].expand_as(g), 1, 4),
    "expanded rows": ((4, 6, 8), lambda g: g[:1].expand_as(g), 1, 4),
    "one number": ((4, 6, 8), lambda g: g[:1, :1, :1, :1, :1].expand_as(g), 1, 1),
    "single pixels": ((8, 1, 1), lambda g: g, 1, 4),
    "no dimension": ((), lambda g: g, 1, 1),
    "single dimension": ((1, 1), lambda g: g, 1, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_gradient_meets_its_input(layout: str) -> None:
    shape, arrange, num_dims, vector = LAYOUTS[layout]
    gradients, inputs = numbered(*shape)
    gradients = arrange(gradients)
    explained = assert_same_pairs(gradients, inputs)
    assert len(explained.sizes) == len(explained.strides) == num_dims
    assert explained.vector == vector
    # Whole vectors side by side: the stride that Triton knows at compile time.
    assert vector == 1 or explained.strides[-1] == 1


@pytest.mark.parametrize("dims", list(itertools.permutations(range(3))))
def test_dimensions_in_any_order(dims: tuple[int, ...]) -> None:
    gradients, inputs = numbered(2, 3, 4)
    back = [dims.index(dim) for dim in range(3)]
    arranged = gradients.permute(0, 1, *(2 + d for d in dims)).contiguous()
    explained = assert_same_pairs(arranged.permute(0, 1, *(2 + d for d in back)), inputs)
    assert (explained.sizes, explained.strides, explained.vector) == ((6,), (1,), 4)


def test_inputs_are_copied_only_where_they_have_to_be() -> None:
    def copied(gradients: Tensor, inputs: Tensor) -> bool:
        return explanations(gradients, inputs).inputs.data_ptr() != inputs.data_ptr()

    gradients, inputs = torch.randn(2, 3, 4, 6, 8), torch.randn(2, 4, 6, 8)
    last = gradients.movedim(2, -1).contiguous().movedim(-1, 2)
    assert not copied(gradients, inputs)
    assert not copied(last, inputs.contiguous(memory_format=torch.channels_last))
    assert copied(last, inputs)
    assert copied(gradients, inputs.contiguous(memory_format=torch.channels_last))
    assert not copied(gradients, inputs[:1].expand(2, -1, -1, -1))
    assert copied(gradients, inputs[..., :1].expand(2, 4, 6, 8))
    # Rows of inputs begin where a vector can be loaded, or are brought there.
    assert not copied(gradients, torch.randn(2, 200)[:, :192].view(2, 4, 6, 8))
    assert copied(gradients, torch.randn(2, 193)[:, :192].unflatten(1, (4, 6, 8)))
    assert not copied(gradients[:1], torch.randn(1, 193)[:, :192].unflatten(1, (4, 6, 8)))


@pytest.mark.parametrize(
    ("dtype", "longest"), [(torch.float64, 2), (torch.float32, 4), (torch.bfloat16, 8)], ids=str
)
def test_vectors_are_16_bytes_at_most_and_aligned(dtype: torch.dtype, longest: int) -> None:
    def vector(gradients: Tensor) -> int:
        inputs = torch.empty(gradients.shape[0], *gradients.shape[2:], dtype=dtype)
        return explanations(gradients, inputs).vector

    assert vector(torch.empty(2, 3, 64, dtype=dtype)) == longest
    assert vector(torch.empty(2, 3, longest, dtype=dtype)) == longest
    assert vector(torch.empty(2, 3, 62, dtype=dtype)) == 2
    assert vector(torch.empty(2, 3, 63, dtype=dtype)) == 1
    # A class, or a row, that begins elsewhere.
    assert vector(torch.empty(2, 3, 65, dtype=dtype)[..., :64]) == 1
    assert vector(torch.empty(2, 193, dtype=dtype)[:, :192].unflatten(1, (3, 64))) == 1
    assert vector(torch.empty(1, 193, dtype=dtype)[:, :192].unflatten(1, (3, 64))) == longest
    # All of it.
    assert vector(torch.empty(385, dtype=dtype)[1:].view(2, 3, 64)) == 1


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4, 8)], ids=str)
def test_no_dimensions_to_walk(shape: tuple[int, ...]) -> None:
    explained = explanations(torch.empty(2, 3, *shape), torch.empty(2, *shape))
    assert explained.sizes == (0,)
    assert explained.num_dims == 0
    assert explained.inputs.shape == (2, 0)


def test_no_rows() -> None:
    explained = explanations(torch.empty(0, 3, 4, 8), torch.empty(0, 4, 8))
    assert explained.num_dims == 32
    assert explained.inputs.shape == (0, 32)


def test_meta_tensors_tell_as_much() -> None:
    for shape, arrange, _, _ in LAYOUTS.values():
        gradients, inputs = (tensor.contiguous() for tensor in numbered(*shape))
        real = explanations(arrange(gradients), inputs)
        meta = explanations(arrange(gradients.to("meta")), inputs.to("meta"))
        assert meta[2:] == real[2:]


@pytest.mark.parametrize(
    ("size", "strides", "wide"),
    [
        ((1 << 40,), (1,), False),  # counted from where a slice begins
        ((1 << 20,), (1 << 20,), False),
        ((1 << 20,), (1 << 21,), True),
        ((4, 1 << 20), (1 << 28, 1), False),
        ((4, 1 << 20), (1 << 30, 1), True),
        ((1 << 20, 1 << 11), (0, 1), True),  # few elements, but more places than 32 bits count
        ((1 << 20, 1 << 10), (0, 1), False),
    ],
)
def test_what_32_bits_hold(size: tuple[int, ...], strides: tuple[int, ...], wide: bool) -> None:
    explained = Explanations(torch.empty(0), torch.empty(0), size, strides, 0, 0, 0, 1)
    assert explained.exceeds_int32(1024) == wide
