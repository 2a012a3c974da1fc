"""The contenders that every operator has."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import introkernels as ik
from introkernels.bench.model import Contender, Operator


def _eager(operator: Operator) -> Callable[..., Any]:
    assert operator.eager is not None
    return operator.eager


def _compiled(operator: Operator) -> Callable[..., Any]:
    # What was compiled for other shapes counts against a limit after which nothing is compiled.
    torch.compiler.reset()
    compiled: Callable[..., Any] = torch.compile(_eager(operator), dynamic=False)
    return compiled


def _ours(operator: Operator) -> Callable[..., Any]:
    assert operator.compute is not None
    return operator.compute


def _not_loaded(backend: str) -> str | None:
    status = ik.backends.status()[backend]
    return None if status == "loaded" else status


EAGER = Contender("eager", _eager)
COMPILE = Contender("compile", _compiled)
REFERENCE = Contender("reference", _ours, context=partial(ik.use_backend, "reference"))
CPP = Contender(
    "cpp",
    _ours,
    role="ours",
    context=partial(ik.use_backend, "cpu"),
    missing=partial(_not_loaded, "cpu"),
)
CUDA = Contender(
    "cuda",
    _ours,
    role="ours",
    context=partial(ik.use_backend, "cuda"),
    missing=partial(_not_loaded, "cuda"),
)
TRITON = Contender(
    "triton",
    _ours,
    role="ours",
    context=partial(ik.use_backend, "triton"),
    missing=partial(_not_loaded, "triton"),
)
