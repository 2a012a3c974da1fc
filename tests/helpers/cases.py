"""Random calls of the losses, held as data so that any backend and the oracle can make them.

Every builder of :data:`BUILDERS` takes ``(rows, classes, dtype)``, the names of further dtypes and
sizes, and the loss's own keywords. Random numbers come from the global generator, which a fixture
seeds for each test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import introkernels as ik


@dataclass(frozen=True)
class Case:
    """One call: ``function(*tensors, **keywords)``, and the tensors to differentiate by.

    ``tensors`` are in the order of the function's arguments. ``dots``, ``sq_norms`` and
    ``stats_index`` stand for the one argument ``stats``.
    """

    function: str
    tensors: dict[str, Tensor | None]
    keywords: dict[str, Any] = field(default_factory=dict)
    differentiable: tuple[str, ...] = ("logits",)

    @property
    def shape(self) -> torch.Size:
        """The shape of a loss whose reduction is none."""
        target = self["target"]
        if not target.is_floating_point():
            return target.shape
        return target.shape[:1] + target.shape[2:]

    @property
    def rows(self) -> int:
        """How many rows the loss has."""
        return self.shape.numel()

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name] if name in self.tensors else self.keywords[name]
        assert isinstance(tensor, Tensor)
        return tensor

    def arguments(self) -> list[Any]:
        """The positional arguments of the call."""
        return call_arguments(self.tensors)

    def with_keywords(self, **keywords: Any) -> Case:
        """The same tensors under other keywords."""
        return replace(self, keywords={**self.keywords, **keywords})

    def with_tensors(self, **tensors: Tensor | None) -> Case:
        """The same call of other tensors."""
        unknown = tensors.keys() - self.tensors.keys()
        assert not unknown, f"{self.function} has no {unknown}"
        return replace(self, tensors={**self.tensors, **tensors})

    def upcast(self) -> Case:
        """The same numbers in float64."""

        def double(value: Any) -> Any:
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return value.double() if floating else value

        return replace(
            self,
            tensors={name: double(value) for name, value in self.tensors.items()},
            keywords={name: double(value) for name, value in self.keywords.items()},
        )


def call_arguments(tensors: dict[str, Tensor | None]) -> list[Any]:
    """Tensors as positional arguments, with the statistics put together."""
    arguments: list[Any] = []
    for name, tensor in tensors.items():
        if name == "dots":
            arguments.append(
                ik.ExplanationStats(tensor, tensors["sq_norms"], tensors["stats_index"])
            )
        elif name not in ("sq_norms", "stats_index"):
            arguments.append(tensor)
    return arguments


def random_target(rows: int, classes: int, ignored: int = 0, ignore_index: int = -100) -> Tensor:
    """Random classes, of which ``ignored`` rows spread over the batch hold ``ignore_index``."""
    target = torch.randint(classes, (rows,))
    target[torch.randperm(rows)[:ignored]] = ignore_index
    return target


def random_class_index(target: Tensor, classes: int, explained: int) -> Tensor:
    """``[B, K]``: distinct random classes of each row, its target somewhere among them."""
    order = torch.rand(len(target), classes)
    in_range = (target >= 0) & (target < classes)
    chosen = target.clamp(0, classes - 1)[:, None]
    order.scatter_(1, chosen, torch.where(in_range[:, None], 2.0, order.gather(1, chosen)))
    index = order.topk(explained, 1).indices
    shuffled = torch.rand(index.shape).argsort(1)
    return index.gather(1, shuffled)


def random_explanations(
    rows: int, explained: int, shape: tuple[int, ...], dtype: torch.dtype, inputs_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients ``[B, K, *S]`` whose classes are correlated, as those of a model, and inputs."""
    common = torch.randn(rows, 1, *shape)
    gradients = torch.randn(rows, explained, *shape) + 0.7 * common
    return gradients.to(dtype), torch.randn(rows, *shape).to(inputs_dtype)


def _class_weights(wanted: bool, classes: int, dtype: torch.dtype) -> Tensor | None:
    return (torch.rand(classes) + 0.1).to(dtype) if wanted else None


def distillation_case(
    rows: int = 5,
    classes: int = 10,
    dtype: torch.dtype = torch.float32,
    *,
    teacher_dtype: torch.dtype | None = None,
    scale: float = 3.0,
    ignored: int = 0,
    class_weights: bool = False,
    **keywords: Any,
) -> Case:
    """Normal logits and teacher logits of standard deviation ``scale``."""
    return Case(
        "distillation_loss",
        {
            "logits": (scale * torch.randn(rows, classes)).to(dtype),
            "teacher_logits": (scale * torch.randn(rows, classes)).to(teacher_dtype or dtype),
            "target": random_target(rows, classes, ignored, keywords.get("ignore_index", -100)),
        },
        {"weight": _class_weights(class_weights, classes, dtype), **keywords},
    )


