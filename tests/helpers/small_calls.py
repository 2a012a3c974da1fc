"""What a small call gives a GPU to do: kernels, other launches, and memory that it allocates.

It is counted on tensors without data, where nothing but shapes is computed: whatever PyTorch is
asked for is one launch, and one allocation for each result that is no view. A memset is a launch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import introkernels as ik
from helpers.cases import Case, distillation_case, introspective_case, linear_case, similarity_case
from introkernels.ops.select import served_by

ROWS, CLASSES = 128, 10
CASES: dict[str, Callable[[], Case]] = {
    "distillation_loss": lambda: distillation_case(ROWS, CLASSES),
    "introspective_loss": lambda: introspective_case(ROWS, CLASSES, shape=(784,)),
    "similarity_loss": lambda: similarity_case(ROWS, CLASSES),
    "linear_introspective_loss": lambda: linear_case(ROWS, CLASSES, width=64),
}
TABLE = Path(__file__).resolve().parents[2] / "benchmarks" / "README.md"


class Count(NamedTuple):
    """Of a call: kernels of this package, other launches, allocations."""

    kernels: int = 0
    others: int = 0
    allocations: int = 0

    def plus(self, other: Count) -> Count:
        return Count(*map(sum, zip(self, other, strict=True)))


class Counting(TorchDispatchMode):
    """Counts what PyTorch is asked for.

    Args:
        of_operator: what operators of this package amount to.
    """

    def __init__(self, of_operator: Mapping[str, Count]) -> None:
        super().__init__()
        self.count = Count()
        self._of_operator = of_operator

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        self.count = self.count.plus(self._of(operator, result))
        return result

    def _of(self, operator: Any, result: Any) -> Count:
        if operator.namespace != "aten":
            return self._of_operator[operator.name().partition("::")[2]]
        name = operator.name().partition("::")[2].partition(".")[0]
        # Numbers that PyTorch wraps lie on the CPU.
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_meta]
        if operator.is_view or not made:
            return Count()
        allocations = 0 if operator._schema.is_mutable else len(made)
        return Count(others=0 if "empty" in name else 1, allocations=allocations)


def directions(
    name: str, kernels: Any, of_operator: Mapping[str, Count], launches: Sized = ()
) -> tuple[Count, Count]:
    """The counts of a loss's forward and backward, served by these functions.

    Args:
        name: of a case.
        kernels: the functions, by the names of operators.
        of_operator: what an operator amounts to, where these functions are operators.
        launches: of kernels, to which these functions add.
    """
    case = CASES[name]()
    bare = {
        key: tensor if tensor is None else torch.empty_like(tensor, device="meta")
        for key, tensor in case.tensors.items()
    }
    case = case.with_tensors(**bare)
    leaves = [case[key].requires_grad_() for key in case.differentiable]
    with served_by(kernels):
        with Counting(of_operator) as forward:
            loss = getattr(ik, name)(*case.arguments())
        of_forward = len(launches)
        incoming = torch.ones_like(loss)
        with Counting(of_operator) as backward:
            torch.autograd.grad(loss, leaves, incoming)
    of_backward = len(launches) - of_forward
    return (
        forward.count.plus(Count(kernels=of_forward)),
        backward.count.plus(Count(kernels=of_backward)),
    )


def assert_in_table(name: str, backend: str, forward: Count, backward: Count) -> None:
    """Fail unless the table has these numbers."""
    counts = " | ".join(map(str, (*forward, *backward)))
    row = f"| `{name}` | {backend} | {counts} |"
    rows = TABLE.read_text(encoding="utf-8").splitlines()
    assert row in rows, f"{TABLE.name} lacks this row: {row}"
