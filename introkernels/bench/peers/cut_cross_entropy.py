"""Apple's Cut Cross-Entropy of a linear head.

Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", ICLR 2025, arXiv:2411.09009.
Not run: no GPU was at hand. The calls are those of version 25.1.1.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from torch import Tensor

from introkernels.bench.model import Contender, Operator
from introkernels.bench.peers.installed import needs


def prepare(operator: Operator) -> Callable[..., Tensor]:
    """linear_cross_entropy of ``features [B, D]`` and ``weight [C, D]``, without its filter."""
    loss = import_module("cut_cross_entropy").linear_cross_entropy

    def call(features: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        result: Tensor = loss(features, weight, target, filter_eps=None)
        return result

    return call


CUT_CROSS_ENTROPY = Contender(
    "cut-cross-entropy",
    prepare,
    missing=needs("cut_cross_entropy"),
    devices=("cuda",),
    distribution="cut-cross-entropy",
    made_equal="small gradients are kept (filter_eps=None)",
)
