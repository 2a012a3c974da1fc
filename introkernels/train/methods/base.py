"""What a training method is, and what it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from introkernels.train.classifier import Classifier
from introkernels.train.data import LabelledImages


@dataclass(frozen=True)
class LossOutput:
    """What a method computes for a batch.

    Attributes:
        loss: scalar that carries the graph: the mean over the batch.
        logits: ``[B, C]``, only for metrics.
        parts: detached scalars to log, by name.
    """

    loss: Tensor
    logits: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What a learner is built from.

    Attributes:
        new_model: makes a network of the kind that is trained, with initial weights of its own.
        classes: number of classes C.
        teacher: the trained network of `Method.teacher`, in evaluation mode and without gradients;
            None for a method without one.
    """

    new_model: Callable[[], Classifier]
    classes: int
    teacher: Classifier | None = None


class Learner(nn.Module, ABC):
    """What is trained: one network or several, and what a method remembers between steps.

    Parameters are optimised, and buffers are kept in checkpoints. `model` is the network that is
    evaluated.
    """

    model: Classifier

    @abstractmethod
    def forward(self, inputs: Tensor, target: Tensor) -> LossOutput:
        """Loss of inputs ``[B, *S]`` with classes ``target [B]`` (int64)."""

    def prepare(self, data: LabelledImages) -> None:
        """Called once, before the first epoch, with the training images as they are stored."""

    def end_epoch(self) -> None:
        """Called after each epoch."""


@dataclass(frozen=True)
class Teacher:
    """A network that has to be trained before a method can start.

    Attributes:
        method: how it is trained.
        model: which network, a name of `introkernels.train.models`; None: the same as is taught.
    """

    method: Method
    model: str | None = None


@dataclass(frozen=True)
class Method(ABC):
    """A way to train a classifier: its hyperparameters are the fields, its idea is the learner.

    Most methods train one network and remember nothing: they define `loss`. The others define
    `learner`, and `loss` is not used.
    """

    name: ClassVar[str]
    """What the method is registered as."""
    summary: ClassVar[str]
    """One sentence for the report: what is minimised."""
    source: ClassVar[str] = ""
    """Where the method comes from: authors, title, year; empty where it is ours or common."""
    introspective: ClassVar[bool] = False
    """Whether the model's own explanations enter the loss."""

    def teacher(self) -> Teacher | None:
        """The network that must be trained before, if there is one."""
        return None

    def learner(self, setting: Setting) -> Learner:
        """What is trained."""
        return _OneNetwork(self, setting.new_model())

    def loss(self, model: Classifier, inputs: Tensor, target: Tensor) -> LossOutput:
        """Loss of inputs ``[B, *S]`` with classes ``target [B]`` (int64)."""
        raise NotImplementedError(f"{type(self).__name__} defines neither loss nor learner")

    def batches(
        self, labels: Tensor, batch_size: int, generator: torch.Generator
    ) -> Iterator[Tensor]:
        """The batches of an epoch, as indices ``[B]`` or ``[B, n]`` of training images.

        Rows of ``[B, n]`` belong together, and are never taken apart: the learner gets their
        images one after the other, ``[B·n, *S]``.

        Args:
            labels: ``[N]`` int64, on the CPU.
            batch_size: largest B.
            generator: of random numbers on the CPU.
        """
        yield from torch.randperm(len(labels), generator=generator).split(batch_size)


class _OneNetwork(Learner):
    """A network trained by the loss of a method."""

    def __init__(self, method: Method, model: Classifier) -> None:
        super().__init__()
        self.method = method
        self.model = model

    def forward(self, inputs: Tensor, target: Tensor) -> LossOutput:
        return self.method.loss(self.model, inputs, target)


class TaughtLearner(Learner):
    """A network that learns from a teacher, which is neither trained nor kept in checkpoints."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        if setting.teacher is None:
            raise ValueError("setting.teacher: got None, expected a trained network")
        self.model = setting.new_model()
        # In a tuple, so that it is no submodule.
        self._teacher = (setting.teacher,)

    @torch.no_grad()
    def teacher_logits(self, inputs: Tensor) -> Tensor:
        """What the teacher says of inputs ``[B, *S]``: logits ``[B, C]``."""
        logits: Tensor = self._teacher[0](inputs)
        return logits


MethodType = TypeVar("MethodType", bound=type[Method])

REGISTRY: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[MethodType], MethodType]:
    """Class decorator that makes a method known under a name."""

    def add(method: MethodType) -> MethodType:
        if name in REGISTRY:
            raise ValueError(f"method {name!r} is registered twice: {REGISTRY[name]} and {method}")
        REGISTRY[name] = method
        method.name = name
        return method

    return add


def require_fraction(name: str, value: float) -> None:
    """Raise ValueError unless ``0 <= value < 1``."""
    if not 0 <= value < 1:
        raise ValueError(f"{name}: got {value}, expected a number in [0, 1)")
