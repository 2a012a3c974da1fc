"""flash-linear-attention's fused KL divergence of two linear heads.

Yang, Zhang, "FLA: A Triton-Based Library for Hardware-Efficient Implementations of Linear
Attention Mechanism", 2024, github.com/fla-org/flash-linear-attention. Not run: no GPU was at hand.
The calls are those of version 0.6.0, checked in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from torch import Tensor

from introkernels.bench.model import Contender, Operator
from introkernels.bench.operators.constants import TEMPERATURE
from introkernels.bench.peers.installed import needs


def prepare(operator: Operator) -> Callable[..., Tensor]:
    """FusedKLDivLoss, which has no temperature: features are divided by it."""
    divergence = import_module("fla.modules.fused_kl_div").FusedKLDivLoss(reduction="batchmean")

    def call(
        features: Tensor,
        weight: Tensor,
        target: Tensor,
        teacher_features: Tensor,
        teacher_weight: Tensor,
    ) -> Tensor:
        kl: Tensor = divergence(
            features / TEMPERATURE, teacher_features / TEMPERATURE, weight, teacher_weight
        )
        return TEMPERATURE**2 * kl

    return call


FLASH_LINEAR_ATTENTION = Contender(
    "fla",
    prepare,
    missing=needs("fla"),
    devices=("cuda",),
    distribution="fla-core",
    made_equal="temperature by dividing both features, T² outside",
)
