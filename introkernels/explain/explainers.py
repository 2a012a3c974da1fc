"""What an explanation is: gradients at one or several positions, averaged, times a factor.

All of them are linear in the model's Jacobian, which is why each works with every method: the
explanation of class ``c`` is ``E_c = factor * mean_k dz_c/dx (x_k)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from introkernels import checks

Tensors = tuple[Tensor, ...]


class Position(NamedTuple):
    """A point at which the model is differentiated, and its weight in the average."""

    weight: float
    values: Tensors


class Explainer(ABC):
    """A way to explain a logit by the gradient to what is explained, the input or features."""

    @property
    def is_local(self) -> bool:
        """Whether the gradient is taken at the explained values, and nowhere else."""
        return True

    def positions(self, values: Tensors, generator: torch.Generator | None) -> Iterator[Position]:
        """Where to differentiate; the weights add up to 1."""
        yield Position(1.0, values)

    @abstractmethod
    def factor(self, values: Tensors) -> Tensors | None:
        """What averaged gradients are multiplied by, of the shapes of ``values``; None: by 1."""


@dataclass(frozen=True)
class GradientXInput(Explainer):
    """``E_c = dz_c/dx * x`` (Shrikumar et al. 2016, arXiv:1605.01713), Captum's InputXGradient."""

    def factor(self, values: Tensors) -> Tensors:
        return values


@dataclass(frozen=True)
class Gradient(Explainer):
    """``E_c = dz_c/dx`` (Simonyan et al. 2013, arXiv:1312.6034), with its sign."""

    def factor(self, values: Tensors) -> None:
        return None


@dataclass(frozen=True, eq=False)  # a baseline of tensors has no truth value
class IntegratedGradients(Explainer):
    """``E_c = (x - b) * integral of dz_c/dx from b to x`` (Sundararajan et al. 2017,
    arXiv:1703.01365), by Gauss-Legendre quadrature. Costs ``steps`` times the passes.

    Attributes:
        steps: positions on the way from the baseline, at least 1.
        baseline: a number, a tensor that broadcasts to the explained one, or a tuple with one of
            these for each explained tensor.

    Raises:
        TypeError, ValueError: for ``steps`` that is no positive int.
    """

    steps: int = 16
    baseline: float | Tensor | tuple[float | Tensor, ...] = 0.0

    def __post_init__(self) -> None:
        checks.positive_integer("steps", self.steps)

    @property
    def is_local(self) -> bool:
        return False

    def positions(self, values: Tensors, generator: torch.Generator | None) -> Iterator[Position]:
        nodes, weights = numpy.polynomial.legendre.leggauss(self.steps)
        differences = self.factor(values)
        # From [-1, 1] to [0, 1], where the weights add up to 1; written from the end of the way,
        # so that no baseline has to be broadcast.
        for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
            way_left = 1 - float(node)
            yield Position(
                float(weight),
                tuple(v - way_left * d for v, d in zip(values, differences, strict=True)),
            )

    def factor(self, values: Tensors) -> Tensors:
        given = self.baseline
        baselines = given if isinstance(given, tuple) else (given,) * len(values)
        if len(baselines) != len(values):
            raise ValueError(
                f"baseline must have one entry for each explained tensor ({len(values)}), "
                f"got {len(baselines)}"
            )
        differences = tuple(v - b for v, b in zip(values, baselines, strict=True))
        for difference, value, baseline in zip(differences, values, baselines, strict=True):
            if difference.shape != value.shape:
                raise ValueError(
                    f"baseline must broadcast to {checks.describe(value)}, got "
                    f"{checks.describe(baseline)}"
                )
        return tuple(d.to(v.dtype) for d, v in zip(differences, values, strict=True))


@dataclass(frozen=True)
class SmoothGrad(Explainer):
    """The mean gradient of noisy copies (Smilkov et al. 2017, arXiv:1706.03825).

    Costs ``samples`` times the passes.

    Attributes:
        samples: noisy copies, at least 1.
        noise: standard deviation of the normal noise, as a fraction of the range (largest minus
            smallest value) of a row's explained tensor; Smilkov et al. recommend 0.1 to 0.2.

    Raises:
        TypeError, ValueError: for ``samples`` that is no positive int, ``noise`` not positive.
    """

    samples: int = 8
    noise: float = 0.15

    def __post_init__(self) -> None:
        checks.positive_integer("samples", self.samples)
        checks.positive("noise", self.noise)

    @property
    def is_local(self) -> bool:
        return False

    def positions(self, values: Tensors, generator: torch.Generator | None) -> Iterator[Position]:
        for _ in range(self.samples):
            yield Position(1 / self.samples, tuple(self._noisy(v, generator) for v in values))

    def _noisy(self, value: Tensor, generator: torch.Generator | None) -> Tensor:
        normal = torch.randn(
            value.shape, generator=generator, dtype=torch.float32, device=value.device
        )
        if not value.numel():
            return value
        rows = value.reshape(len(value), -1)
        spread = (rows.amax(1) - rows.amin(1)).reshape(-1, *(1,) * (value.dim() - 1))
        return value + self.noise * spread * normal.to(value.dtype)

    def factor(self, values: Tensors) -> None:
        return None


EXPLAINERS: dict[str, type[Explainer]] = {
    "gradient_x_input": GradientXInput,
    "gradient": Gradient,
    "integrated_gradients": IntegratedGradients,
    "smoothgrad": SmoothGrad,
}
"""Every explainer by the name that ``explainer=`` takes for its default settings."""


def explainer_of(value: object) -> Explainer:
    """The explainer that the caller gave, or named."""
    if isinstance(value, Explainer):
        return value
    if isinstance(value, str) and value in EXPLAINERS:
        return EXPLAINERS[value]()
    raise ValueError(
        f"explainer must be one of {', '.join(map(repr, EXPLAINERS))} or an object of one of "
        f"their classes, got {value!r}"
    )
