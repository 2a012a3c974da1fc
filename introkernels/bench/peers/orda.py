"""orda-kernel's distillation of a linear head from another one.

github.com/hiwuhgds-pixel/ORDA-Knowledge-Distillation-Kernel, version 0.1.0. Run on a CPU, where it
computes with PyTorch; its Triton kernels not run: no GPU was at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from torch import Tensor

from introkernels.bench.model import Contender, Operator
from introkernels.bench.operators.constants import TEMPERATURE
from introkernels.bench.peers.installed import needs


def prepare(operator: Operator) -> Callable[..., Tensor]:
    """distillation_loss with the KL divergence alone, from a teacher with a head of its own."""
    orda = import_module("orda_kernel")

    def call(
        features: Tensor,
        weight: Tensor,
        target: Tensor,
        teacher_features: Tensor,
        teacher_weight: Tensor,
    ) -> Tensor:
        result = orda.distillation_loss(
            features,
            weight,
            target,
            orda.SeparateTeacher(teacher_features, teacher_weight),
            student_ce_weight=0.0,
            kl_weight=1.0,
            kl_temperature=TEMPERATURE,
            # Named, as its "auto" warns on a CPU, and would hide that a kernel didn't run.
            backend="triton" if features.is_cuda else "torch",
        )
        loss: Tensor = result.loss
        return loss

    return call


ORDA = Contender(
    "orda",
    prepare,
    missing=needs("orda_kernel"),
    distribution="orda-kernel",
    made_equal=f"weights 0 and 1 of cross entropy and KL, temperature {TEMPERATURE:g}; T² is its "
    "own",
)
