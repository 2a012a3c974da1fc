"""Exact inner products with the target's explanation, at a cost that does not depend on C.

With ``E_c = g_c * f``, where ``f`` is the explainer's factor and ``J`` the Jacobian of the logits,
the tangent ``f * E_y`` gives ``(J (f * E_y))_c = <g_c, f * E_y> = <E_c, E_y>`` for all classes at
once. ``E_y`` may be that of a mixture of classes.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from introkernels import checks
from introkernels.explain.classes import ExplainedClasses, finished, sq_norm, wide_dtype
from introkernels.explain.exact import target_gradient
from introkernels.explain.explainers import Tensors
from introkernels.explain.jvp import Products, products
from introkernels.explain.network import Network, Trace
from introkernels.explain.request import Request
from introkernels.types import ExplanationStats

# Where rows are coupled, or the model is another one at each pass, they are off by about 1.
_DISAGREEMENT = 0.1


def projection(
    network: Network, trace: Trace, classes: ExplainedClasses, request: Request
) -> ExplanationStats:
    """Exact ``dots``; ``sq_norms`` is the target's in each column.

    So ``similarity="projection"``, which divides by the target's alone, is exact.
    """
    known = projections(network, trace, classes, request)
    target_sq_norm = known.target_sq_norm[:, None].expand_as(known.dots)
    return finished(known.dots, target_sq_norm, known.target_sq_norm, classes)


class Projections(NamedTuple):
    """Exact numbers, and the means for more of them.

    Attributes:
        dots: ``[B, K]``, of the explained classes.
        target_sq_norm: ``[B]``.
        explained: from tangents ``t`` to ``[B, K]``, ``<E_c, t>`` of the explained classes.
    """

    dots: Tensor
    target_sq_norm: Tensor
    explained: Products


def projections(
    network: Network, trace: Trace, classes: ExplainedClasses, request: Request
) -> Projections:
    """The inner products of each explained class with the target.

    Raises:
        ValueError: rows depend on each other, or passes differ, where values may be read.
    """
    jacobian = products(network, trace.positions, request.jvp)

    def explained(tangents: Tensors) -> Tensor:
        all_classes = jacobian(_times(tangents, trace.factor))
        some = all_classes.gather(1, classes.index) if classes.chosen else all_classes
        return some - some.mean(1, keepdim=True) if request.center else some

    gradient = tuple(g[0] for g in target_gradient(trace, classes, request))
    explanation = _times(gradient, trace.factor)
    target_sq_norm = sq_norm(explanation)
    dots = explained(explanation)
    _check(dots, target_sq_norm, classes)
    return Projections(dots, target_sq_norm, explained)


def _times(tensors: Tensors, factor: Tensors | None) -> Tensors:
    """Products in float32 at least: those of half-precision gradients and inputs underflow."""
    if factor is None:
        return tensors
    wide = wide_dtype(*tensors, *factor)
    return tuple(t.to(wide) * f.to(wide) for t, f in zip(tensors, factor, strict=True))


def _check(dots: Tensor, target_sq_norm: Tensor, classes: ExplainedClasses) -> None:
    """The target's explanation was found in two ways: do they agree?"""
    if not checks.values_are_readable(dots):
        return
    difference = (classes.of_target(dots) - target_sq_norm).abs()
    # NaN, as in a row of NaN inputs, is no disagreement. One row among thousands is off by as much
    # from rounding alone where the model computes in half precision; all together are not.
    counted = classes.live & classes.known & ~difference.isnan()
    wrong = difference[counted].sum() > _DISAGREEMENT * target_sq_norm[counted].sum()
    if wrong:
        raise ValueError(
            "a row's explanation must depend on that row alone and be the same in each forward "
            "pass, but two ways to compute the target's disagree. The model mixes the rows of a "
            "batch, draws random numbers of its own, computes with its inputs under "
            "torch.no_grad() (only jvp='double_backward' takes that as a constant), or has a "
            "wrong derivative: use method='exact'"
        )
