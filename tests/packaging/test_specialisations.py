"""Kernels are compiled for classes and dimensions, never for the size of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from helpers.cases import BUILDERS, Case

import introkernels as ik
from introkernels.ops import loader, warming

pytest.importorskip("triton", reason="Triton's kernels need Triton")
if loader.INTERPRETED:
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

OF_ANY_BATCH: dict[str, Callable[[int], Case]] = {
    "distillation": lambda rows: BUILDERS["distillation_loss"](rows, 33),
    "distillation-sum": lambda rows: BUILDERS["distillation_loss"](rows, 9, reduction="sum"),
    "similarity": lambda rows: BUILDERS["similarity_loss"](rows, 33),
    "similarity-explained": lambda rows: BUILDERS["similarity_loss"](rows, 33, explained=4),
    "introspective": lambda rows: BUILDERS["introspective_loss"](rows, 33, shape=(3, 5)),
    "introspective-long": lambda rows: BUILDERS["introspective_loss"](rows, 7, shape=(5003,)),
    "head": lambda rows: BUILDERS["linear_introspective_loss"](rows, 33, width=40),
    "head-centred": lambda rows: BUILDERS["linear_introspective_loss"](
        rows, 700, width=9, center=True
    ),
}


def specialisations(case: Case) -> set[str]:
    """What the kernels of a call and of its backward are compiled for."""
    from introkernels.ops.triton import operators

    leaves = case.with_tensors(
        **{name: case[name].detach().requires_grad_() for name in case.differentiable}
    )
    launches = warming.record(
        operators, getattr(ik, case.function), leaves.arguments(), leaves.keywords
    )
    return {compiled_for(launch) for launch in launches}


def compiled_for(launch: Any) -> str:
    """As a recording tells it, without the arguments that Triton is told not to look at."""
    looked_at = tuple(
        argument
        for parameter, argument in zip(launch.kernel.params, launch.arguments, strict=False)
        if not parameter.do_not_specialize
    )
    return repr(warming._specialisation(launch._replace(arguments=looked_at)))


@pytest.mark.parametrize("name", OF_ANY_BATCH)
def test_another_batch_needs_no_other_kernel(name: str) -> None:
    first = specialisations(OF_ANY_BATCH[name](48))
    assert len(first) >= 2
    for rows in (47, 64, 3, 16, 1, 130, 1000):
        assert specialisations(OF_ANY_BATCH[name](rows)) <= first, f"for {rows} rows"
