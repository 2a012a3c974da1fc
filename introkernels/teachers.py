"""Teacher logits: all that knows of similarities, label modes and a teacher's strongest classes.

Whatever makes soft labels gives teacher logits ``t [B, C]``, whose soft labels are
``softmax(t / T)``; the row loss asks for no more. Here they are plain PyTorch in the dtype of the
statistics, float32 at least, without a graph.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from introkernels import checks
from introkernels.options import Options
from introkernels.types import (
    LABEL_MODES,
    SIMILARITIES,
    ExplanationStats,
    LabelMode,
    Similarity,
    TopKTeacher,
)

_NEVER = float("-inf")


def similarities(
    stats: ExplanationStats, target: Tensor, *, similarity: Similarity = "cosine"
) -> Tensor:
    """The similarity of each class's explanation to that of the target, within [-1, 1].

    ``"cosine"``: ``dots_c / sqrt(sq_norms_c * sq_norms_y)``; ``"projection"``:
    ``dots_c / sq_norms_y``. It is 1 for the target, 0 where a norm is zero, and NaN where a norm
    overflowed.

    Args:
        stats: statistics ``[B, K]``.
        target: ``[B]`` int64, or class probabilities ``[B, C]``, whose explanation no class has.
        similarity: which of the two.

    Returns:
        ``[B, K]`` in the dtype of the statistics; ``stats.class_index`` tells the classes.

    Raises:
        TypeError, ValueError: for arguments of the wrong type, shape, dtype or value.
    """
    checks.stats_and_target(stats, target)
    checks.choice("similarity", similarity, SIMILARITIES)
    return similarities_of(stats, target, similarity).to(stats.dots.dtype)


def teacher_logits(
    stats: ExplanationStats,
    target: Tensor,
    *,
    temperature: float = 4.0,
    similarity_temperature: float = 1.0,
    similarity: Similarity = "cosine",
    label_mode: LabelMode = "softmax",
    non_target_mass: float = 0.1,
    ignore_index: int = -100,
) -> Tensor:
    """The teacher logits ``t`` of explanation statistics, whose soft labels are ``softmax(t / T)``.

    ``label_mode="softmax"``: ``t_c = (s_c - 1) / tau`` for the similarities ``s_c``. ``"split"``:
    ``t = T * log(q)`` with ``q_y = 1 - m`` and ``q_c = m * softmax(s / (tau * T))_c``, a softmax
    over the classes but the target, ``m`` being ``non_target_mass``. They may go to any loss that
    takes a teacher:

    >>> teacher = introkernels.teacher_logits(stats, target)
    >>> loss = introkernels.distillation_loss(logits, teacher, target)

    Args:
        stats: an :class:`ExplanationStats` of ``K`` explained classes.
        target: ``[B]`` int64 class indices, or ``ignore_index``; or class probabilities ``y``
            ``[B, C]``, whose statistics are of the explanation ``sum_k y_k E_k``. The label mode
            has then to be ``"softmax"``.
        temperature: ``T``, read by ``label_mode="split"``.
        similarity_temperature: ``tau``, which divides the similarities.
        similarity: ``"cosine"`` or ``"projection"``; see `introkernels.explain.similarities`.
        label_mode: ``"softmax"`` or ``"split"``.
        non_target_mass: in [0, 1], read by ``label_mode="split"``.
        ignore_index: a target of this value leaves NaN in its row, which no loss reads.

    Returns:
        ``[B, K]`` in the dtype of the statistics, float32 at least: of the classes in
        ``stats.class_index``, if there is one. A row whose target is not explained is NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value.
        IndexError: a target outside ``[0, C)`` (not checked in compiled or transformed code, where
            its row is NaN).
    """
    _check(stats, target, ignore_index)
    checks.label_mode_of(target, label_mode)
    checks.temperature("temperature", temperature)
    checks.label_keywords(similarity_temperature, similarity, label_mode, non_target_mass)
    return of_similarities(
        similarities_of(stats, target, similarity),
        without_ignored(target, ignore_index),
        class_index=stats.class_index,
        temperature=temperature,
        similarity_temperature=similarity_temperature,
        label_mode=label_mode,
        non_target_mass=non_target_mass,
    )


def soft_labels(
    stats: ExplanationStats,
    target: Tensor,
    *,
    temperature: float = 4.0,
    similarity_temperature: float = 1.0,
    similarity: Similarity = "cosine",
    label_mode: LabelMode = "softmax",
    non_target_mass: float = 0.1,
    ignore_index: int = -100,
) -> Tensor:
    """The soft labels ``q = softmax(t / T)`` of explanation statistics, to look at.

    They are those that `introkernels.similarity_loss` distils in rows where no logit is -inf.
    Arguments and errors are those of `introkernels.teacher_logits`.

    Returns:
        ``[B, K]`` in the dtype of the statistics; each row sums to one, but those of ignored
        targets, which are NaN.
    """
    logits = teacher_logits(
        stats,
        target,
        temperature=temperature,
        similarity_temperature=similarity_temperature,
        similarity=similarity,
        label_mode=label_mode,
        non_target_mass=non_target_mass,
        ignore_index=ignore_index,
    )
    return torch.softmax(logits / temperature, 1).to(stats.dots.dtype)


def of_similarities(
    similarity: Tensor,
    target: Tensor,
    *,
    class_index: Tensor | None,
    temperature: float,
    similarity_temperature: float,
    label_mode: LabelMode,
    non_target_mass: float,
) -> Tensor:
    """Teacher logits ``[B, K]`` of similarities ``[B, K]``; keywords as in `teacher_logits`."""
    if label_mode == "softmax":
        logits = (similarity - 1).div_(similarity_temperature)
        if target.is_floating_point():
            return logits
    column, known = target_column(target, similarity.shape[1], class_index)
    if label_mode == "split":
        # A class without others has all of the mass.
        mass = non_target_mass if similarity.shape[1] > 1 else 0.0
        others = similarity.scatter(1, column, _NEVER) / (similarity_temperature * temperature)
        log_q = torch.log_softmax(others, 1).add_(_log(mass))
        logits = log_q.scatter(1, column, _log(1 - mass)).mul_(temperature)
    return logits.masked_fill_(~known, float("nan"))


def of_stats(stats: ExplanationStats, target: Tensor, num_classes: int, options: Options) -> Tensor:
    """Teacher logits ``[B, C]`` of statistics, with nothing checked; options as operators take."""
    similarity = similarities_of(stats, target, SIMILARITIES[options.similarity])
    found = with_options(similarity, target, stats.class_index, options)
    return among_all(found, stats.class_index, num_classes)


def with_options(
    similarity: Tensor, target: Tensor, class_index: Tensor | None, options: Options
) -> Tensor:
    """`of_similarities`, with options as operators take."""
    return of_similarities(
        similarity,
        target,
        class_index=class_index,
        temperature=options.temperature,
        similarity_temperature=options.similarity_temperature,
        label_mode=LABEL_MODES[options.label_mode],
        non_target_mass=options.non_target_mass,
    )


def without_ignored(target: Tensor, ignore_index: int) -> Tensor:
    """``target`` with a class that nothing has where it is to be ignored."""
    if target.is_floating_point():
        return target
    return torch.where(target == ignore_index, -1, target)


def target_column(
    target: Tensor, num_classes: int, class_index: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Where a row's target stands among its explained classes, and whether it does: ``[B, 1]``.

    A target that is not among them has a column too, which can be read.
    """
    if class_index is not None:
        known, column = (class_index == target[:, None]).max(1, keepdim=True)
        return column, known
    column = target.clamp(0, num_classes - 1)
    return column[:, None], (column == target)[:, None]


