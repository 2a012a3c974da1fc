"""torchdistill's KDLoss: distillation in plain PyTorch.

Matsubara, "torchdistill: A Modular, Configuration-Driven Framework for Knowledge Distillation",
RRPR 2021, arXiv:2011.12913. Its loss needs none of the packages that it requires beside torch:
``pip install --no-deps torchdistill``.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from torch import Tensor

from introkernels.bench.model import Contender, Operator
from introkernels.bench.operators.constants import CE_WEIGHT, KL_WEIGHT, TEMPERATURE
from introkernels.bench.peers.installed import needs

_MODEL, _OUTPUT = "model", "output"


def prepare(operator: Operator) -> Callable[..., Tensor]:
    """KDLoss of ``logits, teacher_logits [B, C]`` and ``target [B]``."""
    losses = import_module("torchdistill.losses.mid_level")
    place = (_MODEL, _OUTPUT)
    loss = losses.KDLoss(*place, *place, temperature=TEMPERATURE, alpha=CE_WEIGHT, beta=KL_WEIGHT)

    def call(logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        # It reads outputs of hooked modules by name.
        student, teacher = (
            {_MODEL: {_OUTPUT: tensor.float()}} for tensor in (logits, teacher_logits)
        )
        result: Tensor = loss(student, teacher, target)
        return result

    return call


TORCHDISTILL = Contender(
    "torchdistill",
    prepare,
    missing=needs("torchdistill"),
    distribution="torchdistill",
    made_equal=f"alpha {CE_WEIGHT}, beta {KL_WEIGHT}, temperature {TEMPERATURE:g}; half inputs "
    "in float32",
)
