"""How kernels see explanations: gradients of any strides, and inputs in the order of these.

The statistics are sums over the dimensions of an explanation, in whatever order. So gradients
``[B, K, *S]`` stay where they lie, however they lie there, and the dimensions ``S`` are walked in
the order of memory. Inputs ``[B, *S]``, K times smaller, are brought into that order.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

_BYTES_OF_A_LOAD = 16
_INT32 = 2**31


class Explanations(NamedTuple):
    """Gradients and inputs as a kernel walks them.

    The dimensions of an explanation are made of vectors of ``vector`` neighbouring elements, which
    one instruction loads. All strides count vectors, and so does the last of ``sizes``.

    Attributes:
        gradients: the caller's tensor, never a copy.
        inputs: ``[B, D]``, contiguous along D, in the order of ``sizes``.
        sizes: of the dimensions that are left of S, the one of the smallest stride last.
        strides: of ``gradients`` in these dimensions.
        row_stride: of ``gradients`` from a row to the next.
        class_stride: of ``gradients`` from a class to the next.
        inputs_row_stride: of ``inputs`` from a row to the next.
        vector: elements in a vector: 1 where neighbours don't lie side by side, or not aligned.
    """

    gradients: Tensor
    inputs: Tensor
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    row_stride: int
    class_stride: int
    inputs_row_stride: int
    vector: int

    @property
    def num_dims(self) -> int:
        """How many elements an explanation has: D."""
        return math.prod(self.sizes) * self.vector

    def exceeds_int32(self, width: int) -> bool:
        """Whether 32 bits don't hold what a program that reads ``width`` elements counts with.

        A program of a single dimension counts from where its slice begins, any other one from where
        the explanation does.
        """
        if len(self.sizes) == 1:
            return width * self.strides[0] >= _INT32
        last = sum((size - 1) * step for size, step in zip(self.sizes, self.strides, strict=True))
        return max(self.num_dims + width, (last + 1) * self.vector) >= _INT32


def explanations(gradients: Tensor, inputs: Tensor) -> Explanations:
    """Gradients ``[B, K, *S]`` and inputs ``[B, *S]`` as a kernel walks them.

    Gradients are not copied. Inputs are copied only where they don't lie in the gradients' order or
    their rows begin where a vector can't be loaded. Reads no values: meta tensors will do.
    """
    order = _descending_strides(gradients)
    sizes, strides = _collapsed(
        [gradients.shape[dim + 1] for dim in order], [gradients.stride(dim + 1) for dim in order]
    )
    rows, classes = gradients.shape[:2]
    row_stride = gradients.stride(0) if rows > 1 else 0
    class_stride = gradients.stride(1) if classes > 1 else 0
    vector = _vector(gradients, sizes, strides, row_stride, class_stride)
    dropped = [dim for dim in range(1, inputs.dim()) if dim not in order]
    flat = inputs.permute(0, *order, *dropped).reshape(rows, math.prod(sizes))
    if (flat.shape[1] > 1 and flat.stride(1) != 1) or (rows > 1 and flat.stride(0) % vector):
        flat = flat.contiguous()
    return Explanations(
        gradients,
        flat,
        (*sizes[:-1], sizes[-1] // vector),
        # Where vectors are longer than 1, the next one lies beside it.
        (*(stride // vector for stride in strides[:-1]), strides[-1]),
        row_stride // vector,
        class_stride // vector,
        flat.stride(0) // vector if rows > 1 else 0,
        vector,
    )


def _descending_strides(gradients: Tensor) -> list[int]:
    """The dimensions of inputs that have a size, in the order in which gradients lie in memory.

    Expanded dimensions come first, so that the last one is that of neighbours.
    """
    dims = [dim for dim in range(1, gradients.dim() - 1) if gradients.shape[dim + 1] != 1]
    expanded = [dim for dim in dims if gradients.stride(dim + 1) == 0]
    others = [dim for dim in dims if gradients.stride(dim + 1) != 0]
    return expanded + sorted(others, key=lambda dim: -gradients.stride(dim + 1))


def _collapsed(sizes: list[int], strides: list[int]) -> tuple[list[int], list[int]]:
    """The fewest dimensions that reach the same elements in the same order; at least one."""
    if math.prod(sizes) < 2:
        return [math.prod(sizes)], [1]
    kept: list[tuple[int, int]] = []
    for size, stride in zip(sizes, strides, strict=True):
        if kept and kept[-1][1] == stride * size:
            size *= kept.pop()[0]
        kept.append((size, stride))
    return [size for size, _ in kept], [stride for _, stride in kept]


def _vector(
    gradients: Tensor, sizes: list[int], strides: list[int], row_stride: int, class_stride: int
) -> int:
    """The most neighbours that one load may fetch wherever an explanation is entered."""
    # Triton tells its compiler of a pointer that it is a multiple of 16 bytes, or nothing.
    if strides[-1] != 1 or gradients.data_ptr() % _BYTES_OF_A_LOAD:
        return 1
    longest = _BYTES_OF_A_LOAD // gradients.element_size()
    return math.gcd(longest, sizes[-1], *strides[:-1], row_stride, class_stride)