def at_explained(target: Tensor, class_index: Tensor | None) -> Tensor:
    """Class probabilities ``[B, C]`` of explained classes, as ``[B, K]``."""
    if class_index is None:
        return target
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if not traced and not class_index.is_meta:
        checks.explained_classes(class_index, target.shape[1])
    known = (class_index >= 0) & (class_index < target.shape[1])
    found = target.gather(1, torch.where(known, class_index, 0))
    return torch.where(known, found, float("nan"))


def among_all(logits: Tensor, class_index: Tensor | None, num_classes: int) -> Tensor:
    """Teacher logits ``[B, C]`` of the explained classes' ``[B, K]``: -inf for all others."""
    if class_index is None:
        return logits
    # A class that does not exist is an ignored row's, or makes its row NaN.
    known = (class_index >= 0) & (class_index < num_classes)
    logits = torch.where(known.all(1, keepdim=True), logits, float("nan"))
    index = torch.where(known, class_index, 0)
    return logits.new_full((len(logits), num_classes), _NEVER).scatter(1, index, logits)


def similarities_of(stats: ExplanationStats, target: Tensor, similarity: Similarity) -> Tensor:
    """Similarities ``[B, K]``, float32 at least, with nothing checked."""
    wide = torch.promote_types(stats.dots.dtype, torch.float32)
    dots, sq_norms = stats.dots.detach().to(wide), stats.sq_norms.detach().to(wide)
    if target.is_floating_point():
        # That of a mixture, <E_y, E_y> = sum_k y_k <E_k, E_y>, is no class's.
        of_target = (at_explained(target, stats.class_index).to(wide) * dots).sum(1, keepdim=True)
        return of_others(dots, sq_norms, of_target.clamp_(min=0), similarity)
    column, known = target_column(target, dots.shape[1], stats.class_index)
    of_target = sq_norms.gather(1, column).masked_fill_(~known, float("nan"))
    of_itself = torch.where(known, 1.0, float("nan")).to(wide)
    return of_others(dots, sq_norms, of_target, similarity).scatter(1, column, of_itself)


