"""Explanation statistics of a whole model: what the losses need, from a forward pass on."""

from introkernels.explain.stats import METHODS, MODES, class_explanation_stats

__all__ = ["METHODS", "MODES", "class_explanation_stats"]
