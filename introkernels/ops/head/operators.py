"""The operator of a linear head, on any row loss and on tensors of any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from introkernels import reference, teachers
from introkernels.ops.head.chunks import Chunk, HeadCall, chunks_of
from introkernels.ops.head.products import Gradients, explain_weight, multiply, survey_rows
from introkernels.ops.indices import check_indices
from introkernels.ops.schema import loss_dtype
from introkernels.options import Options
from introkernels.types import REDUCTIONS

Linear = Callable[..., tuple[Tensor, ...]]


# Cross entropies and divergences of a chunk's rows, then the gradient of its logits, empty unless
# `options.need_logits`. It takes what `chunk_loss_of` passes on; `totals` are those of the batch,
# and `incoming` is the gradient of the loss: of each row where the reduction is none.
ChunkLoss = Callable[..., tuple[Tensor, Tensor, Tensor]]


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


def chunked_linear(chunk_loss: ChunkLoss) -> Linear:
    """``linear`` of introkernels/ops/schema.py on a row loss.

    It walks over chunks of rows: logits and similarities, teacher logits, row loss, gradients.
    """

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
        options = options._replace(
            need_logits=options.need_features or options.need_weight or options.need_bias
        )
        check_indices(target, weight.shape[0], options.ignore_index)
        call = HeadCall(features, weight, target, bias, class_weight, options)
        num_rows = len(features)
        dtype = loss_dtype(features)
        ce, kl = (features.new_empty(num_rows, dtype=dtype) for _ in range(2))
        rows, of_weight = survey_rows(call), explain_weight(call)
        per_row = REDUCTIONS[options.reduction] == "none"
        ones = features.new_ones(num_rows if per_row else (), dtype=dtype)
        incoming = ones if grad_loss is None else grad_loss
        gradients = Gradients(call, rows, incoming)

        def lose(chunk: Chunk, here: slice) -> Tensor:
            """The losses of a chunk; returns the gradient of its logits, empty if nobody asks.

            Teacher logits end with it: a matrix of a chunk takes two kilobytes a class.
            """
            ce[here], kl[here], grad = chunk_loss(
                chunk.logits,
                teachers.with_options(chunk.similarities, target[here], None, options),
                target[here],
                class_weight,
                rows.totals,
                incoming[here] if per_row else incoming,
                options,
            )
            return grad

        for here, chunk in chunks_of(call):
            multiply(call, rows, of_weight, chunk, here)
            gradients.add(of_weight, chunk, lose(chunk, here), here)
        losses = reference.reduce_terms(
            reference.RowTerms(ce.double(), kl.double(), rows.totals),
            options.temperature,
            options.ce_weight,
            options.kl_weight,
            REDUCTIONS[options.reduction],
        )
        return (*(part.to(dtype) for part in losses), *gradients.finish())

    return linear


# A torch.library.Library withdraws its kernels when it is collected.
_libraries: list[torch.library.Library] = []


def register_head(namespace: str, dispatch_key: str, chunk_loss: ChunkLoss | None = None) -> None:
    """Serve ``linear`` of ``namespace`` for ``dispatch_key``.

    Args:
        namespace: one that introkernels/ops/schema.py has defined.
        dispatch_key: ``"CUDA"`` or ``"CPU"``.
        chunk_loss: the row loss; without it, that of ``namespace`` itself.
    """
    operators = getattr(torch.ops, namespace)
    chunk_loss = chunk_loss or chunk_loss_of(
        operators.row_loss_forward, operators.row_loss_backward
    )
    library = torch.library.Library(namespace, "IMPL")
    _libraries.append(library)
    # Kernels lie below autograd even where they are made of differentiable functions.
    library.impl("linear", torch.no_grad()(chunked_linear(chunk_loss)), dispatch_key)