def in_range(teacher: TopKTeacher, num_classes: int) -> TopKTeacher:
    """``teacher`` with classes that can be read: a row that has others is NaN."""
    checks.classes_of_teacher(teacher.indices, num_classes)
    known = (teacher.indices >= 0) & (teacher.indices < num_classes)
    log_probs = torch.where(known.all(1, keepdim=True), teacher.log_probs, float("nan"))
    return TopKTeacher(torch.where(known, teacher.indices, 0), log_probs, teacher.tail)


def of_top_k(logits: Tensor, teacher: TopKTeacher) -> tuple[Tensor, Tensor]:
    """Logits of student and teacher ``[B, K or K + 1]`` that are a distribution each.

    The last of K + 1 is the bucket of all other classes: the logarithm of the sum of the student's
    exponentials, and of the probability that the teacher's leave.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    indices, log_probs = teacher.indices, teacher.log_probs.detach()
    student = logits.gather(1, indices).to(wide)
    if teacher.tail == "renormalize" or indices.shape[1] == logits.shape[1]:
        return student, log_probs.to(wide)
    others = logits.to(wide).scatter(1, indices, _NEVER)
    nothing = others.amax(1, keepdim=True) == _NEVER
    # The gradient of a sum of no exponentials would be NaN.
    bucket = others.masked_fill(nothing, 0).logsumexp(1, keepdim=True).masked_fill(nothing, _NEVER)
    missing = (1 - log_probs.double().exp().sum(1, keepdim=True)).clamp_(min=0).log_()
    teacher_logits = torch.cat([log_probs.to(wide), missing.to(wide)], 1)
    return torch.cat([student, bucket], 1), teacher_logits


def of_others(dots: Tensor, sq_norms: Tensor, of_target: Tensor, similarity: Similarity) -> Tensor:
    """Similarities of any classes to the target, whose squared norm ``[B, 1]`` is ``of_target``."""
    # Two roots rather than the root of the product, which would underflow.
    scale = sq_norms.sqrt() * of_target.sqrt() if similarity == "cosine" else of_target
    result = (dots / scale).clamp(-1, 1).masked_fill_(scale == 0, 0)
    # A norm that overflowed says nothing of the angle, and dots / inf would pass for a right one:
    # inf times zero is NaN.
    return result.add_(scale, alpha=0)


def _check(stats: ExplanationStats, target: Tensor, ignore_index: int) -> None:
    checks.stats_and_target(stats, target)
    checks.in_memory(
        {
            "stats.dots": stats.dots,
            "stats.sq_norms": stats.sq_norms,
            "stats.class_index": stats.class_index,
            "target": target,
        }
    )
    checks.integer("ignore_index", ignore_index)
    if target.is_floating_point():
        return
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if not traced and stats.class_index is None:
        checks.target_in_range(target, stats.dots.shape[1], ignore_index)


def _log(mass: float) -> float:
    return math.log(mass) if mass > 0 else _NEVER
