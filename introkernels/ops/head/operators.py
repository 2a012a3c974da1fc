"""The operators of a linear head, on any row loss and on tensors of any device.

Both are one walk over chunks of rows: the student's logits, the teacher's, the row loss, gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from introkernels import reference, teachers
from introkernels.ops.head.chunks import Chunk, HeadCall, chunks_of
from introkernels.ops.head.explanations import OwnExplanations
from introkernels.ops.head.products import Gradients, Rows, multiply, survey_rows
from introkernels.ops.head.teachers import ChunkTeacher
from introkernels.ops.indices import check_indices
from introkernels.ops.schema import loss_dtype
from introkernels.options import Options
from introkernels.types import REDUCTIONS, TopKTeacher

Head = Callable[..., tuple[Tensor, ...]]

# Cross entropies and divergences of a chunk's rows, then the gradient of its logits, empty unless
# `options.need_logits`. It takes what `chunk_loss_of` passes on; `totals` are those of the batch,
# and `incoming` is the gradient of the loss: of each row where the reduction is none.
ChunkLoss = Callable[..., tuple[Tensor, Tensor, Tensor]]


class _Teacher(Protocol):
    def rows(self, chunk: Chunk, here: slice) -> Tensor | TopKTeacher:
        """Teacher logits of a chunk ``[rows, C]``, or what is known of them."""


def chunk_loss_of(
    row_loss_forward: Callable[..., tuple[Tensor, ...]], row_loss_backward: Callable[..., Tensor]
) -> ChunkLoss:
    """The row loss of a chunk made of a backend's operators."""

    def chunk_loss(
        logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        totals: Tensor,
        incoming: Tensor,
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        row_loss = logits, teacher_logits, target, weight
        of_rows = options._replace(reduction=REDUCTIONS.index("none"))
        _, ce, kl, state = row_loss_forward(*row_loss, of_rows.floats, of_rows.ints)
        if not options.need_logits:
            return ce, kl, state.new_empty(0)
        # What the rows of all chunks are divided by.
        state[-1, :2] = totals
        return ce, kl, row_loss_backward(incoming, *row_loss, state, options.floats, options.ints)

    return chunk_loss


def chunked_linear(chunk_loss: ChunkLoss) -> Head:
    """``linear`` of introkernels/ops/schema.py on a row loss."""

    def linear(
        features: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        class_weight: Tensor | None,
        grad_loss: Tensor | None,
        floats: list[float],
        ints: list[int],
    ) -> tuple[Tensor, ...]:
        options = Options.of(floats, ints)
        incoming = _incoming(features, grad_loss, options)
        call = HeadCall(features, weight, target, bias, class_weight, incoming, options)
        return _walk(call, lambda call, rows, _: OwnExplanations(call, rows), chunk_loss)

    return linear


def chunked_linear_distillation(chunk_loss: ChunkLoss) -> Head:
    """``linear_distillation`` of introkernels/ops/schema.py on a row loss."""

    def linear_distillation(
        features: Tensor,
        head: list[Tensor],
        teacher: list[Tensor],
        target: Tensor,
        class_weight: Tensor | None,
        grad_loss: Tensor | None,
        floats: list[float],
        ints: list[int],
    ) -> tuple[Tensor, ...]:
        options = Options.of(floats, ints)
        weight, bias = head[0], head[1] if len(head) > 1 else None
        incoming = _incoming(features, grad_loss, options)
        call = HeadCall(features, weight, target, bias, class_weight, incoming, options)

        def teacher_of(call: HeadCall, rows: Rows, index: Tensor | None) -> ChunkTeacher:
            return ChunkTeacher(teacher, options.teacher, index)

        return _walk(call, teacher_of, chunk_loss)

    return linear_distillation


def _incoming(features: Tensor, grad_loss: Tensor | None, options: Options) -> Tensor:
    """The gradient of the loss that gradients are made for: ones where there is none yet."""
    if grad_loss is not None:
        return grad_loss
    shape = (len(features),) if REDUCTIONS[options.reduction] == "none" else ()
    return features.new_ones(shape, dtype=loss_dtype(features))


def _walk(
    call: HeadCall,
    teacher_of: Callable[[HeadCall, Rows, Tensor | None], _Teacher],
    chunk_loss: ChunkLoss,
) -> tuple[Tensor, ...]:
    """The losses and gradients of a head, whose rows learn from what ``teacher_of`` makes."""
    options = call.options
    options = options._replace(
        need_logits=options.need_features or options.need_weight or options.need_bias
    )
    check_indices(call.target, call.weight.shape[0], options.ignore_index)
    call = call._replace(options=options)
    num_rows, dtype = len(call.features), loss_dtype(call.features)
    index = _rows_that_count(call.target, options.ignore_index)
    if index is not None:
        call = call.of_rows(index)
    rows = survey_rows(call)
    teacher, gradients = teacher_of(call, rows, index), Gradients(call, rows)
    ce, kl = (call.features.new_empty(len(call.features), dtype=dtype) for _ in range(2))

    def lose(chunk: Chunk, here: slice) -> Tensor:
        """The losses of a piece; returns the gradient of its logits, empty if nobody asks.

        Teacher logits end with it: a matrix of a chunk takes two kilobytes a class.
        """
        incoming = call.incoming[here] if call.incoming.dim() > 0 else call.incoming
        of_teacher = teacher.rows(chunk, here)
        lose_rows = (
            partial(_lose_top_k, chunk_loss) if isinstance(of_teacher, TopKTeacher) else chunk_loss
        )
        ce[here], kl[here], grad = lose_rows(
            chunk.logits,
            of_teacher,
            call.target[here],
            call.class_weight,
            rows.totals,
            incoming,
            options,
        )
        return grad

    def lose_in_pieces(chunk: Chunk, here: slice) -> Tensor:
        """`lose` of a chunk, whose logits give way to their gradient if it has several pieces."""
        for piece_here, piece in chunk.pieces(here):
            grad = lose(piece, piece_here)
            gradients.add_to_bias(grad)
            if len(grad) == len(chunk.logits):
                return grad
            if options.need_logits:
                piece.logits.copy_(grad)
        return chunk.logits

    for here, chunk in chunks_of(call):
        multiply(call, rows, chunk, here)
        gradients.add(chunk, lose_in_pieces(chunk, here), here)
    of_features, *others = gradients.finish()
    if index is not None:
        ce, kl = (ce.new_zeros(num_rows).index_copy_(0, index, part) for part in (ce, kl))
        if options.need_features:
            zeros = of_features.new_zeros(num_rows, of_features.shape[1])
            of_features = zeros.index_copy_(0, index, of_features)
    losses = reference.reduce_terms(
        reference.RowTerms(ce.double(), kl.double(), rows.totals),
        options.temperature,
        options.ce_weight,
        options.kl_weight,
        REDUCTIONS[options.reduction],
    )
    return (*(part.to(dtype) for part in losses), of_features, *others)


def _rows_that_count(target: Tensor, ignore_index: int) -> Tensor | None:
    """The rows that are not ignored; None where all count, or nobody can know.

    Most rows of a language model's batch may be padding or prompt, and this keeps them out of the
    products. On a GPU it waits for the device once, which a CUDA graph that is captured can't.
    """
    if target.is_meta or (target.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    index = (target != ignore_index).nonzero()[:, 0]
    return None if len(index) == len(target) else index


def _lose_top_k(
    chunk_loss: ChunkLoss,
    logits: Tensor,
    teacher: TopKTeacher,
    target: Tensor,
    weight: Tensor | None,
    totals: Tensor,
    incoming: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """A chunk's loss, whose divergence is of the classes that its teacher names."""
    known = teachers.in_range(teacher, logits.shape[1])
    ce, _, grad = chunk_loss(
        logits, logits, target, weight, totals, incoming, options._replace(kl_weight=0.0)
    )
    student, teacher_logits = teachers.of_top_k(logits, known)
    live = torch.where(target == options.ignore_index, -1, 0)
    _, kl, of_student = chunk_loss(
        student,
        teacher_logits,
        live,
        None,
        totals,
        incoming,
        options._replace(ce_weight=0.0, label_smoothing=0.0, ignore_index=-1),
    )
    if options.need_logits:
        named = known.indices.shape[1]
        grad.scatter_add_(1, known.indices, of_student[:, :named])
        if student.shape[1] > named:
            others = logits.scatter(1, known.indices, float("-inf"))
            share = others.sub_(student[:, named:]).exp_().nan_to_num_(0)
            grad.addcmul_(share, of_student[:, named:])
    return ce, kl, grad


# A torch.library.Library withdraws its kernels when it is collected.
_libraries: list[torch.library.Library] = []

_HEADS = {"linear": chunked_linear, "linear_distillation": chunked_linear_distillation}


def register_head(
    namespace: str,
    dispatch_key: str,
    chunk_loss: ChunkLoss | None = None,
    names: Sequence[str] = tuple(_HEADS),
) -> None:
    """Serve the heads of ``namespace`` for ``dispatch_key``.

    Args:
        namespace: one that introkernels/ops/schema.py has defined.
        dispatch_key: ``"CUDA"`` or ``"CPU"``.
        chunk_loss: the row loss; without it, that of ``namespace`` itself.
        names: which of the heads.
    """
    operators = getattr(torch.ops, namespace)
    chunk_loss = chunk_loss or chunk_loss_of(
        operators.row_loss_forward, operators.row_loss_backward
    )
    library = torch.library.Library(namespace, "IMPL")
    _libraries.append(library)
    for name in names:
        # Kernels lie below autograd even where they are made of differentiable functions.
        library.impl(name, torch.no_grad()(_HEADS[name](chunk_loss)), dispatch_key)
