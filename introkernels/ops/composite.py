"""The operators made of PyTorch's own operations, for whatever no kernel here serves.

They compute in the accumulation type, float32 at least, on any device. The row loss adds up the
numbers of csrc/common/row_loss.h. Its ``state`` is the gradient for an incoming gradient of 1, made
along with the loss from the exponentials at hand where it is asked for, so that a backward is one
product: three exponentials a class, where autograd takes seven of a loss written by hand with
``F.cross_entropy``, ``F.log_softmax`` and ``F.kl_div``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from introkernels import checks, reference, teachers
from introkernels.ops.head.operators import chunked_linear
from introkernels.ops.indices import check_explained, check_indices
from introkernels.ops.schema import loss_dtype
from introkernels.options import Options
from introkernels.types import REDUCTIONS, ExplanationStats

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
    state = rows.gradient(rows.totals) if options.need_logits else logits.new_empty(0, dtype=dtype)
    return (*(part.to(dtype) for part in losses), state)


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
    return rows.ce, rows.kl, grad


linear = chunked_linear(chunk_loss)


class _Rows:
    """The terms of rows, and the exponentials that their gradient is made of.

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
        plain: bool,
    ) -> None:
        """With ``plain``, every target is a class and all logits are finite: nothing is masked."""
        self._options, self._plain = options, plain
        dtype = loss_dtype(logits)
        z, t = logits.to(dtype).contiguous(), teacher_logits.to(dtype)
        num_classes = z.shape[1]
        column = target if plain else target.clamp(0, num_classes - 1)
        self._column = column[:, None]
        if plain:
            self._exists = z.new_ones(1, num_classes, dtype=torch.bool)
        else:
            self._exists = z != _NEVER
            self._live = target != options.ignore_index
            self._unknown = self._live & (column != target)
            t = t.masked_fill(~self._exists, _NEVER)
        z, t = z - _largest(z), t - _largest(t)
        z_target = z.gather(1, self._column)

        self._of_z = torch.div(z, options.temperature).exp_()
        self._of_t = torch.div(t, options.temperature).exp_()
        cross = t.sub_(z).mul_(self._of_t)
        if not plain:
            cross.masked_fill_(self._of_t == 0, 0)
        cross = cross.sum(1, keepdim=True)
        self._total_of_z = self._of_z.sum(1, keepdim=True)
        self._total_of_t = self._of_t.sum(1, keepdim=True)
        self._target_weight = None if weight is None else weight.to(dtype)[self._column]
        if options.label_smoothing > 0:
            self._smoothing = _Smoothing(z, self._exists, weight, options.label_smoothing)
        self._exps = z.exp_()
        self._total = self._exps.sum(1, keepdim=True)

        log_total = self._total.log()
        ce = log_total - z_target
        if self._target_weight is not None:
            ce = self._target_weight * ce
        if options.label_smoothing > 0:
            ce = (1 - options.label_smoothing) * ce + self._smoothing.cross_entropy(log_total)
        if not plain:
            # The infinity of a target that does not exist comes last, so that no weight of zero
            # turns it into NaN.
            ce = ce.masked_fill(z_target == _NEVER, float("inf"))
        # Of large logits, quotients by a small temperature and sums over rows may be out of a
        # float's range.
        ce = ce.double()
        kl = cross.double().div_(self._total_of_t).div_(options.temperature)
        kl.add_(self._total_of_z.div(self._total_of_t).log_())
        if not plain:
            kl.masked_fill_(self._total == 0, 0)
        self.ce, self.kl = self._only_live(ce[:, 0]), self._only_live(kl[:, 0])
        self.totals = self._totals()

    def is_finite(self) -> bool:
        return math.isfinite((self.ce + self.kl).sum().item())

    def gradient(self, totals: Sequence[Tensor | float], incoming: Tensor | float = 1.0) -> Tensor:
        """The gradient of the logits ``[B, C]``; it takes the exponentials, once.

        ``totals`` are what means are divided by; ``incoming`` is the gradient of the loss, a number
        or, where the reduction is none, ``[B]``.
        """
        options = self._options
        if isinstance(incoming, Tensor):
            incoming = incoming.double().reshape(-1, 1)
        ce_scale = options.ce_weight * incoming
        kl_scale = options.kl_weight * options.temperature * incoming
        if REDUCTIONS[options.reduction] == "mean":
            ce_scale, kl_scale = ce_scale / totals[0], kl_scale / totals[1]

        grad = torch.zeros_like(self._exps) if options.kl_weight == 0 else self._of_z
        if options.kl_weight > 0:
            grad.mul_((kl_scale / self._total_of_z).to(grad.dtype))
            grad.addcmul_(self._of_t, (kl_scale / self._total_of_t).to(grad.dtype), value=-1)
        if options.ce_weight > 0:
            of_target = grad.new_full((), 1 - options.label_smoothing) * ce_scale
            if self._target_weight is not None:
                of_target = of_target * self._target_weight
            of_exp = of_target
            if options.label_smoothing > 0:
                of_each = self._smoothing.share * ce_scale
                grad.addcmul_(of_each.to(grad.dtype), self._smoothing.of_class, value=-1)
                of_exp = of_target + of_each * self._smoothing.of_all
            grad.addcmul_(self._exps, (of_exp / self._total).to(grad.dtype))
            of_target = of_target.to(grad.dtype).expand_as(self._column)
            grad.scatter_add_(1, self._column, -of_target)
        if not self._plain:
            grad.masked_fill_(~self._exists, 0)
            grad.masked_fill_(~self._live[:, None], 0)
            grad.masked_fill_(self._unknown[:, None], float("nan"))
        return grad

    def _only_live(self, terms: Tensor) -> Tensor:
        """Terms ``[B]``: 0 where a row is ignored, NaN where its target is unknown."""
        if self._plain:
            return terms
        return terms.masked_fill(self._unknown, float("nan")).masked_fill_(~self._live, 0)

    def _totals(self) -> Sequence[Tensor | float]:
        if self._plain and self._target_weight is None:
            return [float(len(self.ce))] * 2
        ones = torch.ones_like(self.ce)
        live = ones.bool() if self._plain else self._live
        weights = ones if self._target_weight is None else self._target_weight[:, 0]
        return reference.totals(live, torch.where(live, weights, 0).double()).unbind()


