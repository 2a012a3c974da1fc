"""Gradient x input of every class of a network, to the statistics that a loss needs of it."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

import introkernels as ik
from introkernels.bench.model import Operator, Sizes, Tensors
from introkernels.bench.operators.constants import INDEX_BYTES, STATISTIC_BYTES
from introkernels.bench.operators.network import STRIDE, Network
from introkernels.bench.peers.captum import CAPTUM

CHANNELS = (3, 16, 32)
_KERNEL = (3, 3)


def explanations_eager(
    images: Tensor, target: Tensor, conv1: Tensor, conv2: Tensor, head: Tensor
) -> tuple[Tensor, Tensor]:
    """One forward pass; a backward for the targets and one for each class."""
    leaf = images.detach().requires_grad_()
    with torch.enable_grad():
        logits = Network(conv1, conv2, head)(leaf)

    def explanation(logit: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(logit.sum(), leaf, retain_graph=True)
        return (gradient * images).flatten(1)

    of_target = explanation(logits.gather(1, target[:, None]))
    dots, sq_norms = [], []
    for index in range(logits.shape[1]):
        of_class = explanation(logits[:, index])
        dots.append((of_class * of_target).sum(1))
        sq_norms.append(of_class.square().sum(1))
    return torch.stack(dots, 1), torch.stack(sq_norms, 1)


def _explanations(
    images: Tensor, target: Tensor, conv1: Tensor, conv2: Tensor, head: Tensor
) -> tuple[Tensor, Tensor]:
    model = Network(conv1, conv2, head)
    _, stats = ik.explain.class_explanation_stats(model, images, target, method="exact")
    return stats.dots, stats.sq_norms


def _definition(
    images: Tensor, target: Tensor, conv1: Tensor, conv2: Tensor, head: Tensor
) -> tuple[Tensor, Tensor]:
    """From the whole Jacobian of each row's logits."""
    network = Network(conv1, conv2, head)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda image: network(image[None])[0]))(images)
    explanations = (jacobian * images[:, None]).flatten(2)
    of_target = explanations[torch.arange(len(target), device=target.device), target]
    return (explanations * of_target[:, None]).sum(-1), explanations.square().sum(-1)


def _draw(sizes: Sizes, dtype: torch.dtype, generator: Generator) -> Tensors:
    """Normalised images, and weights of fresh layers before rectifiers (He et al., ICCV 2015)."""
    B, C, H = sizes["B"], sizes["C"], sizes["H"]
    colours, first, second = CHANNELS

    def weights(*shape: int) -> Tensor:
        scale = math.sqrt(2 / math.prod(shape[1:]))
        return torch.randn(shape, generator=generator).mul_(scale).to(dtype)

    return {
        "images": torch.randn(B, colours, H, H, generator=generator).to(dtype),
        "target": torch.randint(C, (B,), generator=generator),
        "conv1": weights(first, colours, *_KERNEL),
        "conv2": weights(second, first, *_KERNEL),
        "head": weights(C, second),
    }


def _bytes(sizes: Sizes, element: int) -> int:
    """Images, weights and targets in; two statistics of each class out."""
    B, C, H = sizes["B"], sizes["C"], sizes["H"]
    numbers = B * CHANNELS[0] * H * H + _weights_of_convolutions() + C * CHANNELS[2]
    return numbers * element + B * INDEX_BYTES + 2 * B * C * STATISTIC_BYTES


def _flops(sizes: Sizes) -> int:
    """Of both convolutions, once forward and once backward for each class, padding counted."""
    B, C, H = sizes["B"], sizes["C"], sizes["H"]
    colours, first, second = CHANNELS
    taps = math.prod(_KERNEL)
    side = math.ceil(H / STRIDE)
    products = side**2 * first * colours * taps + math.ceil(side / STRIDE) ** 2 * second * (
        first * taps
    )
    return 2 * B * products * (1 + C)


def _weights_of_convolutions() -> int:
    colours, first, second = CHANNELS
    return math.prod(_KERNEL) * (colours * first + first * second)


EXPLANATIONS = Operator(
    name="explanations",
    dims=("B", "C", "H"),
    draw=_draw,
    outputs=("dots", "sq_norms"),
    differentiable=(),
    largest="images",
    compute=_explanations,
    eager=explanations_eager,
    definition=_definition,
    bytes_moved=_bytes,
    flops=_flops,
    shared=("conv1", "conv2", "head"),
    contenders=(CAPTUM,),
)
