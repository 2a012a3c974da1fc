"""What a contender has to compute before it is timed: the float64 definition on its inputs.

Errors are relative in the 2-norm, ``|out - ref| / |ref|``. Results may be off by what sums in
float32 in any order cost; gradients in a half type by one unit in their last place on top.
"""

from __future__ import annotations

import torch
from torch import Tensor

from introkernels.bench.model import Case, Tensors

TOLERANCES = {
    torch.float64: 1e-11,
    torch.float32: 1e-5,
    torch.bfloat16: 1e-5 + torch.finfo(torch.bfloat16).eps,
    torch.float16: 1e-5 + torch.finfo(torch.float16).eps,
}

# Rows go through the definition together as long as they hold this many float64 numbers.
_NUMBERS_AT_ONCE = 1 << 22


def expected_outcome(case: Case, tensors: Tensors) -> Tensors:
    """The float64 outcome of ``case`` on these inputs, some rows at a time.

    Its operator has to have a definition.

    Losses are means over rows, so the definition's sums are divided by the number of rows.
    """
    operator, rows = case.operator, case.sizes["B"]
    assert operator.definition is not None
    exact = {name: _exact(tensor) for name, tensor in tensors.items()}
    of_rows = [name for name in exact if name not in operator.shared]
    per_row = max(case.sizes["C"], *(exact[name].numel() // rows for name in of_rows))
    step = max(1, _NUMBERS_AT_ONCE // per_row)
    summed = {"loss", *(f"grad {name}" for name in operator.shared)}
    totals: Tensors = {}
    pieces: dict[str, list[Tensor]] = {}
    for start in range(0, rows, step):
        some = {
            name: tensor[start : start + step] if name in of_rows else tensor
            for name, tensor in exact.items()
        }
        # Fresh leaves, so that each pass hands out its own gradients.
        for name in operator.differentiable:
            some[name] = some[name].detach().requires_grad_()
        result = operator.definition(*some.values())
        if operator.has_loss:
            result = result / rows
        if operator.differentiable:
            result.backward()
        for name, value in operator.outcome(result, some).items():
            if name in summed:
                totals[name] = totals[name] + value if name in totals else value
            else:
                pieces.setdefault(name, []).append(value)
    return totals | {name: torch.cat(values) for name, values in pieces.items()}


def errors(found: Tensors, expected: Tensors) -> dict[str, float]:
    """The relative error of each part of an outcome; infinite for a missing or misshapen one."""
    result = {}
    for name, reference in expected.items():
        value = found.get(name)
        if value is None or value.shape != reference.shape:
            result[name] = float("inf")
            continue
        norm = float(reference.norm())
        error = float((value.double() - reference).norm())
        result[name] = error / norm if norm > 0 else error
    return result


def tolerances(found: Tensors, expected: Tensors) -> dict[str, float]:
    """How far each part may be off, by the dtype in which it was handed out."""
    return {name: TOLERANCES[found[name].dtype] if name in found else 0.0 for name in expected}


def is_right(errors: dict[str, float], tolerances: dict[str, float]) -> bool:
    """Whether every error is within its tolerance; NaN is not."""
    return all(error <= tolerances[name] for name, error in errors.items())


def _exact(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.double() if tensor.is_floating_point() else tensor