class _Smoothing:
    """Label smoothing of rows ``z [B, C]`` less their largest.

    Attributes:
        share: ``[B, 1]``, what each class that exists gets.
        of_class: ``[B, C]``, the weights of the classes that exist.
        of_all: ``[B, 1]``, the sum of these.
    """

    def __init__(self, z: Tensor, exists: Tensor, weight: Tensor | None, smoothing: float) -> None:
        self.of_class = exists.to(z.dtype)
        self.share = smoothing / self.of_class.sum(1, keepdim=True).clamp_(min=1)
        if weight is not None:
            self.of_class = self.of_class * weight.to(z.dtype)
        self.of_all = self.of_class.sum(1, keepdim=True)
        self._distances = (torch.where(exists, z, 0) * self.of_class).sum(1, keepdim=True)

    def cross_entropy(self, log_total: Tensor) -> Tensor:
        return self.share * (self.of_all * log_total - self._distances)


def _rows(
    logits: Tensor, teacher_logits: Tensor, target: Tensor, weight: Tensor | None, options: Options
) -> _Rows:
    """Rows as they nearly always are, if they turn out finite; else with all that may be masked.

    Only where a look at numbers costs nothing: it would stall the stream of a GPU.
    """
    num_classes, ignore_index = logits.shape[1], options.ignore_index
    if logits.device.type == "cpu" and checks.all_are_classes(target, num_classes, ignore_index):
        rows = _Rows(logits, teacher_logits, target, weight, options, plain=True)
        if rows.is_finite():
            return rows
    else:
        check_indices(target, num_classes, ignore_index)
    return _Rows(logits, teacher_logits, target, weight, options, plain=False)


def _largest(values: Tensor) -> Tensor:
    """The largest number of each row ``[B, 1]``; a finite one of a row of -inf."""
    return values.amax(1, keepdim=True).clamp_(min=torch.finfo(values.dtype).min)
