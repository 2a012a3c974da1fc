"""What the caller asks of every method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from introkernels.explain.explainers import Explainer
from introkernels.explain.jvp import Jvp


@dataclass(frozen=True)
class Request:
    """The checked arguments of ``class_explanation_stats``, but for the model and its state."""

    target: Tensor
    explainer: Explainer
    at: str | None
    probes: int
    top_k: int | None
    chunk: int | None
    center: bool
    jvp: Jvp
    generator: torch.Generator | None
    ignore_index: int
