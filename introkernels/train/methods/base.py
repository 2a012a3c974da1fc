"""What a training method is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

from torch import Tensor

from introkernels.train.classifier import Classifier


@dataclass(frozen=True)
class LossOutput:
    """What a method computes for a batch.

    Attributes:
        loss: scalar that carries the graph.
        logits: ``[B, C]``, only for metrics.
        parts: detached scalars to log, by name.
    """

    loss: Tensor
    logits: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Method(ABC):
    """A way to train a classifier: its hyperparameters are the fields, its idea is `loss`."""

    summary: ClassVar[str]
    """One sentence for the report: what is minimised."""
    introspective: ClassVar[bool] = False
    """Whether the model's own explanations enter the loss."""

    @abstractmethod
    def loss(self, model: Classifier, inputs: Tensor, target: Tensor) -> LossOutput:
        """Loss of inputs ``[B, *S]`` with classes ``target [B]`` (int64)."""


MethodType = TypeVar("MethodType", bound=type[Method])

REGISTRY: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[MethodType], MethodType]:
    """Class decorator that makes a method known under a name."""

    def add(method: MethodType) -> MethodType:
        if name in REGISTRY:
            raise ValueError(f"method {name!r} is registered twice: {REGISTRY[name]} and {method}")
        REGISTRY[name] = method
        return method

    return add


def require_fraction(name: str, value: float) -> None:
    """Raise ValueError unless ``0 <= value < 1``."""
    if not 0 <= value < 1:
        raise ValueError(f"{name}: got {value}, expected a number in [0, 1)")
