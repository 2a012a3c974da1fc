"""The operator of a linear head, on any row loss and on tensors of any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from introkernels import reference, teachers
from introkernels.ops.head.chunks import Chunk, HeadCall, chunks_of
from introkernels.ops.head.products import Gradients, explain_weight, multiply, survey_rows
from introkernels.ops.indices import check_indices
from introkernels.ops.schema import loss_dtype
from introkernels.options import Options
from introkernels.types import REDUCTIONS, ExplanationStats

Linear = Callable[..., tuple[Tensor, ...]]


def chunked_linear(
    row_loss_forward: Callable[..., tuple[Tensor, ...]], row_loss_backward: Callable[..., Tensor]
) -> Linear:
    """``linear`` of introkernels/ops/schema.py on a row loss.

    It walks over chunks of rows: logits and statistics, teacher logits, row loss, gradients.
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
        check_indices(target, weight.shape[0], options.ignore_index)
        call = HeadCall(features, weight, target, bias, class_weight, options)
        of_rows = (floats, options._replace(reduction=REDUCTIONS.index("none")).ints)
        num_rows, num_classes = len(features), len(weight)
        dtype = loss_dtype(features)
        ce, kl = (features.new_empty(num_rows, dtype=dtype) for _ in range(2))
        rows, of_weight = survey_rows(call), explain_weight(call)
        gradients = Gradients(call)
        per_row = REDUCTIONS[options.reduction] == "none"
        ones = features.new_ones(num_rows if per_row else (), dtype=dtype)
        incoming = ones if grad_loss is None else grad_loss

        def lose(chunk: Chunk, here: slice) -> Tensor:
            """The losses of a chunk; returns the gradient of its logits, empty if nobody asks.

            Teacher logits end with it: a matrix of a chunk takes some hundred bytes a class.
            """
            stats = ExplanationStats(chunk.dots, chunk.sq_norms)
            row_loss = (
                chunk.logits,
                teachers.of_stats(stats, target[here], num_classes, options),
                target[here],
                class_weight,
            )
            _, ce[here], kl[here], state = row_loss_forward(*row_loss, *of_rows)
            if not (options.need_features or options.need_weight or options.need_bias):
                return state.new_empty(0)
            # What the rows of all chunks are divided by.
            state[-1, :2] = rows.totals
            return row_loss_backward(
                incoming[here] if per_row else incoming, *row_loss, state, floats, ints
            )

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


def register_head(namespace: str, dispatch_key: str, row_losses: Any = None) -> None:
    """Serve ``linear`` of ``namespace`` for ``dispatch_key``.

    Args:
        namespace: one that introkernels/ops/schema.py has defined.
        dispatch_key: ``"CUDA"`` or ``"CPU"``.
        row_losses: where the row loss comes from; without it, from ``namespace`` itself.
    """
    row_losses = row_losses or getattr(torch.ops, namespace)
    linear = chunked_linear(row_losses.row_loss_forward, row_losses.row_loss_backward)
    library = torch.library.Library(namespace, "IMPL")
    _libraries.append(library)
    # Kernels lie below autograd even where they are made of differentiable functions.
    library.impl("linear", torch.no_grad()(linear), dispatch_key)
