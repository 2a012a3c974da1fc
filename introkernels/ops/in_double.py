"""The composite in float64: what ``use_backend("reference")`` runs.

It is the definition with its gradient written out, which an operator, below autograd, needs.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from introkernels.ops import composite, schema


def _in_double(name: str) -> Callable[..., Any]:
    operator = getattr(composite, name)

    def kernel(*args: Any) -> Any:
        outputs = operator(*(_double(arg) for arg in args))
        like = schema.FAKES_OF_TORCH[name](*args)
        if isinstance(outputs, Tensor):
            return outputs.to(like.dtype)
        return tuple(output.to(of.dtype) for output, of in zip(outputs, like, strict=True))

    return kernel


def _double(arg: Any) -> Any:
    if isinstance(arg, (list, tuple)):
        return [_double(part) for part in arg]
    return arg.double() if isinstance(arg, Tensor) and arg.is_floating_point() else arg


KERNELS = SimpleNamespace(**{name: _in_double(name) for name in schema.SCHEMAS})
