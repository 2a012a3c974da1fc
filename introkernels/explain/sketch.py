"""Norms of all explanations from a few random probes, beside exact inner products.

The explanation of a class is split into its part along the target's and a residual,
``E_c = a_c E_y + R_c`` with ``a_c = dots_c / sq_norms_y`` known exactly, so that
``sq_norms_c = dots_c^2 / sq_norms_y + |R_c|^2``. Only the residual is estimated. A tangent of
random signs ``r`` gives ``S_c = <E_c, r>`` for all classes at once, and
``(S_c - a_c S_y)^2 = <R_c, r>^2`` has the mean ``|R_c|^2``. The estimate is unbiased, exact where
explanations are collinear, and never makes a cosine larger than 1. Where the target is a mixture
of classes, ``E_y`` and ``S_y`` are its sums.
"""

from __future__ import annotations

import torch

from introkernels.explain.classes import ExplainedClasses, finished
from introkernels.explain.network import Network, Trace
from introkernels.explain.probes import random_signs
from introkernels.explain.projection import projections
from introkernels.explain.request import Request
from introkernels.types import ExplanationStats


def sketch(
    network: Network, trace: Trace, classes: ExplainedClasses, request: Request
) -> ExplanationStats:
    """Exact ``dots`` and ``sq_norms`` of the target; unbiased estimates of the other norms."""
    known = projections(network, trace, classes, request)
    own = known.target_sq_norm[:, None]
    along = torch.where(own > 0, known.dots / own, 0)
    residual = torch.zeros_like(known.dots)
    for _ in range(request.probes):
        signs = tuple(random_signs(value, request.generator) for value in trace.values)
        probed = known.explained(signs)
        residual += (probed - along * classes.of_target(probed)[:, None]).square() / request.probes
    sq_norms = along * known.dots + residual
    return finished(known.dots, sq_norms, known.target_sq_norm, classes)
