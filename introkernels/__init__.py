"""Introspective learning: a classifier's explanations as its own soft labels, in fused kernels."""

from introkernels import backends, explain, reference
from introkernels._version import __version__
from introkernels.backends import build_info
from introkernels.functional import (
    distillation_loss,
    explanation_stats,
    introspective_loss,
    linear_distillation_loss,
    linear_introspective_loss,
    similarity_loss,
)
from introkernels.modules import (
    DistillationLoss,
    IntrospectiveLoss,
    LinearDistillationLoss,
    LinearIntrospectiveLoss,
    SimilarityLoss,
)
from introkernels.objective import IntrospectiveObjective
from introkernels.ops.select import use_backend
from introkernels.teachers import soft_labels, teacher_logits
from introkernels.types import ExplanationStats, LinearTeacher, LossParts, Teacher, TopKTeacher

__all__ = [
    "DistillationLoss",
    "ExplanationStats",
    "IntrospectiveLoss",
    "IntrospectiveObjective",
    "LinearDistillationLoss",
    "LinearIntrospectiveLoss",
    "LinearTeacher",
    "LossParts",
    "SimilarityLoss",
    "Teacher",
    "TopKTeacher",
    "__version__",
    "backends",
    "build_info",
    "distillation_loss",
    "explain",
    "explanation_stats",
    "introspective_loss",
    "linear_distillation_loss",
    "linear_introspective_loss",
    "reference",
    "similarity_loss",
    "soft_labels",
    "teacher_logits",
    "use_backend",
]