def similarity_case(
    rows: int = 5,
    classes: int = 10,
    dtype: torch.dtype = torch.float32,
    *,
    stats_dtype: torch.dtype | None = None,
    explained: int | None = None,
    scale: float = 3.0,
    ignored: int = 0,
    class_weights: bool = False,
    **keywords: Any,
) -> Case:
    """Statistics of random 8-dimensional explanations, of ``explained`` classes where given."""
    target = random_target(rows, classes, ignored, keywords.get("ignore_index", -100))
    index = None if explained is None else random_class_index(target, classes, explained)
    gradients, inputs = random_explanations(
        rows, explained or classes, (8,), torch.float64, torch.float64
    )
    dots, sq_norms, _ = ik.reference.explanation_stats(
        gradients,
        inputs,
        target,
        class_index=index,
        ignore_index=keywords.get("ignore_index", -100),
    )
    if stats_dtype is None:
        stats_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return Case(
        "similarity_loss",
        {
            "logits": (scale * torch.randn(rows, classes)).to(dtype),
            "target": target,
            "dots": dots.to(stats_dtype),
            "sq_norms": sq_norms.to(stats_dtype),
            "stats_index": index,
        },
        {"weight": _class_weights(class_weights, classes, dtype), **keywords},
    )


def introspective_case(
    rows: int = 5,
    classes: int = 10,
    dtype: torch.dtype = torch.float32,
    *,
    shape: tuple[int, ...] = (17,),
    gradients_dtype: torch.dtype | None = None,
    inputs_dtype: torch.dtype | None = None,
    explained: int | None = None,
    scale: float = 3.0,
    ignored: int = 0,
    class_weights: bool = False,
    **keywords: Any,
) -> Case:
    """Random gradients and inputs of ``shape``, of ``explained`` classes where given."""
    target = random_target(rows, classes, ignored, keywords.get("ignore_index", -100))
    gradients, inputs = random_explanations(
        rows, explained or classes, shape, gradients_dtype or dtype, inputs_dtype or dtype
    )
    index = None if explained is None else random_class_index(target, classes, explained)
    return Case(
        "introspective_loss",
        {
            "logits": (scale * torch.randn(rows, classes)).to(dtype),
            "target": target,
            "gradients": gradients,
            "inputs": inputs,
        },
        {
            "weight": _class_weights(class_weights, classes, dtype),
            "class_index": index,
            **keywords,
        },
    )


def linear_case(
    rows: int = 5,
    classes: int = 10,
    dtype: torch.dtype = torch.float32,
    *,
    width: int = 17,
    weight_dtype: torch.dtype | None = None,
    bias: bool = True,
    scale: float = 3.0,
    ignored: int = 0,
    class_weights: bool = False,
    **keywords: Any,
) -> Case:
    """A head whose logits have standard deviation ``scale``; rows are features ``[B, width]``."""
    weight_dtype = weight_dtype or dtype
    return Case(
        "linear_introspective_loss",
        {
            "features": torch.randn(rows, width).to(dtype),
            "weight": (torch.randn(classes, width) * scale / max(width, 1) ** 0.5).to(weight_dtype),
            "target": random_target(rows, classes, ignored, keywords.get("ignore_index", -100)),
            "bias": torch.randn(classes).to(weight_dtype) if bias else None,
        },
        {"class_weight": _class_weights(class_weights, classes, dtype), **keywords},
        differentiable=("features", "weight", "bias") if bias else ("features", "weight"),
    )


def linear_distillation_case(
    rows: int = 5,
    classes: int = 10,
    dtype: torch.dtype = torch.float32,
    *,
    width: int = 17,
    weight_dtype: torch.dtype | None = None,
    teacher_dtype: torch.dtype | None = None,
    bias: bool = True,
    scale: float = 3.0,
    ignored: int = 0,
    class_weights: bool = False,
    **keywords: Any,
) -> Case:
    """A head as `linear_case` makes it, with teacher logits of standard deviation ``scale``."""
    weight_dtype = weight_dtype or dtype
    return Case(
        "linear_distillation_loss",
        {
            "features": torch.randn(rows, width).to(dtype),
            "weight": (torch.randn(classes, width) * scale / max(width, 1) ** 0.5).to(weight_dtype),
            "teacher_logits": (scale * torch.randn(rows, classes)).to(teacher_dtype or dtype),
            "target": random_target(rows, classes, ignored, keywords.get("ignore_index", -100)),
            "bias": torch.randn(classes).to(weight_dtype) if bias else None,
        },
        {"class_weight": _class_weights(class_weights, classes, dtype), **keywords},
        differentiable=("features", "weight", "bias") if bias else ("features", "weight"),
    )


BUILDERS: dict[str, Callable[..., Case]] = {
    "distillation_loss": distillation_case,
    "similarity_loss": similarity_case,
    "introspective_loss": introspective_case,
    "linear_introspective_loss": linear_case,
    "linear_distillation_loss": linear_distillation_case,
}
WITH_LABELS = ("similarity_loss", "introspective_loss", "linear_introspective_loss")
HEADS = ("linear_introspective_loss", "linear_distillation_loss")
