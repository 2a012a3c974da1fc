"""The operators made of PyTorch's own operations, for whatever no kernel here serves.

They compute in the accumulation type, float32 at least, on any device. The row loss is written with
``log_softmax``; its ``state`` is the gradient for an incoming gradient of 1, made
along with the loss where it is asked for, so that a backward is one product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from introkernels import checks, reference, teachers
from introkernels.ops.divergences import divergence
from introkernels.ops.head.operators import chunked_linear, chunked_linear_distillation
from introkernels.ops.indices import check_explained, check_indices
from introkernels.ops.schema import loss_dtype
from introkernels.options import Options
from introkernels.types import DIVERGENCES, REDUCTIONS, ExplanationStats

_NEVER = float("-inf")

# Numbers of explanations that are held at a time.
_EXPLANATIONS = 1 << 18


def row_loss_forward(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    floats: list[float],
    ints: list[int],
) -> tuple[Tensor, ...]:
    options = Options.of(floats, ints)
    rows = _rows(logits, teacher_logits, target, weight, options)
    losses = reference.reduce_terms(
        reference.RowTerms(rows.ce, rows.kl, rows.totals),
        options.temperature,
        options.ce_weight,
        options.kl_weight,
        REDUCTIONS[options.reduction],
    )
    dtype = loss_dtype(logits)
    state = rows.gradient(rows.totals) if options.need_logits else logits.new_empty(0)
    return (*(part.to(dtype) for part in losses), state.to(dtype))


def row_loss_backward(
    grad_loss: Tensor,
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    state: Tensor,
    floats: list[float],
    ints: list[int],
) -> Tensor:
    grad = state * grad_loss.to(state.dtype).reshape(-1, 1)
    if grad_loss.dim() > 0:
        # Whatever comes in for an ignored row, even NaN.
        grad = grad.masked_fill((target == Options.of(floats, ints).ignore_index)[:, None], 0)
    return grad.to(logits.dtype)


def explanation_stats(
    gradients: Tensor,
    inputs: Tensor,
    target: Tensor,
    class_index: Tensor | None,
    center: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    check_explained(gradients, target, class_index, ignore_index)
    num_rows = len(gradients)
    # Explanations of some rows at a time, which a cache holds.
    step = max(1, _EXPLANATIONS * num_rows // max(1, gradients.numel()))
    parts = [
        reference.explanation_stats(
            gradients[here : here + step],
            inputs[here : here + step],
            target[here : here + step],
            center=center,
            class_index=None if class_index is None else class_index[here : here + step],
            ignore_index=ignore_index,
        )
        for here in range(0, max(1, num_rows), step)
    ]
    if len(parts) == 1:
        return parts[0].dots, parts[0].sq_norms
    return torch.cat([part.dots for part in parts]), torch.cat([part.sq_norms for part in parts])


def teacher_logits(
    dots: Tensor,
    sq_norms: Tensor,
    target: Tensor,
    class_index: Tensor | None,
    num_classes: int,
    floats: list[float],
    ints: list[int],
) -> Tensor:
    options = Options.of(floats, ints)
    check_indices(target, num_classes, options.ignore_index, class_index)
    stats = ExplanationStats(dots, sq_norms, class_index)
    ignored = (target == options.ignore_index)[:, None]
    return teachers.of_stats(stats, target, num_classes, options).masked_fill_(ignored, 0)


def introspective_forward(
    logits: Tensor,
    target: Tensor,
    gradients: Tensor,
    inputs: Tensor,
    class_index: Tensor | None,
    weight: Tensor | None,
    floats: list[float],
    ints: list[int],
) -> tuple[Tensor, ...]:
    options = Options.of(floats, ints)
    num_classes = logits.shape[1]
    # A target that is no class of the logits is none of the explanations either.
    check_indices(target, num_classes, options.ignore_index)
    dots, sq_norms = explanation_stats(
        gradients, inputs, target, class_index, options.center, options.ignore_index
    )
    teacher = teacher_logits(dots, sq_norms, target, class_index, num_classes, floats, ints)
    teacher = teacher.to(loss_dtype(logits))
    return (*row_loss_forward(logits, teacher, target, weight, floats, ints), teacher)


def chunk_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    totals: Tensor,
    incoming: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = _rows(logits, teacher_logits, target, weight, options)
    grad = rows.gradient(totals.unbind(), incoming) if options.need_logits else logits.new_empty(0)
    return rows.ce, rows.kl, grad.to(logits.dtype)


linear = chunked_linear(chunk_loss)
linear_distillation = chunked_linear_distillation(chunk_loss)


class _Rows:
    """The terms of rows, and what their gradient is made of.

    Attributes:
        ce: ``[B]``, the cross entropies, 0 in ignored rows and NaN in those of unknown targets.
        kl: ``[B]``, the divergences, likewise.
        totals: what means are divided by, see `introkernels.reference.totals`.
    """

    def __init__(
        self,
        logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: Options,
        *,
        live: Tensor | None,
        masked: bool,
    ) -> None:
        """Rows in the dtype of ``logits``.

        ``live`` says which are not ignored, None that none is; without ``masked``, all classes
        exist and all targets are classes.
        """
        self._options, self._live = options, live
        self._again: tuple[Tensor, _Rows] | None = None
        num_classes = logits.shape[1]
        column = target if live is None else target.clamp(0, num_classes - 1)
        self._column = column[:, None]
        z, t = logits, teacher_logits.to(logits.dtype)
        self._exists = self._unknown = None
        if masked:
            self._exists = z != _NEVER
            if live is not None:
                self._unknown = live & (column != target)
            # A row without any class is as good as one of equal logits, but for its target.
            empty = ~self._exists.any(1, keepdim=True)
            z = z.masked_fill(empty, 0)
            t = t.masked_fill(~self._exists, _NEVER).masked_fill_(empty, 0)

        # Logarithms of probabilities are logits from which the largest was taken off.
        self._log_p = torch.log_softmax(z, 1)
        log_q = torch.log_softmax(t.sub(t.amax(1, keepdim=True)).div_(options.temperature), 1)
        log_p = torch.log_softmax(self._log_p / options.temperature, 1)
        if self._exists is not None:
            log_p.masked_fill_(~self._exists, torch.finfo(log_p.dtype).min)
        kl, self._gradient = divergence(log_p, log_q, options)
        if self._exists is not None:
            kl = kl.masked_fill(empty, 0)

        self._target_weight = None if weight is None else weight.to(z.dtype)[self._column]
        ce = -self._log_p.gather(1, self._column)
        if self._target_weight is not None:
            ce *= self._target_weight
        if options.label_smoothing > 0:
            self._smoothing = _Smoothing(self._log_p, self._exists, weight, options.label_smoothing)
            ce = (1 - options.label_smoothing) * ce + self._smoothing.cross_entropy
        if self._exists is not None:
            # The infinity of a target that does not exist comes last, so that no weight of zero
            # turns it into NaN.
            ce = ce.masked_fill(~self._exists.gather(1, self._column), float("inf"))
        # Their sums may be out of a float's range.
        self.ce, self.kl = (self._only_live(terms[:, 0].double()) for terms in (ce, kl))
        self.totals = self._totals()

    def gradient(self, totals: Sequence[Tensor | float], incoming: Tensor | float = 1.0) -> Tensor:
        """The gradient of the logits ``[B, C]``; it overwrites what it is made of.

        ``totals`` are what means are divided by; ``incoming`` is the gradient of the loss, a number
        or, where the reduction is none, ``[B]``.
        """
        grad = self._gradient_of_these(totals, incoming)
        if self._again is not None:
            index, rows = self._again
            if isinstance(incoming, Tensor) and incoming.dim() > 0:
                incoming = incoming[index]
            grad.index_copy_(0, index, rows.gradient(totals, incoming).to(grad.dtype))
        return grad

    def replace(self, index: Tensor, rows: _Rows) -> None:
        """Take ``rows`` for those of ``index``."""
        self._again = index, rows
        self.ce = self.ce.index_copy(0, index, rows.ce)
        self.kl = self.kl.index_copy(0, index, rows.kl)

    def _gradient_of_these(self, totals: Sequence[Tensor | float], incoming: Any) -> Tensor:
        options = self._options
        if isinstance(incoming, Tensor):
            incoming = incoming.to(self._log_p.dtype).reshape(-1, 1)
        ce_scale = options.ce_weight * incoming
        kl_scale = options.kl_weight * options.temperature * incoming
        if REDUCTIONS[options.reduction] == "mean":
            ce_scale, kl_scale = ce_scale / totals[0], kl_scale / totals[1]

        grad = self._gradient.mul_(kl_scale) if options.kl_weight > 0 else self._gradient.zero_()
        if options.ce_weight > 0:
            of_target = (1 - options.label_smoothing) * ce_scale
            if self._target_weight is not None:
                of_target = self._target_weight * of_target
            of_all = of_target
            if options.label_smoothing > 0:
                of_each = self._smoothing.share * ce_scale
                grad.addcmul_(of_each, self._smoothing.of_class, value=-1)
                of_all = of_target + of_each * self._smoothing.of_all
            grad.add_(self._log_p.exp_().mul_(of_all))
            grad.scatter_add_(1, self._column, grad.new_zeros(self._column.shape).sub_(of_target))
        if self._exists is not None:
            grad.masked_fill_(~self._exists, 0)
        if self._live is not None:
            grad.masked_fill_(~self._live[:, None], 0)
        if self._unknown is not None:
            grad.masked_fill_(self._unknown[:, None], float("nan"))
        return grad

    def _only_live(self, terms: Tensor) -> Tensor:
        """Terms ``[B]``: 0 where a row is ignored, NaN where its target is unknown."""
        if self._unknown is not None:
            terms = terms.masked_fill(self._unknown, float("nan"))
        return terms if self._live is None else terms.masked_fill(~self._live, 0)

    def _totals(self) -> Sequence[Tensor | float]:
        if self._live is None and self._target_weight is None:
            return [float(len(self.ce))] * 2
        ones = torch.ones_like(self.ce)
        weights = ones if self._target_weight is None else self._target_weight[:, 0]
        live = ones.bool() if self._live is None else self._live
        return reference.totals(live, torch.where(live, weights, 0).double()).unbind()


class _Smoothing:
    """Label smoothing of rows whose logarithms of probabilities are ``log_p [B, C]``.

    Attributes:
        share: ``[B, 1]``, what each class that exists gets.
        of_class: ``[B, C]``, the weights of the classes that exist.
        of_all: ``[B, 1]``, the sum of these.
        cross_entropy: ``[B, 1]``.
    """

    def __init__(
        self, log_p: Tensor, exists: Tensor | None, weight: Tensor | None, smoothing: float
    ) -> None:
        of_class = torch.ones_like(log_p) if exists is None else exists.to(log_p.dtype)
        self.share = smoothing / of_class.sum(1, keepdim=True).clamp_(min=1)
        self.of_class = of_class if weight is None else of_class * weight.to(log_p.dtype)
        self.of_all = self.of_class.sum(1, keepdim=True)
        surprise = log_p if exists is None else log_p.masked_fill(~exists, 0)
        self.cross_entropy = -self.share * (surprise * self.of_class).sum(1, keepdim=True)


def _rows(
    logits: Tensor, teacher_logits: Tensor, target: Tensor, weight: Tensor | None, options: Options
) -> _Rows:
    """Rows as they nearly always are; those that don't turn out finite again, with masks.

    The second time in float64, where large logits and small temperatures stay in range. Only where
    a look at numbers costs nothing: it would stall the stream of a GPU.
    """
    num_classes, ignore_index = logits.shape[1], options.ignore_index
    z, live = logits.to(loss_dtype(logits)), None
    if z.device.type != "cpu" or not checks.all_are_classes(target, num_classes, ignore_index):
        check_indices(target, num_classes, ignore_index)
        live = target != ignore_index
    if z.device.type != "cpu":
        return _Rows(z, teacher_logits, target, weight, options, live=live, masked=True)
    # A class that does not exist shows in the forward KL, which is then no number.
    masked = DIVERGENCES[options.divergence] != "forward_kl" and bool((z == _NEVER).any())
    rows = _Rows(z, teacher_logits, target, weight, options, live=live, masked=masked)
    if not math.isfinite((rows.ce + rows.kl).sum().item()):
        index = (~torch.isfinite(rows.ce + rows.kl)).nonzero()[:, 0]
        live = None if live is None else live[index]
        z, t = z[index].double(), teacher_logits[index]
        again = _Rows(z, t, target[index], weight, options, live=live, masked=True)
        rows.replace(index, again)
    return rows
