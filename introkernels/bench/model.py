"""What a benchmark is made of: operators, cases, contenders and suites, all of them data.

All are frozen, and hold only functions of modules, so that they can be sent to another process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor

Sizes = Mapping[str, int]
Tensors = dict[str, Tensor]
Role = Literal["ours", "other", "floor", "read"]
Missing = Callable[[], str | None]
"""Tells why something can't run here, or None."""

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Operator:
    """Something to compute, and all that a fair comparison has to know of it.

    Attributes:
        name: first part of the names of its cases.
        dims: names of the sizes of a case, the number of rows ``B`` first.
        draw: makes inputs of a realistic distribution, from sizes, dtype and generator; their order
            is the order of the arguments of every function here.
        outputs: names of what the functions return, ``("loss",)`` or several.
        differentiable: inputs that get a gradient; empty for a forward alone.
        shared: inputs that all rows share, as a weight; the others have ``B`` rows.
        largest: the input whose plain sum shows how fast inputs can be read.
        compute: our public function under whatever backend is chosen.
        eager: what a careful user would write in PyTorch.
        definition: the float64 definition of some rows: sums of losses where there is a loss.
            All three are None where each contender computes something else, as training steps do:
            then there is nothing to compare with, and results only have to be finite.
        bytes_moved: from sizes and the bytes of an element of the case's dtype: what no
            implementation can avoid to move, every input read once and every output written once.
        flops: operations that no implementation can avoid, where products of matrices decide.
        contenders: those that exist for this operator only.
    """

    name: str
    dims: tuple[str, ...]
    draw: Callable[[Sizes, torch.dtype, Generator], Tensors]
    outputs: tuple[str, ...]
    differentiable: tuple[str, ...]
    largest: str
    compute: Callable[..., Any] | None
    eager: Callable[..., Any] | None
    definition: Callable[..., Any] | None
    bytes_moved: Callable[[Sizes, int], int]
    flops: Callable[[Sizes], int] | None = None
    shared: tuple[str, ...] = ()
    contenders: tuple[Contender, ...] = ()

    @property
    def has_loss(self) -> bool:
        return self.outputs == ("loss",)

    @property
    def is_step(self) -> bool:
        """Whether a call is a whole training step: nothing to compare, its backward inside."""
        return self.definition is None

    def run(self, function: Callable[..., Any], tensors: Tensors) -> Any:
        """One call: the forward, and a backward where there is something to differentiate."""
        for name in self.differentiable:
            tensors[name].grad = None
        result = function(*tensors.values())
        if self.differentiable:
            result.backward()
        return result

    def outcome(self, result: Any, tensors: Tensors) -> Tensors:
        """All that a call hands out, by name: its outputs, and ``"grad <input>"``."""
        results = (result,) if len(self.outputs) == 1 else result
        found = {name: value.detach() for name, value in zip(self.outputs, results, strict=True)}
        for name in self.differentiable:
            grad = tensors[name].grad
            if grad is not None:
                found[f"grad {name}"] = grad
        return found


@dataclass(frozen=True)
class Case:
    """An operator at one shape and dtype.

    Attributes:
        use: short name of where this shape comes from, last part but one of the case's name.
        about: the same in words, for tables.
        shape: one number for each of the operator's ``dims``.
    """

    operator: Operator
    use: str
    about: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return f"{self.operator.name}/{self.use}/{self.dtype}"

    @property
    def sizes(self) -> dict[str, int]:
        return dict(zip(self.operator.dims, self.shape, strict=True))

    @property
    def bytes_moved(self) -> int:
        return self.operator.bytes_moved(self.sizes, DTYPES[self.dtype].itemsize)

    @property
    def flops(self) -> int | None:
        return None if self.operator.flops is None else self.operator.flops(self.sizes)

    def draw(self, seed: int, device: str = "cpu") -> Tensors:
        """One set of inputs; the same for the same seed on the same device."""
        generator = torch.Generator(device).manual_seed(seed)
        with torch.device(device):
            tensors = self.operator.draw(self.sizes, DTYPES[self.dtype], generator)
        for name in self.operator.differentiable:
            tensors[name].requires_grad_()
        return tensors


def always() -> None:
    """Nothing is missing."""


@dataclass(frozen=True)
class Contender:
    """A way to compute an operator.

    Attributes:
        prepare: gives the function to call, from the operator.
        role: ``"ours"``; ``"other"``; or ``"floor"``, which computes less than the operator, shows
            what can't be undercut, and is therefore never compared with the definition.
        context: what holds while the function is called.
        missing: why it can't run here, or None.
        devices: where it can run at all, if not everywhere; it stays out of other suites.
        distribution: the package that it belongs to, whose version is recorded.
        made_equal: of another package: what was set or added so that it computes this operator.
    """

    name: str
    prepare: Callable[[Operator], Callable[..., Any]]
    role: Role = "other"
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    missing: Missing = always
    devices: tuple[str, ...] | None = None
    distribution: str | None = None
    made_equal: str | None = None


@dataclass(frozen=True)
class Suite:
    """Cases, and the contenders that meet in each of them beside the operator's own.

    Attributes:
        device: where and how it is measured, a name of `introkernels.bench.devices.DEVICES`.
        first_call: measure too what a first call costs, in a fresh process for each contender.
    """

    name: str
    cases: tuple[Case, ...]
    contenders: tuple[Contender, ...]
    device: str = "cpu"
    first_call: bool = False

    def contenders_of(self, case: Case) -> tuple[Contender, ...]:
        every = (*self.contenders, *case.operator.contenders)
        return tuple(
            contender
            for contender in every
            if contender.devices is None or self.device in contender.devices
        )
