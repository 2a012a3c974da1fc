"""Whole training steps of a network, one recipe beside the other.

A step is a forward pass, what the recipe adds to it, the loss, its backward and an update by SGD.
Recipes have losses of their own, so that there is nothing to compare: what counts is how long a
step takes beside the plain one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

import introkernels as ik
from introkernels.bench.model import Contender, Operator, Role, Sizes, Tensors
from introkernels.bench.operators.constants import INDEX_BYTES, LOSS_BYTES
from introkernels.bench.tables import PLAIN
from introkernels.explain.stats import Method
from introkernels.train.classifier import Classifier
from introkernels.train.models import make_model

IMAGE = (3, 32, 32)
# Of the last layer's inputs, in both networks.
WIDTH = 64
LEARNING_RATE = 0.01
MOMENTUM = 0.9
SMOOTHING = 0.1

_SEED = 0

Loss = Callable[[Tensor, Tensor], Tensor]
"""A scalar from images ``[B, 3, 32, 32]`` and targets ``[B]``."""


def plain(model: Classifier) -> Loss:
    """Cross entropy."""
    return lambda images, target: F.cross_entropy(model(images), target)


def smoothing(model: Classifier) -> Loss:
    """Cross entropy with smoothed labels."""
    return lambda images, target: F.cross_entropy(model(images), target, label_smoothing=SMOOTHING)


def teacher(model: Classifier) -> Loss:
    """Distillation from a frozen network of the same kind, which sees the same images."""
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    return lambda images, target: ik.distillation_loss(model(images), frozen(images), target)


def introspective(method: Method, model: Classifier) -> Loss:
    """The introspective loss of a training loop, by one of its ways to explain."""
    objective = ik.IntrospectiveObjective(model, method=method)
    return lambda images, target: objective(images, target)


def fused_head(model: Classifier) -> Loss:
    """Explanations of the features, in one operator with the last layer."""
    return lambda images, target: ik.linear_introspective_loss(
        model.features(images), model.head.weight, target, model.head.bias
    )


class TrainingStep:
    """A network in training: ``step(images, target, head)`` does one step and returns its loss.

    The network is made in the first call, on the device of the images: the same weights for every
    recipe, those of the last layer from ``head``.

    Args:
        network: a name of `introkernels.train.models.MODELS`.
        recipe: makes the loss of a network.
    """

    def __init__(self, network: str, recipe: Callable[[Classifier], Loss]) -> None:
        self._network = network
        self._recipe = recipe
        self._training: tuple[Loss, torch.optim.Optimizer] | None = None

    def __call__(self, images: Tensor, target: Tensor, head: Tensor) -> Tensor:
        if self._training is None:
            self._training = self._started(head)
        compute_loss, optimizer = self._training
        optimizer.zero_grad()
        loss = compute_loss(images, target)
        loss.backward()
        optimizer.step()
        return loss

    def _started(self, head: Tensor) -> tuple[Loss, torch.optim.Optimizer]:
        with torch.random.fork_rng([]):
            torch.manual_seed(_SEED)
            model = make_model(self._network, IMAGE, len(head)).to(head.device).train()
        with torch.no_grad():
            model.head.weight.copy_(head)
            model.head.bias.zero_()
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
        return self._recipe(model), optimizer


def _prepare(
    network: str, recipe: Callable[[Classifier], Loss], operator: Operator
) -> TrainingStep:
    return TrainingStep(network, recipe)


def _draw(sizes: Sizes, dtype: torch.dtype, generator: Generator) -> Tensors:
    """Normalised images, targets, and weights of a fresh last layer."""
    B, C = sizes["B"], sizes["C"]
    return {
        "images": torch.randn(B, *IMAGE, generator=generator).to(dtype),
        "target": torch.randint(C, (B,), generator=generator),
        "head": torch.randn(C, WIDTH, generator=generator).mul_(WIDTH**-0.5).to(dtype),
    }


def _bytes(sizes: Sizes, element: int) -> int:
    """Images, targets and the last layer's weights in, the loss out; nothing of the network."""
    numbers = sizes["B"] * math.prod(IMAGE) + sizes["C"] * WIDTH
    return numbers * element + sizes["B"] * INDEX_BYTES + LOSS_BYTES


_RECIPES: tuple[tuple[str, Callable[[Classifier], Loss], Role], ...] = (
    (PLAIN, plain, "other"),
    ("smoothing", smoothing, "other"),
    ("teacher", teacher, "other"),
    ("fused head", fused_head, "ours"),
    ("head", partial(introspective, "head"), "ours"),
    ("projection", partial(introspective, "projection"), "ours"),
    ("sketch", partial(introspective, "sketch"), "ours"),
    ("exact", partial(introspective, "exact"), "ours"),
)


def _steps_of(network: str) -> Operator:
    return Operator(
        name=f"step-{network}",
        dims=("B", "C"),
        draw=_draw,
        outputs=("loss",),
        differentiable=(),
        largest="images",
        compute=None,
        eager=None,
        definition=None,
        bytes_moved=_bytes,
        shared=("head",),
        contenders=tuple(
            Contender(name, partial(_prepare, network, recipe), role)
            for name, recipe, role in _RECIPES
        ),
    )


STEP_SMALL_CNN = _steps_of("small_cnn")
STEP_RESNET20 = _steps_of("resnet20")
