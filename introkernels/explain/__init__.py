"""Explanation statistics of a whole model: what the losses need, from a forward pass on."""

from introkernels.explain.compare import MethodAgreement, MethodComparison, compare_methods
from introkernels.explain.explainers import (
    EXPLAINERS,
    Explainer,
    Gradient,
    GradientXInput,
    IntegratedGradients,
    SmoothGrad,
)
from introkernels.explain.jvp import JVPS
from introkernels.explain.stats import METHODS, MODES, class_explanation_stats
from introkernels.teachers import similarities

__all__ = [
    "EXPLAINERS",
    "JVPS",
    "METHODS",
    "MODES",
    "Explainer",
    "Gradient",
    "GradientXInput",
    "IntegratedGradients",
    "MethodAgreement",
    "MethodComparison",
    "SmoothGrad",
    "class_explanation_stats",
    "compare_methods",
    "similarities",
]
