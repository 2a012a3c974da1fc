"""A head's teachers, a chunk at a time: logits given, another head, or the strongest classes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from introkernels.ops.head.chunks import Chunk, factor_dtype
from introkernels.ops.head.products import product
from introkernels.types import TAILS, LinearTeacher, Teacher, TopKTeacher

# The kinds of teachers, as the operator tells them apart.
GIVEN, LINEAR = 0, 1
TOP_K = 2


class Packed(NamedTuple):
    """A teacher as the operator takes it: its tensors, and what they are."""

    tensors: list[Tensor]
    kind: int


def pack(teacher: Teacher, num_rows: int) -> Packed:
    """A teacher of rows; statistics have become logits before."""
    if isinstance(teacher, Tensor):
        return Packed([teacher.detach().reshape(num_rows, teacher.shape[-1])], GIVEN)
    if isinstance(teacher, LinearTeacher):
        features = teacher.features.detach().reshape(num_rows, teacher.weight.shape[1])
        of_head = [teacher.weight.detach()]
        if teacher.bias is not None:
            of_head.append(teacher.bias.detach())
        return Packed([features, *of_head], LINEAR)
    assert isinstance(teacher, TopKTeacher)
    width = teacher.indices.shape[-1]
    tensors = [teacher.indices.reshape(num_rows, width)]
    tensors.append(teacher.log_probs.detach().reshape(num_rows, width))
    return Packed(tensors, TOP_K + TAILS.index(teacher.tail))


class ChunkTeacher:
    """A teacher of all rows, of which ``index`` are the head's; None where all are."""

    def __init__(self, tensors: list[Tensor], kind: int, index: Tensor | None) -> None:
        self._tensors, self._kind, self._index = tensors, kind, index

    def rows(self, chunk: Chunk, here: slice) -> Tensor | TopKTeacher:
        """Teacher logits of a chunk ``[rows, C]``, or the strongest of them."""
        rows = [
            tensor[here] if self._index is None else tensor.index_select(0, self._index[here])
            for tensor in self._tensors[: 1 if self._kind == LINEAR else None]
        ]
        if self._kind == GIVEN:
            return rows[0]
        if self._kind == LINEAR:
            features, weight = rows[0], self._tensors[1]
            dtype = factor_dtype(features, weight)
            product(features.to(dtype), weight.to(dtype).mT, chunk.of_teacher)
            if len(self._tensors) > 2:
                chunk.of_teacher.add_(self._tensors[2])
            return chunk.of_teacher
        indices, log_probs = rows
        return TopKTeacher(indices, log_probs, TAILS[self._kind - TOP_K])
