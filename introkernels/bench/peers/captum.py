"""Captum's InputXGradient, called once for each class.

Kokhlikyan et al., "Captum: A unified and generic model interpretability library for PyTorch",
2020, arXiv:2009.07896.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from introkernels.bench.model import Contender, Operator
from introkernels.bench.operators.network import Network
from introkernels.bench.peers.installed import needs


def prepare(operator: Operator) -> Callable[..., tuple[Tensor, Tensor]]:
    """Explanations of all classes of a network, and their inner products.

    It explains one class of a row in a call, so there is a call for the targets and one for each
    class.
    """
    attr = import_module("captum.attr")

    def call(
        images: Tensor, target: Tensor, conv1: Tensor, conv2: Tensor, head: Tensor
    ) -> tuple[Tensor, Tensor]:
        attribution = attr.InputXGradient(Network(conv1, conv2, head))
        leaf = images.detach().requires_grad_()
        of_target = attribution.attribute(leaf, target=target).flatten(1)
        dots, sq_norms = [], []
        for index in range(head.shape[0]):
            explanation = attribution.attribute(leaf, target=index).flatten(1)
            dots.append((explanation * of_target).sum(1))
            sq_norms.append(explanation.square().sum(1))
        return torch.stack(dots, 1), torch.stack(sq_norms, 1)

    return call


CAPTUM = Contender(
    "captum",
    prepare,
    missing=needs("captum"),
    distribution="captum",
    made_equal="one call for the targets and one for each class; inner products by PyTorch",
)
